"""Experts in the formats that they are published in, or rounded to while they are loaded: they stay packed, one by one
or together in the files, and tokens are those of a float32 model of what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.architecture import Architecture
from paged_backend.models.blocks.moe import MoeMlp
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.models.quantization.quantization import Quantization
from paged_backend.models.shard import Shard
from paged_backend.models.weights import Weights, allocate_weights, load_weights, packs_experts, randomise_weights
from paged_kernels.codes import dequantise, quantise
from paged_kernels.experts import Experts
from paged_kernels.linear import Format
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.published_formats import FORMATS, Published, gptq
from tests.quantised_checkpoints import edit_config
from tests.runner_driver import Driver, load_runner

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GPTQ_8 = Published({**FORMATS["gptq-8-v2"].config, "group_size": 32}, gptq(8, 32, False))
PUBLISHED = {name: FORMATS[name] for name in ("fp8-block", "modelopt-nvfp4", "awq-g32", "gptq-4")} | {"gptq-8": GPTQ_8}
ONLINE = {"fp8": Format("fp8", (1, 0)), "int4": Format("int4", (1, 64))}


def save_experts(folder: Path, name: str, **options: Any) -> tuple[Path, Path]:
    """A random Qwen3-MoE whose experts are in a published format, and the float32 model that it means."""
    meant_at, stored_at = folder / "meant", folder / "stored"
    for path in (meant_at, stored_at):
        save_checkpoint(path, "Qwen3MoeForCausalLM", **{**SIZES, **options})
    meant, stored = load_file(meant_at / "model.safetensors"), {}
    for tensor_name, tensor in meant.items():
        if ".experts." not in tensor_name:
            stored[tensor_name] = tensor
            continue
        parts, meant[tensor_name] = PUBLISHED[name].pack(tensor)
        stored |= {tensor_name.replace("weight", ending): part for ending, part in parts.items()}
    for path, tensors in ((meant_at, meant), (stored_at, stored)):
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, path / "model.safetensors", metadata={"format": "pt"})
    edit_config(stored_at, **PUBLISHED[name].config)
    return stored_at, meant_at


def architecture_of(folder: Path, **options: Any) -> Architecture:
    return open_checkpoint(EngineConfig(model=str(folder), **options)).architecture


def load(architecture: Architecture, folder: Path) -> Weights:
    weights = allocate_weights(architecture, torch.float32, CPU)
    load_weights(weights, folder, lambda sentence: None)
    return weights


def experts_of(weights: Weights, layer: int = 1) -> Experts:
    mlp = weights.layers[layer].mlp
    assert isinstance(mlp, MoeMlp)
    return mlp.experts


def stacked(tensors: dict[str, Tensor], module: str) -> Tensor:
    return torch.stack([tensors[f"model.layers.1.mlp.experts.{expert}.{module}.weight"] for expert in range(4)])


def matrices(weights: Weights, part: str) -> Tensor:
    """float32 [experts, out, in]: what a layer's experts mean."""
    linear = getattr(experts_of(weights), part)
    assert linear.format.codes != "plain"
    return torch.stack([dequantise(linear.of(expert)) for expert in range(len(linear.weight))])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_experts_stay_packed_and_mean_the_same(name: str, tmp_path: Path) -> None:
    stored, meant_at = save_experts(tmp_path, name)
    architecture, meant = architecture_of(stored), load_file(meant_at / "model.safetensors")
    assert packs_experts(architecture)
    weights = load(architecture, stored)
    gate_up = torch.cat([stacked(meant, "gate_proj"), stacked(meant, "up_proj")], 1)
    # scales that lie on top of others are multiplied in another order
    torch.testing.assert_close(matrices(weights, "gate_up"), gate_up, rtol=1e-6, atol=0)
    torch.testing.assert_close(matrices(weights, "down"), stacked(meant, "down_proj"), rtol=1e-6, atol=0)
    plain = allocate_weights(replace(architecture, quantization=None), torch.float32, CPU)
    packed = sum(t.nbytes for linear in weights.layers[1].packed_experts for t in linear.tensors)
    assert plain.num_bytes - weights.num_bytes == 2 * (plain_bytes(plain) - packed)


def plain_bytes(weights: Weights) -> int:
    return experts_of(weights).gate_up.weight.nbytes + experts_of(weights).down.weight.nbytes


