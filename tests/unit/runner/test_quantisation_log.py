"""What the log of a start says of a checkpoint's quantisation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from paged_backend.config import EngineConfig
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.models.weights import weight_bytes
from paged_backend.runner.builder import RunnerBuilder
from paged_backend.units import spell_bytes
from tests.oracle import save_checkpoint
from tests.quantised_checkpoints import SIZES
from tests.runner_driver import load_runner


@pytest.mark.parametrize(
    ("name", "format"),
    [("fp8", "fp8 per channel, activations rounded to fp8 per token"), ("int4", "int4 in groups of 128")],
)
def test_formats_and_that_a_cpu_dequantises_are_told(name: Literal["fp8", "int4"], format: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "Qwen3ForCausalLM", **SIZES)
    heard: list[str] = []
    load_runner(tmp_path, tell=heard.append, quantization=name)
    (line,) = [sentence for sentence in heard if sentence.startswith("quantization: ")]
    assert line.startswith(f"quantization: quantization={name}: {format}, rounded")
    assert line.endswith("; dequantised into float32 while loading: the CPU has no kernels for it")
    (loaded,) = [sentence for sentence in heard if sentence.startswith("weights: ")]
    assert "MiB loaded in" in loaded


def test_bytes_saved_are_told_where_numbers_stay_as_they_are_stored(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "Qwen3ForCausalLM", **SIZES)
    config = EngineConfig(model=str(tmp_path), device="cpu", dtype="bfloat16", quantization="int4")
    builder = RunnerBuilder(config, lambda sentence: None, open_checkpoint(config))
    quantization = builder._architecture.quantization
    assert quantization is not None and quantization.dequantised
    kept = replace(quantization, dequantised=False)
    builder._architecture = replace(builder._architecture, quantization=kept)
    plain, taken = (
        weight_bytes(replace(builder._architecture, quantization=each), torch.bfloat16) for each in (None, kept)
    )
    words = f"{spell_bytes(taken)} instead of {spell_bytes(plain)} in bfloat16, {spell_bytes(plain - taken)} saved"
    assert builder._about_quantization(kept).endswith(f"which costs quality; {words}")
    assert taken < plain / 2
