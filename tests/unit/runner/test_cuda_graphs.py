"""Captured steps on a CPU: a graph that does its work again when it is replayed stands for the device's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from paged_backend.models.step import StepShape
from paged_backend.runner.cuda_graphs import DeviceCapture, Graph, StepGraphs, captured_shapes, first_shapes
from paged_backend.runner.later_captures import LaterCaptures
from paged_backend.runner.model_runner import ModelRunner
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.runner_driver import Driver, load_runner

T = TypeVar("T")
GRAPHS_OF_A_SHAPE = 4  # forward pass, and three kinds of sampling
DECODES = [StepShape(size) for size in (1, 2, 4, 8, 16, 64)]


class Latest:
    """What the last replay left."""

    found: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.found, name)


class Repeated:
    """What was captured, as a function that computes it again."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self.result = work, Latest()
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        self.result.found = self._work()


class RepeatingCapture:
    """As on a device, capturing computes nothing."""

    def __init__(self) -> None:
        self.graphs: list[Repeated] = []
        self.error: RuntimeError | None = None

    def __call__(self, work: Callable[[], T]) -> tuple[Graph, Any]:
        if self.error is not None:
            raise self.error
        self.graphs.append(Repeated(work))
        return self.graphs[-1], self.graphs[-1].result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"), "Qwen3ForCausalLM", head_dim=16)


def graphs_of(runner: ModelRunner, shapes: list[StepShape], capture: RepeatingCapture) -> StepGraphs:
    logits = torch.empty(max(shape.num_outputs for shape in shapes), runner.architecture.num_logits)
    graphs = StepGraphs(
        runner._decoder,
        runner._sampler,
        runner._kv_pages,
        runner._rows,
        shapes,
        runner.limits.max_model_len,
        logits,
        capture,
    )
    runner._graphs = graphs
    return graphs


@pytest.fixture
def runner(folder: Path) -> ModelRunner:
    return load_runner(folder, max_num_sequences=64, max_model_len=256)


@torch.inference_mode()
def test_the_tokens_are_the_same_however_much_is_captured(folder: Path, runner: ModelRunner) -> None:
    prompts = random_prompts((3, 16, 40, 7, 9))
    wanted = Oracle(folder).greedy(prompts, 12)
    capture = RepeatingCapture()
    graphs = graphs_of(runner, DECODES, capture)
    graphs.run_all(lambda sentence: None)
    assert Driver(runner).generate(prompts, 12, arrive_every=2) == wanted
    assert not any(graph.num_replays for graph in capture.graphs)
    graphs.capture(first_shapes(DECODES))
    while True:
        before = sum(graph.num_replays for graph in capture.graphs)
        assert Driver(runner).generate(prompts, 12, arrive_every=2) == wanted
        assert sum(graph.num_replays for graph in capture.graphs) > before
        if not all(graphs.capture_next() for _ in range(5)):  # and the next shape's first
            break
    assert len(capture.graphs) == GRAPHS_OF_A_SHAPE * len(DECODES)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("max_sequences", [1, 2, 256, 1024])
def test_first_come_the_largest_shape_of_each_kind_and_those_of_few_decodes(max_sequences: int, adapters: bool) -> None:
    shapes = captured_shapes(max_sequences, 2048, adapters)
    for adapted in (False, True) if adapters else (False,):
        first = [shape for shape in first_shapes(shapes) if shape.adapted == adapted]
        assert first[0].num_tokens == max(shape.num_tokens for shape in shapes if shape.adapted == adapted)
        assert first[0].num_outputs == max(shape.num_outputs for shape in shapes)
        assert {shape.num_decodes for shape in first[1:]} == {size for size in (1, 2, 4, 8) if size <= max_sequences}
        assert len(set(first)) == len(first)


def test_a_step_runs_padded_only_up_to_four_times_its_tokens(runner: ModelRunner) -> None:
    graphs = graphs_of(runner, DECODES, RepeatingCapture())
    graphs.capture([StepShape(64)])
    assert graphs.fit(StepShape(16)) == StepShape(64)
    assert graphs.fit(StepShape(8)) is None
    assert graphs.fit(StepShape(65)) is None
    graphs.capture([StepShape(8)])
    assert graphs.fit(StepShape(5)) == StepShape(8)


