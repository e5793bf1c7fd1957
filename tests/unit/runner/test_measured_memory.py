"""The largest steps are run before the pool is there; what is read then is a GPU's memory, so a meter that was told its
readings stands in for it here.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.models.step import LayerPages, StepShape
from paged_backend.runner import builder, measured_memory
from paged_backend.runner.builder import RunnerBuilder
from paged_backend.runner.cuda_graphs import captured_shapes
from paged_backend.runner.kv_store import MemoryNeeds
from paged_backend.runner.measured_memory import NUM_PAGES, measure, run_largest, samples_of
from paged_backend.runner.model_runner import ModelRunner
from tests.oracle import save_checkpoint
from tests.runner_driver import load_runner

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"), "LlamaForCausalLM")


class ToldMeter:
    """Of the steps, then of the captured ones."""

    readings = [(1000, (600, 50)), (0, (70, 30))]

    def __init__(self, device: torch.device) -> None:
        self._peak, self._kept = self.readings[len(made)]
        made.append(self)

    def peak(self) -> int:
        return self._peak

    def kept(self) -> tuple[int, int]:
        return self._kept


made: list[ToldMeter] = []


@pytest.fixture(autouse=True)
def _told(monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()
    monkeypatch.setattr(measured_memory, "MemoryMeter", ToldMeter)


def test_the_largest_steps_run_on_two_pages_whatever_the_length(folder: Path) -> None:
    runner = load_runner(folder, num_pages=64, max_num_sequences=6, max_batched_tokens=90, page_size=16)
    assert runner.limits.max_model_len > NUM_PAGES * 16
    runner._kv_pages = [LayerPages(pages.tensor[:NUM_PAGES].clone()) for pages in runner._kv_pages]
    run_largest(runner, 90)  # an index beyond them would raise
    assert all(pages.tensor[0].any() for pages in runner._kv_pages)


@pytest.mark.parametrize("num_shapes", [0, 20])
def test_needs_are_what_was_read_and_the_runner_is_gone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, num_shapes: int
) -> None:
    captured: list[list[StepShape]] = []
    monkeypatch.setattr(ModelRunner, "capture", lambda self, shapes, tell: captured.append(shapes))
    runners: list[weakref.ref[ModelRunner]] = []

    def make() -> ModelRunner:
        runner = load_runner(folder, num_pages=8, max_num_sequences=2, max_batched_tokens=20)
        runners.append(weakref.ref(runner))
        return runner

    shapes = [StepShape(number + 1) for number in range(num_shapes)]
    needs = measure(make, 20, shapes, CPU)
    gc.collect()
    assert [runner() for runner in runners] == [None]
    step = 1000 + 50 + 3 * 2 * 2**20  # the model has 3 layers, each rounded up to torch's blocks
    if num_shapes:
        assert needs == MemoryNeeds(step=step, graphs=70 + 30 * 20 // 5)
        assert captured == [samples_of(shapes)]
    else:
        assert needs == MemoryNeeds(step=step)
        assert not captured


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize(("max_sequences", "max_tokens"), [(256, 2048), (1, 1), (4096, 8192)])
def test_samples_have_the_most_tokens_and_outputs_of_all_shapes(
    max_sequences: int, max_tokens: int, adapters: bool
) -> None:
    """Else captured steps could outgrow the memory that was measured."""
    shapes = captured_shapes(max_sequences, max_tokens, adapters)
    samples = samples_of(shapes)
    assert len(samples) == min(len(shapes), 5)
    assert samples[0] == shapes[0]
    for size in ("num_tokens", "num_outputs", "adapted"):
        assert max(getattr(shape, size) for shape in samples) == max(getattr(shape, size) for shape in shapes)


def make_builder(folder: Path, told: list[str], **options: Any) -> RunnerBuilder:
    config = EngineConfig(model=str(folder), device="cpu", **options)
    return RunnerBuilder(config, told.append, open_checkpoint(config))


def test_what_cannot_fit_is_refused_before_the_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    monkeypatch.setattr(builder, "load_weights", lambda *arguments: read.append(arguments))
    with pytest.raises(EngineError, match="the pool does not fit: .* pages"):
        make_builder(folder, [], num_pages=10**9).build()
    assert not read


def test_memory_that_is_not_there_after_all_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore words")

    monkeypatch.setattr(RunnerBuilder, "_measure", fail)
    with pytest.raises(
        EngineError,
        match=r"no memory for the largest step \(smaller with max_batched_tokens, max_num_sequences\): CUDA out of "
        r"memory[^\n]*$",
    ):
        make_builder(folder, [], num_pages=8).build()


def test_other_faults_of_a_step_stay_what_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(RunnerBuilder, "_measure", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        make_builder(folder, [], num_pages=8).build()


def test_every_phase_of_a_start_is_timed(folder: Path) -> None:
    made = make_builder(folder, [], num_pages=8)
    made.build()
    assert list(made.seconds) == ["weights", "largest step", "pool", "graphs", "warm-up"]
