"""fp8, modelopt, AWQ and GPTQ: tokens equal a float32 model of the dequantised weights; what cannot be read is refused
by module and reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.models.shard import Shard
from paged_backend.models.weights import allocate_weights, load_weights
from paged_kernels.codes import dequantise
from tests.oracle import random_prompts, save_checkpoint
from tests.published_formats import FORMATS, save_published
from tests.quantised_checkpoints import SIZES, behead, edit_config
from tests.runner_driver import Driver, load_runner

CPU = torch.device("cpu")
LAYER = "model.layers.1."


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_equal_a_model_of_what_the_weights_mean(name: str, tmp_path: Path) -> None:
    truth = save_published(tmp_path, FORMATS[name])
    prompts = random_prompts((3, 20))
    assert Driver(load_runner(tmp_path)).generate(prompts, 6, chunk=7) == truth.greedy(prompts, 6)


@pytest.mark.parametrize("name", FORMATS)
def test_kept_numbers_mean_what_dequantised_ones_are(name: str, tmp_path: Path) -> None:
    """As kernels find them, packed and with their scales, against the plain twin; and they take fewer bytes."""
    save_published(tmp_path, FORMATS[name])
    architecture = open_checkpoint(EngineConfig(model=str(tmp_path))).architecture
    assert architecture.quantization is not None
    found = []
    for dequantised in (False, True):
        quantization = replace(architecture.quantization, dequantised=dequantised)
        weights = allocate_weights(replace(architecture, quantization=quantization), torch.float32, CPU)
        load_weights(weights, tmp_path, lambda sentence: None)
        found.append(weights)
    kept, plain = found
    for one, other in zip(kept.linears, plain.linears, strict=True):
        assert one.format.codes != "plain" and other.format.codes == "plain"
        assert torch.equal(dequantise(one), other.weight)
    assert kept.num_bytes < plain.num_bytes / 2


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "size"),
    [("fp8-block", 512), ("modelopt-nvfp4", 512), ("awq-g32", 512), ("awq-g128", 512), ("gptq-8-v2", 512)]
    # an odd number of groups: one rank has more than the other
    + [("fp8-block", 384), ("awq-g32", 544), ("awq-g128", 384)],
)
@pytest.mark.parametrize("dequantised", [False, True], ids=["kept", "dequantised"])
def test_a_rank_has_its_part_of_every_quantised_matrix(name: str, size: int, dequantised: bool, tmp_path: Path) -> None:
    save_published(tmp_path, FORMATS[name], intermediate_size=size, num_attention_heads=8, num_key_value_heads=8)
    architecture = open_checkpoint(EngineConfig(model=str(tmp_path))).architecture
    assert architecture.quantization is not None
    architecture = replace(architecture, quantization=replace(architecture.quantization, dequantised=dequantised))
    parts = []
    for shard in (Shard(), Shard(0, 2), Shard(1, 2)):
        weights = allocate_weights(architecture.of_rank(shard), torch.float32, CPU)
        load_weights(weights, tmp_path, lambda sentence: None)
        parts.append(weights.layers[1])
    whole, *ranks = (dequantise(layer.mlp.gate_up).chunk(2)[1] for layer in parts)  # type: ignore[union-attr]
    assert torch.equal(whole, torch.cat(ranks))
    whole, *ranks = (dequantise(layer.mlp.down) for layer in parts)  # type: ignore[union-attr]
    assert torch.equal(whole, torch.cat(ranks, 1))
    whole, *ranks = (dequantise(layer.attention.out) for layer in parts)
    assert torch.equal(whole, torch.cat(ranks, 1))


def test_modules_that_stay_as_they_are(tmp_path: Path) -> None:
    """Named in a list, or found as floats in the files without one."""
    truth = save_published(tmp_path, FORMATS["awq-g32"], plain=("layers.0.mlp.down_proj", "layers.1.self_attn.o_proj"))
    prompts = random_prompts((12,))
    assert Driver(load_runner(tmp_path)).generate(prompts, 6) == truth.greedy(prompts, 6)
    edit_config(tmp_path, modules_to_not_convert=["layers.0.mlp.down_proj", "*.self_attn.o_*"])
    with pytest.raises(EngineError, match=r"tensor model\.layers\.0\.self_attn\.o_proj\.weight is missing"):
        open_checkpoint(EngineConfig(model=str(tmp_path)))


@pytest.mark.parametrize("name", [*FORMATS, "quantization=fp8"])
def test_a_model_of_embeddings_has_no_head_and_the_names_of_its_layers_alone(name: str, tmp_path: Path) -> None:
    options = {}
    if name in FORMATS:
        save_published(tmp_path, FORMATS[name], plain=("layers.0.self_attn.o_proj",))
    else:
        options["quantization"] = "fp8"
        save_checkpoint(tmp_path, "Qwen3ForCausalLM", **SIZES)
    whole = load_runner(tmp_path, **options)._decoder._weights
    behead(tmp_path)
    alone = load_runner(tmp_path, **options)._decoder._weights
    for one, other in zip(whole.linears, alone.linears, strict=True):
        assert torch.equal(dequantise(one), dequantise(other))


def test_hf_quant_config_json_says_the_same(tmp_path: Path) -> None:
    truth = save_published(tmp_path, FORMATS["modelopt-fp8"], plain=("layers.0.self_attn.o_proj",))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    content = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "model.layers.0.self_attn.o*"]},
    }
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    prompts = random_prompts((12,))
    assert Driver(load_runner(tmp_path)).generate(prompts, 6) == truth.greedy(prompts, 6)


def test_modules_that_are_multiplied_together_must_be_stored_in_the_same_way(tmp_path: Path) -> None:
    save_published(tmp_path, FORMATS["awq-g32"], plain=("layers.1.self_attn.v_proj",))
    with pytest.raises(
        EngineError,
        match=r"layers\.1\.self_attn\.q_proj as AWQ int4 in groups of 32, asymmetric, .*v_proj as plain floats",
    ):
        open_checkpoint(EngineConfig(model=str(tmp_path)))


def spoil(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_last(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "tensor", "change", "words"),
    [
        (
            "fp8-block",
            "mlp.down_proj.weight_scale_inv",
            lambda scale: scale[:, :1],
            r"has shape \[1, 1\], config\.json implies \[1, 2\]",
        ),
        ("fp8-block", "mlp.down_proj.weight_scale_inv", with_last(float("nan")), "scales that are not finite"),
        ("fp8-block", "mlp.down_proj.weight_scale_inv", with_last(0.0), "a scale of 0, expected more than 0"),
        ("fp8-block", "mlp.down_proj.weight_scale_inv", with_last(-1.0), "a scale of -1"),
        ("fp8-block", "mlp.down_proj.weight", with_last(float("nan")), "not finite"),
        (
            "fp8-block",
            "mlp.down_proj.weight",
            lambda weight: weight.view(torch.int8),
            "is of type I8; fp8 in blocks .* is stored as F8_E4M3",
        ),
        ("fp8-static", "self_attn.q_proj.input_scale", with_last(float("inf")), "scales that are not finite"),
        ("modelopt-nvfp4", "self_attn.q_proj.weight_scale_2", with_last(0.0), "a scale of 0"),
        ("modelopt-nvfp4", "self_attn.q_proj.weight_scale", with_last(float("nan")), "scales that are not finite"),
        ("awq-g32", "self_attn.q_proj.scales", with_last(float("nan")), "scales that are not finite"),
        ("awq-g32", "self_attn.q_proj.qzeros", lambda zeros: zeros[:1], r"has shape \[1, 16\]"),
        ("gptq-4", "mlp.up_proj.g_idx", lambda g_idx: g_idx.flip(0), "desc_act"),
    ],
)
def test_corrupt_tensors_are_refused_by_name(
    name: str, tensor: str, change: Callable[[Tensor], Tensor], words: str, tmp_path: Path
) -> None:
    save_published(tmp_path, FORMATS[name])
    spoil(tmp_path, LAYER + tensor, change)
    with pytest.raises(EngineError, match=f"{LAYER}{tensor}.*{words}".replace(".", r"\.", 3)):
        load_runner(tmp_path)


def test_a_tensor_that_a_module_lacks_is_refused(tmp_path: Path) -> None:
    save_published(tmp_path, FORMATS["fp8-block"])
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{LAYER}mlp.up_proj.weight_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        EngineError,
        match=r"up_proj\.weight_scale_inv is missing; model\.layers\.1\.mlp\.up_proj is fp8 in blocks of 128 x 128",
    ):
        open_checkpoint(EngineConfig(model=str(tmp_path)))


def test_columns_that_groups_do_not_divide_are_refused_before_the_weights_are_read(tmp_path: Path) -> None:
    save_published(tmp_path, FORMATS["awq-g32"])
    edit_config(tmp_path, group_size=48)
    with pytest.raises(
        EngineError,
        match=r"layers\.0\.\S+ \[\d+, 128\] cannot be AWQ int4 .*128 columns are no multiple of the group of 48",
    ):
        open_checkpoint(EngineConfig(model=str(tmp_path)))


@pytest.mark.parametrize("options", [{"quantization": "fp8"}, {"quantization": "int4"}], ids=["fp8", "int4"])
def test_what_is_quantised_already_is_not_quantised_again(options: dict[str, Any], tmp_path: Path) -> None:
    save_published(tmp_path, FORMATS["awq-g32"])
    with pytest.raises(
        EngineError, match=r"quantization: \w+ is for checkpoints of floats, this one is quantised already \(awq\)"
    ):
        open_checkpoint(EngineConfig(model=str(tmp_path), **options))
