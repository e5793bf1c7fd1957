"""Families with attention over latents: what a token keeps, how checkpoints are stored, adapters, ranks, and what is
refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError, RequestError
from paged_backend.models.adapter_files import check_adapter
from paged_backend.models.adapter_layout import AdapterLayout
from paged_backend.models.architecture import read_architecture
from paged_backend.models.blocks.mla import LatentAttention
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.models.layer_spec import LatentSpec
from paged_backend.models.weights import allocate_weights, load_weights
from paged_backend.runner.builder import RunnerBuilder
from paged_backend.runner.kv_store import MemoryNeeds
from paged_kernels.codes import dequantise
from tests.adapter_oracle import AdapterOracle, save_adapter
from tests.bench.geometries import GEOMETRIES, write_geometry
from tests.bench.latent_geometries import LATENT_GEOMETRIES
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.runner_driver import Driver, load_runner

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
}
V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"


def save(folder: Path, architecture: str = V3, **options: Any) -> Path:
    return save_checkpoint(folder, architecture, **SMALL | options)


@pytest.mark.parametrize(
    ("name", "page_bytes"),
    [
        ("deepseek-v2-lite", 27 * 576 * 2),
        ("deepseek-v3", 61 * 576 * 2),
        ("kimi-k2", 61 * 576 * 2),
        ("glm-4.7-flash", 47 * 576 * 2),
    ],
)
def test_a_token_keeps_one_latent_a_layer_whatever_the_number_of_heads(
    name: str, page_bytes: int, tmp_path: Path
) -> None:
    folder, heard = write_geometry(name, tmp_path), list[str]()
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        load_format="dummy",
        dtype="bfloat16",
        page_size=1,
        num_pages=1000,
        speculation="off",
    )
    builder = RunnerBuilder(config, heard.append, open_checkpoint(config))
    size = builder._size_of(MemoryNeeds())
    assert size.page_bytes == page_bytes
    assert len(size.groups.groups) == 1
    assert f"1000 tokens, {page_bytes * 1000 / 2**20:.4g} MiB" in size.decided_by


def test_scores_are_scaled_as_yarns_mscale_says(tmp_path: Path) -> None:
    scales = {}
    for name in LATENT_GEOMETRIES:
        attention = read_architecture(write_geometry(name, tmp_path / name)).attention
        assert isinstance(attention, LatentSpec)
        scales[name] = attention.scale * (attention.nope_dim + attention.rotary_dim) ** 0.5
    # (0.1 mscale_all_dim ln(factor) + 1) ** 2
    expected = {
        "deepseek-v2-lite": 1.5896261,
        "deepseek-v2": 1.8738542,
        "deepseek-v3": 1.8738542,
        "kimi-k2": 1.8132605,
        "glm-4.7-flash": 1.0,
    }
    assert scales == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("options", [{"q_lora_rank": None}, {"rope_interleave": False}], ids=str)
def test_queries_of_the_hidden_state_and_pairs_of_halves(options: dict[str, Any], tmp_path: Path) -> None:
    folder = save(tmp_path, **options)
    prompts = random_prompts((1, 30))
    assert Driver(load_runner(folder)).generate(prompts, 8, chunk=7) == Oracle(folder).greedy(prompts, 8)


def test_kimi_k2_is_deepseek_v3_by_another_name(tmp_path: Path) -> None:
    folder = save(tmp_path)
    prompts = random_prompts((1, 30))
    expected = Oracle(folder).greedy(prompts, 8)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "kimi_k2"}))
    assert Driver(load_runner(folder)).generate(prompts, 8, chunk=7) == expected


def test_blocks_of_fp8_are_read_and_those_of_keys_and_values_become_floats(tmp_path: Path) -> None:
    """As DeepSeek-V3 is published."""
    sizes = {"hidden_size": 128, "q_lora_rank": 128, "kv_lora_rank": 128, "moe_intermediate_size": 64}
    folder = save(tmp_path / "plain", **sizes, num_hidden_layers=2)
    quantised = tmp_path / "fp8"
    quantised.mkdir()
    tensors, plain = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        plain[name] = tensor
        if tensor.dim() == 2 and name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight")):
            codes, scales = in_blocks(tensor)
            tensors |= {name: codes, f"{name}_scale_inv": scales}
            plain[name] = meaning(codes, scales)
        else:
            tensors[name] = tensor
    assert any("kv_b_proj.weight_scale_inv" in name for name in tensors)
    assert any("experts.3.up_proj.weight_scale_inv" in name for name in tensors)
    save_file(tensors, quantised / "model.safetensors")
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config = json.loads((folder / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    architecture = open_checkpoint(EngineConfig(model=str(quantised))).architecture
    weights = allocate_weights(architecture, torch.float32, torch.device("cpu"))
    load_weights(weights, quantised, lambda sentence: None)
    layer, prefix = weights.layers[1], "model.layers.1.self_attn."
    assert isinstance(layer.attention, LatentAttention)
    assert torch.equal(layer.attention.heads, plain[f"{prefix}kv_b_proj.weight"])
    packed = torch.cat([plain[f"{prefix}{name}.weight"] for name in ("q_a_proj", "kv_a_proj_with_mqa")])
    assert torch.equal(dequantise(layer.attention.first), packed)
    assert {linear.weight.dtype for linear in layer.attention.linears} == {torch.float8_e4m3fn}
    assert [experts.weight.dtype for experts in layer.packed_experts] == [torch.float8_e4m3fn] * 2
    runner = load_runner(quantised)  # on a CPU all are floats
    assert len(set(Driver(runner).generate(random_prompts((20,)), 8, chunk=7)[0])) > 3


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 [rows, columns], and a scale for each block of 128 x 128."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scales = torch.empty(rows, columns)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(rows):
        for column in range(columns):
            at = slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128)
            scales[row, column] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scales[row, column]).to(torch.float8_e4m3fn)
    return codes, scales


def meaning(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return codes.float() * wide[: len(codes), : codes.shape[1]]


TARGETS = {
    V3: ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"),
    V2: ("q_proj", "kv_a_proj_with_mqa", "o_proj"),
}


@pytest.mark.parametrize("architecture", TARGETS)
def test_with_adapters_greedy_tokens_are_those_of_peft(architecture: str, tmp_path: Path) -> None:
    """One sequence with an adapter of all modules that are products, and one without, share their steps."""
    own = {"q_lora_rank": None} if architecture == V2 else {}
    folder = save(tmp_path / "model", architecture, **own)
    adapter = save_adapter(
        tmp_path / "adapters" / "a", folder, seed=1, rank=3, targets=TARGETS[architecture], lora_alpha=6
    )
    runner = load_runner(folder, page_size=8, lora_directory=str(tmp_path / "adapters"), max_loras=1, max_lora_rank=4)
    assert runner.adapter_slots is not None
    runner.adapter_slots.fill(0, runner.adapter_slots.read("a"))
    prompts = random_prompts((40, 70))
    answers = Driver(runner).generate(prompts, 6, chunk=30, adapter_slots=(0, -1))
    assert answers == AdapterOracle(folder, adapter).greedy(prompts[:1], 6) + Oracle(folder).greedy(prompts[1:], 6)


def test_adapters_of_kv_b_proj_are_refused_by_name(tmp_path: Path) -> None:
    """No product makes keys and values, so that nothing can be added to it."""
    folder = save(tmp_path / "model")
    adapter = save_adapter(tmp_path / "adapter", folder, 0, targets=("kv_b_proj", "o_proj"))
    architecture = read_architecture(folder)
    with pytest.raises(RequestError, match=r"kv_b_proj.*not supported"):
        check_adapter(adapter, AdapterLayout.of(architecture.layers, architecture.hidden_size), max_rank=8)


def test_eight_bits_for_latents_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    folder = save(tmp_path)
    with pytest.raises(
        EngineError, match="kv_dtype: fp8_e4m3 is not supported for the latents of DeepseekV3ForCausalLM"
    ):
        load_runner(folder, kv_dtype="fp8_e4m3")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("deepseek-v3", {"kv_lora_rank": 500}, "kv_lora_rank: 500 is not supported; supported: powers of two"),
        ("deepseek-v3", {"qk_rope_head_dim": 128}, "qk_rope_head_dim: 128 is not supported"),
        ("deepseek-v3", {"attention_bias": True}, "attention_bias: expected False, got true"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func: expected 'sigmoid'"),
        ("deepseek-v3", {"topk_method": "greedy"}, "topk_method: expected 'noaux_tc'"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq: expected 1, got 2"),
        ("deepseek-v3", {"n_group": 7}, "n_group: 7 groups of equal size cannot be made of 256 experts"),
        ("deepseek-v3", {"model_type": "deepseek_v32"}, "model_type is deepseek_v32"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob: expected False, got true"),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method: expected 'greedy' or 'group_limited_greedy'"),
        ("glm-4.7-flash", {"mlp_layer_types": ["dense"]}, "mlp_layer_types: 1 entries for 47 layers"),
        ("glm-4.7-flash", {"first_k_dense_replace": 2}, "first_k_dense_replace: expected 1, got 2"),
        ("deepseek-v3", {"architectures": ["DeepseekV32ForCausalLM"]}, "architecture DeepseekV32ForCausalLM is not"),
        ("deepseek-v3", {"architectures": ["GlmMoeDsaForCausalLM"]}, "architecture GlmMoeDsaForCausalLM is not"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_computed_is_refused_by_name(
    name: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**GEOMETRIES[name], **options}))
    with pytest.raises(EngineError) as refusal:
        read_architecture(tmp_path)
    assert words in str(refusal.value)


def test_a_layer_of_multi_token_prediction_is_left_unread_and_the_log_says_so(tmp_path: Path) -> None:
    folder, heard = save(tmp_path, num_nextn_predict_layers=1), list[str]()
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name}
    save_file(tensors | {"model.layers.2.eh_proj.weight": torch.zeros(32, 64)}, folder / "model.safetensors")
    runner = load_runner(folder, tell=heard.append)
    (sentence,) = [sentence for sentence in heard if sentence.startswith("weights: ")]
    assert "ignored 1 tensors that the model has no use for (model.layers.2.eh_proj.weight)" in sentence
    assert len(Driver(runner).generate([np.arange(5, dtype=np.int32)], 3)[0]) == 3