def test_a_step_with_drafts_runs_in_any_shape_and_others_in_none_for_drafts(runner: ModelRunner) -> None:
    shapes = captured_shapes(8, 16, num_drafts=1, packs_runs=True)
    graphs = graphs_of(runner, shapes, RepeatingCapture())
    graphs.capture([StepShape(16, drafts=True)])
    assert graphs.fit(StepShape(6)) is None
    assert graphs.fit(StepShape(6, drafts=True)) == StepShape(16, drafts=True)
    graphs.capture([StepShape(8)])
    assert graphs.fit(StepShape(6)) == graphs.fit(StepShape(6, drafts=True)) == StepShape(8)
    graphs.capture([StepShape(8, drafts=True)])
    assert graphs.fit(StepShape(6, drafts=True)) == StepShape(8, drafts=True)
    assert graphs.fit(StepShape(6)) == StepShape(8)


def test_the_shape_that_a_step_asks_for_is_captured_next(runner: ModelRunner) -> None:
    graphs = graphs_of(runner, DECODES, RepeatingCapture())
    graphs.capture(first_shapes(DECODES)[:1])
    assert graphs.fit(StepShape(11)) == StepShape(64)
    for _ in range(GRAPHS_OF_A_SHAPE):
        assert graphs.capture_next()
    assert graphs.fit(StepShape(11)) == StepShape(16)
    assert graphs.fit(StepShape(2)) is None


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class SlowCapture(RepeatingCapture):
    """Takes 30 ms of a clock's time."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def __call__(self, work: Callable[[], T]) -> tuple[Graph, Any]:
        self._clock.now += 0.03
        return super().__call__(work)


def test_while_sequences_run_captures_take_a_fifth_of_the_time_one_graph_at_a_time(runner: ModelRunner) -> None:
    clock, told = Clock(), []
    capture = SlowCapture(clock)
    later = LaterCaptures(graphs_of(runner, DECODES, capture), told.append, clock)
    begun = clock.now
    while not later.done:
        before, count = clock.now, len(capture.graphs)
        later.advance(busy=True)
        assert len(capture.graphs) - count <= 1
        assert clock.now - before <= 0.03 + 1e-9
        clock.now += 0.004  # a step
    busy = clock.now - begun
    assert 0.03 * len(capture.graphs) / busy == pytest.approx(0.2, abs=0.03)
    assert len(told) == 1
    assert told[0].startswith("all shapes of steps captured: 6 while serving, 24 graphs in 0.7 s")
    assert told[0].endswith("none longer than 30 ms")


def test_an_idle_engine_captures_without_a_pause(runner: ModelRunner) -> None:
    clock = Clock()
    later = LaterCaptures(graphs_of(runner, DECODES, SlowCapture(clock)), lambda sentence: None, clock)
    assert [later.advance(busy=False) for _ in range(GRAPHS_OF_A_SHAPE * len(DECODES) + 1)].count(True) == 24
    assert later.done
    assert not later.advance(busy=False)


def test_what_memory_does_not_suffice_for_is_told_and_left(
    runner: ModelRunner, caplog: pytest.LogCaptureFixture
) -> None:
    capture = RepeatingCapture()
    graphs = graphs_of(runner, DECODES, capture)
    later = LaterCaptures(graphs, lambda sentence: None)
    for _ in range(GRAPHS_OF_A_SHAPE):
        assert later.advance(busy=False)
    capture.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore words")
    assert not later.advance(busy=False)
    assert later.done
    assert "5 shapes of steps are not captured (CUDA out of memory. Tried to allocate 2 GiB.)" in caplog.text
    assert graphs.fit(StepShape(1)) == StepShape(1)
    assert graphs.fit(StepShape(2)) is None


def test_a_fault_in_a_capture_is_logged_with_its_place_and_ends_nothing(
    runner: ModelRunner, caplog: pytest.LogCaptureFixture
) -> None:
    capture = RepeatingCapture()
    capture.error = RuntimeError("operation not permitted when stream is capturing")
    later = LaterCaptures(graphs_of(runner, DECODES, capture), lambda sentence: None)
    assert not later.advance(busy=True)
    assert later.done
    assert "6 shapes of steps are not captured (operation not permitted" in caplog.text
    assert "Traceback" in caplog.text


class BrokenGraph:
    """Of a capture that a fault has made invalid: it cannot be ended well."""

    ended = 0

    def capture_begin(self, **options: Any) -> None:
        pass

    def capture_end(self) -> None:
        BrokenGraph.ended += 1
        raise RuntimeError("operation failed due to a previous error during capture")


def test_of_a_capture_that_fails_its_first_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = DeviceCapture.__new__(DeviceCapture)  # without a device
    capture._pool, capture._stream = (0, 0), None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", BrokenGraph)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)

    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        capture(fails)
    assert BrokenGraph.ended == 1
    with pytest.raises(RuntimeError, match="previous error"):  # nothing hides what only the end tells
        capture(lambda: None)
