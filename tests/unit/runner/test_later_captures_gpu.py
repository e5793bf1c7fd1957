"""Graphs that are captured on CUDA while the steps launched before are still computed there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paged_backend.batch import Batch
from paged_backend.config import EngineConfig
from paged_backend.request import SamplingParams
from paged_backend.runner.builder import build_runner
from tests.oracle import random_prompts, save_checkpoint
from tests.runner_driver import GREEDY, Driver, load_runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(top_p=0.9)], ids=["greedy", "top_p"])
def test_a_capture_behind_every_step_changes_no_token(tmp_path: Path, sampling: SamplingParams) -> None:
    folder = save_checkpoint(tmp_path, "Qwen3ForCausalLM", head_dim=16)
    sizes: dict[str, Any] = {"num_pages": 256, "max_num_sequences": 24, "max_model_len": 256, "max_batched_tokens": 128}
    prompts = random_prompts((3, 16, 40, 7, 9, 100, 1, 33, 64, 5, 18))
    asked: dict[str, Any] = {"max_tokens": 12, "sampling": sampling, "chunk": 50, "arrive_every": 2, "steps_ahead": 1}
    wanted = Driver(load_runner(folder, device="cuda", cuda_graphs=False, **sizes), num_rows=24).generate(
        prompts, **asked
    )
    config = EngineConfig(model=str(folder), device="cuda", dtype="float32", **sizes)
    runner = build_runner(config, lambda sentence: None, captures_later=True)
    later, launch = runner.later, runner.launch
    assert later is not None and runner._graphs is not None

    def launch_and_capture(batch: Batch) -> None:
        launch(batch)
        later.advance(busy=False)

    runner.launch = launch_and_capture  # type: ignore[method-assign]
    for _ in range(40):
        assert Driver(runner, num_rows=24).generate(prompts, **asked) == wanted
        if later.done:
            break
    assert all(captured.forward is not None for captured in runner._graphs._steps.values())
    assert Driver(runner, num_rows=24).generate(prompts, **asked) == wanted
