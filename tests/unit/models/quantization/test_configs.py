"""What quantisation configs say: the 52 among the published ones, lists of names, and refusals that name key and
value.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paged_backend.errors import EngineError
from paged_backend.models.quantization.patterns import any_of
from paged_backend.models.quantization.quantization import Quantization
from paged_backend.models.quantization.reading import read_quantization

# `quantization_config` of config.json and hf_quant_config.json as published, by owner--model; the longest lists of
# modules are cut to 100.
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
REFUSED = {
    "nvidia--MiniMax-M3-NVFP4": "quant_algo: MXFP8 is not supported",
    "nvidia--DeepSeek-V4-Flash-NVFP4": "fp8 beside modelopt's quant_algo MIXED_PRECISION is not supported",
    "nvidia--DeepSeek-V4-Pro-NVFP4": "fp8 beside modelopt's quant_algo MIXED_PRECISION is not supported",
}


def read_published(name: str, folder: Path) -> Quantization | None:
    if (content := PUBLISHED[name].get("hf_quant_config")) is not None:
        (folder / "hf_quant_config.json").write_text(
            json.dumps(content if "quantization" in content else {"quantization": content})
        )
    return read_quantization(folder, PUBLISHED[name].get("quantization_config"))


def test_every_published_quantisation_is_read_or_refused_by_what_is_not_supported(tmp_path: Path) -> None:
    read, refused = {}, {}
    for number, name in enumerate(PUBLISHED):
        (folder := tmp_path / str(number)).mkdir()
        try:
            if (found := read_published(name, folder)) is not None:
                read[name] = found
        except EngineError as error:
            refused[name] = str(error)
    assert (len(read), len(refused)) == (49, len(REFUSED))
    assert all(words in refused[name] for name, words in REFUSED.items()), refused
    words = {name: found.words for name, found in read.items()}
    assert (
        words["Qwen--Qwen3-30B-A3B-FP8"]
        == "fp8: fp8 in blocks of 128 x 128, activations rounded to fp8 in groups of 128"
    )
    assert words["moonshotai--Kimi-K2.5"] == "compressed-tensors: int4 in groups of 32"
    assert (
        words["nvidia--Llama-3.1-70B-Instruct-FP8"]
        == "modelopt FP8: fp8 with one scale, activations rounded to fp8 with fixed scales"
    )
    assert words["openai--gpt-oss-20b"] == "mxfp4, of experts alone"


@pytest.mark.parametrize(
    ("name", "module", "words"),
    [
        ("Qwen--Qwen3-30B-A3B-FP8", "model.layers.3.mlp.gate", None),
        ("Qwen--Qwen3-30B-A3B-FP8", "model.layers.3.mlp.experts.17.gate_proj", "fp8 in blocks"),
        ("Qwen--Qwen3-32B-FP8", "lm_head", None),
        ("MiniMaxAI--MiniMax-M2.5", "model.layers.0.block_sparse_moe.gate", None),
        ("MiniMaxAI--MiniMax-M2.5", "model.layers.0.block_sparse_moe.experts.0.w1", "fp8 in blocks"),
        ("moonshotai--Kimi-K2.5", "language_model.model.layers.4.mlp.shared_experts.up_proj", None),
        ("moonshotai--Kimi-K2.5", "language_model.model.layers.4.mlp.experts.9.up_proj", "int4"),
        ("nvidia--GLM-5.1-NVFP4", "model.layers.1.mlp.up_proj", None),
        ("nvidia--GLM-5.1-NVFP4", "model.layers.11.mlp.experts.2.up_proj", "NVFP4"),
        ("nvidia--Qwen3.6-35B-A3B-NVFP4", "model.language_model.layers.0.linear_attn.in_proj_z", "fp8 with one scale"),
        ("nvidia--Qwen3.6-35B-A3B-NVFP4", "model.language_model.layers.0.mlp.experts.5.up_proj", "NVFP4"),
        ("openai--gpt-oss-20b", "model.layers.0.self_attn.q_proj", None),
    ],
)
def test_published_lists_of_modules(name: str, module: str, words: str | None, tmp_path: Path) -> None:
    quantization = read_published(name, tmp_path)
    assert quantization is not None
    scheme = quantization.scheme_of(module)
    assert scheme is None if words is None else scheme is not None and scheme.words.startswith(words)


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("lm_head", "lm_head", "model.lm_head2"),
        ("mlp.gate", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj"),
        ("model.layers.1", "model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj"),
        ("model.layers.1.*", "model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj"),
        (
            "*.mlp.shared_expert.*",
            "model.layers.1.mlp.shared_expert.up_proj",
            "model.layers.1.mlp.shared_experts.up_proj",
        ),
        ("model.layers.*.self_attn", "model.layers.7.self_attn.q_proj", "model.layers.7.mlp.up_proj"),
        ("re:.*mlp\\.(gate|up)_proj", "model.layers.7.mlp.up_proj", "model.layers.7.mlp.down_proj"),
        ("re:layers", "layers.7", "model.layers.7"),
    ],
)
def test_patterns(pattern: str, matching: str, other: str) -> None:
    matches = any_of([pattern])
    assert matches(matching)
    assert not matches(other)


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


def compressed(weights: dict[str, Any], format: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": more.pop("input_activations", None)}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **more,
    }


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method: bitsandbytes is not supported; supported: fp8, "),
        ({"bits": 4}, "quant_method: unnamed is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, r"weight_block_size: \[64, 128\] is not supported"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt: e5m2"),
        (
            {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]},
            "activation_scheme: static",
        ),
        (
            {"quant_method": "fp8", "modules_to_not_convert": "lm_head"},
            "modules_to_not_convert: expected a list of names, got lm_head",
        ),
        ({"quant_method": "awq", "bits": 3}, "awq: bits: 3"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq: version: gemv"),
        ({"quant_method": "awq", "bits": 4, "group_size": 0}, "awq: group_size: 0"),
        ({"quant_method": "gptq", "bits": 3}, "gptq: bits: 3"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "gptq: desc_act: true is not supported"),
        (
            {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down": {"bits": 8}}},
            r"gptq: dynamic: options of its own for \+:\.\*down",
        ),
        (compressed({**INT4, "actorder": "group"}), r"group_0\.weights\.actorder: group"),
        (compressed({**INT4, "group_size": 8}), r"group_0\.weights\.group_size: 8"),
        (compressed({**INT4, "num_bits": 3}), "pack-quantized with int weights of 3 bits"),
        (compressed(INT4, "marlin-24"), "format marlin-24"),
        (compressed(INT4, input_activations={"num_bits": 8, "type": "int"}), "activations of packed weights"),
        (compressed(INT4, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config: sparse-24-bitmask"),
        (compressed(INT4, transform_config={"config_groups": {"R1": {}}}), "transform_config"),
        (compressed(INT4, ignore=["re:("]), r"re:\( is no regular expression"),
        (compressed({**FLOAT8, "symmetric": False}, "float-quantized"), r"weights\.symmetric: false"),
        (
            compressed({**FLOAT8, "strategy": "block", "block_structure": [64, 64]}, "float-quantized"),
            r"block_structure: \[64, 64\]",
        ),
        (
            compressed(FLOAT8, "float-quantized", input_activations={"num_bits": 8, "type": "int"}),
            "int activations of 8 bits are not supported beside fp8",
        ),
        (
            compressed(
                FLOAT8,
                "float-quantized",
                input_activations={"num_bits": 8, "type": "float", "dynamic": True, "strategy": "tensor"},
            ),
            "dynamic scales of strategy tensor",
        ),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo: W4A8_AWQ"),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32},
            "group_size: 32 is not supported for NVFP4; supported: 16",
        ),
        ({"quant_method": "modelopt"}, "quant_algo is missing"),
    ],
)
def test_what_cannot_be_read_is_refused_by_key_and_value(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"quantization_config.*{words}"):
        read_quantization(tmp_path, config)


def test_lists_know_modules_by_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    """Where a family calls them otherwise, as of models with other inputs than text."""
    config = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "ignore": ["lm_head", "model.language_model.layers.0.self_attn*"],
    }
    found = read_quantization(tmp_path, config)
    assert found is not None
    quantization = replace(found, renames={"model.language_model.": "model."})
    assert quantization.scheme_of("model.layers.0.self_attn.q_proj") is None
    assert quantization.scheme_of("model.layers.0.mlp.up_proj") is not None


def test_named_targets_come_before_the_class_of_all_modules(tmp_path: Path) -> None:
    groups = {
        "group_0": {"targets": ["Linear"], "weights": INT4, "format": "pack-quantized"},
        "group_1": {"targets": ["re:.*down_proj"], "weights": FLOAT8, "format": "float-quantized"},
    }
    quantization = read_quantization(
        tmp_path, {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": []}
    )
    assert quantization is not None
    words = [
        scheme.words
        for name in ("up_proj", "down_proj")
        if (scheme := quantization.scheme_of(f"model.layers.0.mlp.{name}")) is not None
    ]
    assert words == ["int4 in groups of 32", "fp8 per channel"]