@pytest.mark.one_in(2)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dequantised while they are read"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_tokens_are_those_of_what_the_experts_mean(
    name: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU dequantises them; packed they are as kernels find them, and the plain twin unpacks the chosen ones."""
    stored, meant = save_experts(tmp_path, name)
    format_of_experts = Quantization.format_of_experts

    def kept(self: Quantization, modules: Sequence[Sequence[str]], sizes: Sequence[int], in_size: int) -> Format:
        return format_of_experts(replace(self, dequantised=not packed), modules, sizes, in_size)

    monkeypatch.setattr(Quantization, "format_of_experts", kept)
    prompts = random_prompts((3, 20))
    driver = Driver(load_runner(stored))
    assert driver.generate(prompts, 6, chunk=7) == Oracle(meant).greedy(prompts, 6)


@pytest.mark.parametrize(
    ("name", "size"),
    [("fp8-block", 256), ("awq-g32", 256), ("fp8-block", 384), ("awq-g32", 96), ("modelopt-nvfp4", 48)],
)
def test_a_rank_has_its_part_of_every_expert(name: str, size: int, tmp_path: Path) -> None:
    """In whole groups, also where there is an odd number of them."""
    stored, _ = save_experts(tmp_path, name, moe_intermediate_size=size)
    architecture = architecture_of(stored)
    whole, *ranks = (load(architecture.of_rank(shard), stored) for shard in (Shard(), Shard(0, 2), Shard(1, 2)))
    ups = [matrices(weights, "gate_up").chunk(2, 1)[1] for weights in ranks]
    assert torch.equal(torch.cat(ups, 1), matrices(whole, "gate_up").chunk(2, 1)[1])
    assert torch.equal(torch.cat([matrices(weights, "down") for weights in ranks], 2), matrices(whole, "down"))


def test_a_ranks_part_is_rounded_in_groups_that_divide_it(tmp_path: Path) -> None:
    """192 columns are in groups of 64, and half of them in groups of 32."""
    folder = save_checkpoint(tmp_path, "Qwen3MoeForCausalLM", **SIZES | {"moe_intermediate_size": 192})
    architecture = architecture_of(folder, quantization="int4")
    floats = stacked(load_file(folder / "model.safetensors"), "down_proj")
    for rank in range(2):
        weights = load(architecture.of_rank(Shard(rank, 2)), folder)
        part = floats[:, :, 96 * rank : 96 * (rank + 1)]
        expected = torch.stack([dequantise(quantise(weight, Format("int4", (1, 32)))) for weight in part])
        assert torch.equal(matrices(weights, "down"), expected)


def test_experts_that_are_stored_in_different_ways_are_dequantised(tmp_path: Path) -> None:
    stored, meant = save_experts(tmp_path, "awq-g32")
    tensors, truth = load_file(stored / "model.safetensors"), load_file(meant / "model.safetensors")
    odd = "model.layers.1.mlp.experts.2.down_proj"
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(odd)}
    save_file({**tensors, f"{odd}.weight": truth[f"{odd}.weight"]}, stored / "model.safetensors")
    weights = load(architecture_of(stored), stored)
    assert experts_of(weights).down.format.codes == "plain" and experts_of(weights, 0).down.format.codes == "int4"
    assert torch.equal(experts_of(weights).down.weight, stacked(truth, "down_proj"))


@pytest.mark.parametrize("name", ONLINE)
def test_experts_are_rounded_while_they_are_read_however_they_are_stored(name: str, tmp_path: Path) -> None:
    one_by_one = save_checkpoint(tmp_path / "published", "Qwen3MoeForCausalLM", **SIZES)
    model = AutoModelForCausalLM.from_pretrained(one_by_one, dtype=torch.float32)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    tensors = load_file(one_by_one / "model.safetensors")
    for folder in (one_by_one, tmp_path / "fused"):
        weights = load(architecture_of(folder, quantization=name), folder)
        for part, modules in (("gate_up", ("gate_proj", "up_proj")), ("down", ("down_proj",))):
            floats = torch.cat([stacked(tensors, module) for module in modules], 1)
            expected = torch.stack([dequantise(quantise(weight, ONLINE[name])) for weight in floats])
            assert torch.equal(matrices(weights, part), expected)


@pytest.mark.parametrize("name", ONLINE)
def test_gpt_oss_of_floats_is_rounded_too(name: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "head_dim": 16}
    folder = save_checkpoint(tmp_path, "GptOssForCausalLM", num_hidden_layers=2, num_experts_per_tok=2, **sizes)
    weights = load(architecture_of(folder, quantization=name), folder)
    tensors = load_file(folder / "model.safetensors")
    for part in ("gate_up", "down"):
        floats = tensors[f"model.layers.1.mlp.experts.{part}_proj"].transpose(1, 2)
        expected = torch.stack([dequantise(quantise(weight, ONLINE[name])) for weight in floats])
        assert torch.equal(matrices(weights, part), expected)
        bias = getattr(experts_of(weights), part).bias
        assert torch.equal(bias, tensors[f"model.layers.1.mlp.experts.{part}_proj_bias"])


@pytest.mark.parametrize("name", ["fp8-block", "awq-g32"])
def test_random_weights_fill_packed_experts(name: str, tmp_path: Path) -> None:
    stored, _ = save_experts(tmp_path, name)
    architecture = architecture_of(stored, load_format="dummy")
    weights = allocate_weights(architecture, torch.float32, CPU)
    randomise_weights(weights, architecture, seed=0)
    for part in ("gate_up", "down"):
        found = matrices(weights, part)
        assert found.std() == pytest.approx(architecture.initializer_range, rel=0.2)
        assert not torch.equal(found[0], found[1])


def test_an_experts_scale_that_is_no_number_is_named(tmp_path: Path) -> None:
    stored, _ = save_experts(tmp_path, "fp8-block")
    tensors = load_file(stored / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, stored / "model.safetensors")
    with pytest.raises(EngineError, match=rf"{name.replace('.', '[.]')} holds scales that are not finite"):
        load(architecture_of(stored), stored)
