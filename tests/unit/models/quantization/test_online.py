"""quantization=fp8 and int4: a checkpoint of floats is rounded while it is read, and its tokens are those of a model
that is rounded so.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.models.shard import Cut
from paged_backend.models.weight_files import OpenTensors
from paged_backend.models.weights import allocate_weights, load_weights, randomise_weights, weight_bytes
from paged_kernels.codes import dequantise
from tests.oracle import random_prompts, save_checkpoint
from tests.quantised_checkpoints import SIZES, CompressedModel
from tests.runner_driver import Driver, load_runner
from tools.demo_model.quantised import quantise_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_tokens_equal_a_model_that_is_rounded_so(name: Literal["fp8", "int4"], tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "Qwen3ForCausalLM", **SIZES)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    quantise_model(model, name)
    heard: list[str] = []
    prompts = random_prompts((3, 20))
    assert Driver(load_runner(tmp_path, tell=heard.append, quantization=name)).generate(prompts, 6) == CompressedModel(
        model
    ).greedy(prompts, 6)
    assert [line for line in heard if line.startswith(f"quantization: quantization={name}: {name} ")]


@pytest.mark.parametrize(("name", "bits"), [("fp8", 8), ("int4", 4)])
def test_rounded_weights_are_near_and_take_fewer_bytes(name: str, bits: int, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "Qwen3ForCausalLM", dtype=torch.bfloat16, **SIZES)
    architecture = open_checkpoint(EngineConfig(model=str(tmp_path), quantization=name)).architecture  # type: ignore[arg-type]
    weights = allocate_weights(architecture, torch.bfloat16, CPU)
    load_weights(weights, tmp_path, lambda sentence: None)
    down = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].float()
    error = (dequantise(weights.layers[0].mlp.down) - down).norm() / down.norm()
    # rounding of 4 significant bits; of 15 steps to four deviations
    assert 0.3 * 2.0**-bits < error < {8: 0.04, 4: 0.15}[bits]
    assert weights.head.format.codes == "plain"
    saved = weight_bytes(replace(architecture, quantization=None), torch.bfloat16) - weights.num_bytes
    elements = sum(linear.num_rows * linear.num_columns for linear in weights.linears)
    assert saved == pytest.approx(elements * (2 - bits / 8), rel=0.1)  # scales take the rest


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "Qwen3ForCausalLM", **SIZES)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        EngineError, match=r"tensor model\.layers\.0\.mlp\.down_proj\.weight holds numbers that are not finite"
    ):
        load_runner(tmp_path, quantization="fp8")


def test_random_weights_are_rounded_too(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "Qwen3ForCausalLM", **SIZES)
    architecture = open_checkpoint(EngineConfig(model=str(tmp_path), quantization="int4")).architecture
    weights = allocate_weights(architecture, torch.float32, CPU)
    randomise_weights(weights, architecture, 0)
    down = dequantise(weights.layers[0].mlp.down)
    assert down.std() == pytest.approx(architecture.initializer_range, rel=0.1)
    assert len(down.unique()) > 100


def test_no_more_than_one_module_is_in_memory_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, "Qwen3ForCausalLM", **SIZES)
    alive: list[tuple[str, weakref.ref[torch.Tensor]]] = []
    most = 0
    read = OpenTensors.read

    def counted(tensors: OpenTensors, name: str, cut: Cut | None = None) -> torch.Tensor:
        nonlocal most
        tensor = read(tensors, name, cut)
        alive.append((name, weakref.ref(tensor)))
        most = max(most, len({name for name, reference in alive if reference() is not None}))
        return tensor

    monkeypatch.setattr(OpenTensors, "read", counted)
    load_runner(tmp_path, quantization="int4")
    assert (len(alive), most) == (2 * 7, 1)
