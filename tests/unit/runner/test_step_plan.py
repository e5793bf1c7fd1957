"""Where everything of a step lies, and that padding changes nothing: a step computed in a larger shape leaves the
logits, pages and rows of the exact one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paged_backend.batch import Batch, Drafts
from paged_backend.models.step import StepShape
from paged_backend.runner import model_runner
from paged_backend.runner.cuda_graphs import captured_shapes, decode_sizes
from paged_backend.runner.step_plan import array_lengths, plan_of_padding, plan_size, plan_step, shape_of
from tests.oracle import random_prompts, save_checkpoint
from tests.runner_driver import Driver, load_runner


def batch(counts: Sequence[int], samples: Sequence[bool] | None = None, starts: Sequence[int] | None = None) -> Batch:
    n = len(counts)
    return Batch(
        step=1,
        rows=np.arange(n, dtype=np.int32) + 10,
        starts=np.array(starts or [100 + i for i in range(n)], np.int32),
        counts=np.array(counts, np.int32),
        samples=np.array(samples or [True] * n),
        request_ids=np.arange(n),
    )


def test_decodes_come_first_and_results_find_their_way_back() -> None:
    plan = plan_step(batch([5, 1, 3, 1], [True, True, False, True]), StepShape(2, 2, 8))
    s = array_lengths(plan.shape)
    parts = dict(zip(s, np.split(plan.flat, np.cumsum(list(s.values()))[:-1]), strict=True))
    assert parts["rows"].tolist() == [11, 13, 10, 12, -1]
    assert parts["starts"].tolist() == [101, 103, 100, 102, 0]
    assert parts["counts"].tolist() == [1, 1, 5, 3, 0]
    assert parts["query_starts"].tolist() == [0, 1, 2, 7, 10, 10]
    assert parts["logit_indices"].tolist() == [0, 1, 6, 9]
    assert parts["sample_rows"].tolist() == [11, 13, 10, -1]
    assert plan.output_indices.tolist() == [2, 0, 1]
    assert plan.prefill_lens == ((5, 105), (3, 105))
    assert (plan.max_decode_len, plan.max_len) == (104, 105)


def test_drafts_are_decodes_right_behind_their_row() -> None:
    """Two rows with drafts, one whose length only the device knows, beside a prompt and a plain decode."""
    drafts = Drafts(np.array([2, 0, 1, 0], np.int32), np.array([0, 0, 3, 0], np.int32))
    ragged = replace(batch([3, 5, 2, 1], [True, True, True, False]), drafts=drafts)
    assert shape_of(ragged) == StepShape(6, 1, 5, drafts=True)
    unsure = replace(ragged, drafts=Drafts(np.zeros(4, np.int32), drafts.unsure))
    assert shape_of(unsure) == StepShape(1, 3, 10), "lengths that only the device knows are no drafts"
    plan = plan_step(ragged, StepShape(7, 1, 8))
    s = array_lengths(plan.shape)
    parts = dict(zip(s, np.split(plan.flat, np.cumsum(list(s.values()))[:-1]), strict=True))
    assert parts["rows"].tolist() == [10, 10, 10, 12, 12, 13, -1, 11, -1]
    assert parts["starts"].tolist() == [100, 101, 102, -1, -2, 103, 0, 101, 0]
    assert parts["counts"].tolist() == [1, 1, 1, 1, 1, 1, 1, 5, 3]
    assert parts["sample_rows"].tolist() == [10, 10, 10, 12, 12, -1, -1, 11]
    assert plan.output_indices.tolist() == [0, 1, 2, 7, 3, 4]
    assert plan.first_outputs.tolist() == [0, 7, 3]
    assert plan.firsts.tolist() == [0, 7, 3, 5]
    assert (plan.max_decode_len, plan.max_len) == (104, 106)


def test_padding_takes_what_is_left() -> None:
    plan = plan_step(batch([4, 1]), StepShape(3, 2, 9))
    s = array_lengths(plan.shape)
    parts = dict(zip(s, np.split(plan.flat, np.cumsum(list(s.values()))[:-1]), strict=True))
    assert parts["rows"].tolist() == [11, -1, -1, 10, -1, -1]
    assert parts["counts"].tolist() == [1, 1, 1, 4, 0, 5]
    assert parts["query_starts"].tolist() == [0, 1, 2, 3, 7, 7, 12]
    assert parts["sample_rows"].tolist() == [11, -1, -1, 10, -1]
    assert plan.output_indices.tolist() == [3, 0]


@pytest.mark.parametrize("shape", [StepShape(1), StepShape(7), StepShape(0, 8, 128), StepShape(16, 8, 512)], ids=str)
def test_a_plan_of_padding_is_that_of_no_sequences(shape: StepShape) -> None:
    flat = plan_of_padding(shape)
    assert flat.shape == (plan_size(shape),)
    lengths = array_lengths(shape)
    parts = dict(zip(lengths, np.split(flat, np.cumsum(list(lengths.values()))[:-1]), strict=True))
    assert (parts["rows"] == -1).all()
    assert (parts["sample_rows"] == -1).all()
    assert parts["query_starts"][-1] == shape.num_tokens == parts["counts"].sum()
    assert ((parts["logit_indices"] >= 0) & (parts["logit_indices"] < shape.num_tokens)).all()


@pytest.mark.parametrize("max_sequences", [1, 2, 5, 64, 100, 256, 1000])
def test_every_number_of_decodes_has_a_shape_with_little_padding(max_sequences: int) -> None:
    sizes = decode_sizes(max_sequences)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_sequences
    for number in range(1, max_sequences + 1):
        size = next(size for size in sizes if size >= number)
        assert size - number <= max(4, size / 4) + 3
    shapes = captured_shapes(max_sequences, 4096)
    assert [shape.num_decodes for shape in shapes if not shape.num_prefills] == sizes
    assert StepShape(max_sequences, 8, 1024) in shapes
    assert all(shape.num_prefill_tokens <= 200 for shape in captured_shapes(max_sequences, 200))
    both = captured_shapes(max_sequences, 4096, adapters=True)
    assert both[: len(shapes)] == shapes and not any(shape.adapted for shape in shapes)
    assert both[len(shapes) :] == [replace(shape, adapted=True) for shape in shapes]


@pytest.mark.parametrize("max_sequences", [1, 2, 5, 64, 256])
def test_steps_with_drafts_have_shapes_of_their_own_where_drafts_are_packed(max_sequences: int) -> None:
    shapes = captured_shapes(max_sequences, 4096, num_drafts=4, packs_runs=True)
    assert [shape for shape in shapes if not shape.drafts] == captured_shapes(max_sequences, 4096)
    drafting = [shape for shape in shapes if shape.drafts]
    assert [shape.num_decodes for shape in drafting] == decode_sizes(5 * min(max_sequences, 16))[1:]
    assert not any(shape.num_prefills for shape in drafting)
    assert shapes == sorted(shapes, key=lambda shape: shape.num_tokens)
    assert not any(shape.drafts for shape in captured_shapes(max_sequences, 4096, num_drafts=4))


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_tokens_of_padded_steps_equal_those_of_exact_ones(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint(tmp_path, architecture)
    prompts = random_prompts((1, 5, 16, 33, 2, 70))
    exact = Driver(load_runner(folder)).generate(prompts, 12, chunk=9, arrive_every=2)

    def roomier(batch: Batch) -> StepShape:
        shape = shape_of(batch)
        return StepShape(shape.num_decodes + 3, shape.num_prefills + 2, shape.num_prefill_tokens + 11)

    monkeypatch.setattr(model_runner, "shape_of", roomier)
    assert Driver(load_runner(folder)).generate(prompts, 12, chunk=9, arrive_every=2) == exact
