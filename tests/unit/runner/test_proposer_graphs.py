"""Captured proposers on a CPU: a graph that does its work again when it is replayed stands for the device's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from paged_backend.models.step import StepShape, StepTensors
from paged_backend.runner.cuda_graphs import StepGraphs
from paged_backend.runner.model_runner import ModelRunner
from paged_backend.runner.proposer import Proposer
from paged_backend.runner.proposer_graphs import ProposalGraphs
from paged_backend.runner.step_tensors import DeviceRows
from tests.drafts_heard import Listener, sizes
from tests.e2e.test_eagle3 import Definition, save_head
from tests.engine_answers import answers, load
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.unit.runner.test_cuda_graphs import RepeatingCapture

SHAPES = [StepShape(size) for size in (1, 4, 8, 16, 40)]  # prompts are computed without
GRAPHS_OF_A_SHAPE = 5  # forward pass, three kinds of sampling, what the proposer does
TAPS = (1, 2, 3)


@torch.inference_mode()
def capture_all(runner: ModelRunner, capture: RepeatingCapture) -> None:
    """What ModelRunner.capture does on a device."""
    proposer = runner._proposer
    assert proposer is not None
    logits = torch.empty(max(shape.num_outputs for shape in SHAPES), runner.architecture.num_logits)
    parts = runner._decoder, runner._sampler, runner._kv_pages, runner._rows
    graphs = StepGraphs(*parts, SHAPES, runner.limits.max_model_len, logits, capture)
    graphs.capture_also(proposer.observe)
    graphs.run_all(lambda sentence: None)
    graphs.capture(SHAPES[::-1])
    runner._graphs = graphs
    proposals = ProposalGraphs(proposer, runner._rows, capture)
    proposals.capture()
    runner._rows.propose_with(proposals.propose)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("target"), "Qwen3ForCausalLM", head_dim=32, num_hidden_layers=6)


@pytest.mark.parametrize("kind", ["draft", "eagle3"])
def test_drafts_are_the_same_in_captured_steps(folder: Path, tmp_path: Path, kind: str) -> None:
    numbers = {"eagle_aux_hidden_state_layer_ids": list(TAPS)}
    draft_model = folder if kind == "draft" else save_head(tmp_path / "head", len(TAPS), **numbers)
    prompts = [*random_prompts([3, 16, 40]), np.arange(9, dtype=np.int32)]
    wanted = Oracle(folder).greedy(prompts, 20)
    engine = load(folder, tmp_path, speculation=kind, draft_model=str(draft_model), **sizes(prefix_cache=False))
    capture = RepeatingCapture()
    capture_all(engine._runner, capture)  # type: ignore[arg-type]
    listener = Listener(engine)
    assert answers(engine, prompts, max_tokens=20, ignore_eos=True) == wanted
    replays = [graph.num_replays for graph in capture.graphs]
    of_shapes, of_drafts = replays[: GRAPHS_OF_A_SHAPE * len(SHAPES)], replays[GRAPHS_OF_A_SHAPE * len(SHAPES) :]
    assert sum(of_shapes[::GRAPHS_OF_A_SHAPE]) == sum(of_shapes[GRAPHS_OF_A_SHAPE - 1 :: GRAPHS_OF_A_SHAPE]) > 0
    assert 0 < sum(of_drafts) <= sum(of_shapes[::GRAPHS_OF_A_SHAPE])
    stats = engine.stats()
    if kind == "draft":
        assert stats.drafts_accepted == stats.drafts_proposed > 50
        return
    definition = Definition(folder, draft_model, TAPS)
    assert all(drafts == definition.guesses(text, len(drafts)) for text, drafts in listener.heard)


class Counting(Proposer):
    """Notes for how many rows it was asked."""

    def __init__(self) -> None:
        super().__init__([])
        self.asked: list[int] = []

    def observe(self, step: StepTensors) -> None:
        raise AssertionError("no step was computed")

    def propose(self, token_ids: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor) -> None:
        self.asked.append(len(rows))


@pytest.mark.parametrize(
    ("num_rows", "largest_first"),
    [(1, [1]), (2, [2, 1]), (3, [3, 2, 1]), (8, [8, 4, 2, 1]), (16, [16, 8, 4, 2, 1]), (1024, [16, 8, 4, 2, 1])],
)
def test_drafts_are_captured_for_no_more_rows_than_run_at_once(num_rows: int, largest_first: list[int]) -> None:
    """Scratch memory of kernels and their plans hold the rows of steps, and no step has more."""
    rows = DeviceRows(num_rows, 16, 4, 0, torch.device("cpu"))
    proposer, capture = Counting(), RepeatingCapture()
    rows.speculate(proposer.propose, 3)
    graphs = ProposalGraphs(proposer, rows, capture)
    graphs.capture()
    assert proposer.asked == largest_first and len(capture.graphs) == len(largest_first)
    assert rows.lengths is not None
    for count in range(1, min(num_rows, 16) + 1):
        graphs.propose(rows.token_ids, rows.lengths, torch.arange(count), torch.ones(count))
        assert count <= proposer.asked[-1] < 2 * count
