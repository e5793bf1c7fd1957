"""The rows' state and a step's inputs: moves, so everything is exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from paged_kernels.reference import reference
from paged_kernels.row_update import (
    MOST_DRAFTS,
    accept_tokens,
    gather_step,
    update_page_tables,
    write_spans,
    write_tokens,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ints(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def numbered(rows: int, columns: int) -> torch.Tensor:
    return (torch.arange(rows * columns, dtype=torch.int32).view(rows, columns) + 1000).to(DEVICE)


@pytest.mark.parametrize("width", [20, 3000], ids=["short", "longer than a block"])
def test_spans_land_where_they_belong(width: int) -> None:
    target, values = numbered(4, width), torch.arange(2 * width, dtype=torch.int32, device=DEVICE)
    spans = [(2, 3, 5, width - 3), (0, 0, 1, 0), (-1, 0, 0, width), (3, width - 1, 0, 1), (1, 0, width, width)]
    expected = target.clone()
    for row, column, start, length in spans:
        if row >= 0:
            expected[row, column : column + length] = values[start : start + length]
    write_spans(target, ints(spans), values)
    assert torch.equal(target, expected)


def test_spans_convert_to_the_targets_type() -> None:
    target = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    write_spans(target, ints([(1, 1, 0, 2)]), ints([7, -8]))
    assert target.tolist() == [[0, 0, 0], [0, 7, -8]]


@pytest.mark.parametrize("count", [0, 1, 3, 1500])
def test_page_updates_change_only_their_entries(count: int) -> None:
    tables, generator = numbered(40, 50), torch.Generator().manual_seed(count)
    cells = torch.randperm(tables.numel(), generator=generator)[:count]
    updates = torch.stack((cells // 50, cells % 50, torch.arange(count)), dim=1).to(DEVICE, torch.int32)
    updates[2::5] = -1
    expected = tables.clone()
    kept = updates[updates[:, 0] >= 0].long()
    expected[kept[:, 0], kept[:, 1]] = kept[:, 2].int()
    update_page_tables(tables, updates)
    assert torch.equal(tables, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sampled_tokens_go_behind_their_rows(dtype: torch.dtype) -> None:
    history, num_tokens = torch.zeros(5, 9, dtype=torch.int32, device=DEVICE), ints([4, 1, 2, 8, 3])
    write_tokens(
        history,
        ints([3, -1, 0]),
        ints([8, 5, 4]),
        torch.tensor([11, 12, 13], device=DEVICE, dtype=dtype),
        num_tokens=num_tokens,
    )
    expected = torch.zeros_like(history)
    expected[3, 8], expected[0, 4] = 11, 13
    assert torch.equal(history, expected)
    assert num_tokens.tolist() == [5, 1, 2, 9, 3]
    write_tokens(history, ints([1]), ints([0]), torch.tensor([5], device=DEVICE, dtype=dtype))
    assert history[1, 0] == 5
    assert num_tokens[1] == 1


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_a_steps_inputs_come_from_its_rows(index_dtype: torch.dtype) -> None:
    page_size = 4
    history, page_tables = numbered(6, 700), numbered(6, 175)
    # decode, first token, padding, prefill of several blocks, chunk
    rows, starts, counts = [4, 0, -1, 5, 2], [10, 0, 33, 3, 640], [1, 1, 1, 600, 7]
    offsets = [0, 1, 2, 3, 603]
    num_tokens = sum(counts)
    input_ids, positions, slots = (torch.full((num_tokens,), -7, dtype=index_dtype, device=DEVICE) for _ in range(3))
    page_table = torch.full((5, 175), -7, dtype=torch.int32, device=DEVICE)
    seq_lens = torch.full((5,), -7, dtype=torch.int32, device=DEVICE)
    gather_step(
        ints(rows), ints(starts), ints(counts), ints(offsets), history, page_tables, page_size,
        input_ids=input_ids, positions=positions, slot_mapping=slots, page_table=page_table, seq_lens=seq_lens,
    )  # fmt: skip
    for index, (row, start, count, offset) in enumerate(zip(rows, starts, counts, offsets, strict=True)):
        mine = slice(offset, offset + count)
        if row < 0:
            assert (input_ids[mine].tolist(), positions[mine].tolist(), slots[mine].tolist(), int(seq_lens[index])) == (
                [0],
                [0],
                [-1],
                0,
            )
            continue
        at = torch.arange(start, start + count, device=DEVICE)
        assert torch.equal(positions[mine], at.to(index_dtype))
        assert torch.equal(input_ids[mine], history[row, at].to(index_dtype))
        assert torch.equal(
            slots[mine], (page_tables[row, at // page_size] * page_size + at % page_size).to(index_dtype)
        )
        assert seq_lens[index] == start + count
        pages = -(-(start + count) // page_size)
        assert torch.equal(page_table[index, :pages], page_tables[row, :pages])
        assert (page_table[index, pages:] == -7).all(), "an entry past the sequence's pages was written"


@pytest.mark.parametrize("gather", [gather_step, reference.gather_step], ids=["kernel", "reference"])
def test_where_only_the_device_knows_a_rows_length_it_counts_from_there(gather: Callable[..., None]) -> None:
    history, page_tables, lengths = numbered(4, 64), numbered(4, 8), ints([30, 20, 10, 1])
    # the newest token and two drafts behind it; a length that the host knows; padding
    rows, starts = [1, 1, 1, 2, -1], [-1, -2, -3, 5, 0]
    outputs = {name: ints([-7] * 5) for name in ("input_ids", "positions", "slot_mapping", "seq_lens")}
    outputs["page_table"] = torch.full((5, 8), -7, dtype=torch.int32, device=DEVICE)
    gather(ints(rows), ints(starts), ints([1] * 5), ints(range(5)), history, page_tables, 8, **outputs, lengths=lengths)
    at = [19, 20, 21, 5]
    assert outputs["positions"].tolist() == [*at, 0]
    assert outputs["seq_lens"].tolist() == [*(position + 1 for position in at), 0]
    assert outputs["input_ids"][:4].tolist() == [int(history[row, p]) for row, p in zip(rows, at, strict=False)]
    assert outputs["slot_mapping"][:4].tolist() == [
        int(page_tables[row, p // 8]) * 8 + p % 8 for row, p in zip(rows, at, strict=False)
    ]
    assert torch.equal(outputs["page_table"][2, :3], page_tables[1, :3])


def accepted_one_by_one(runs: list[tuple[int, list[int], list[int]]]) -> list[int]:
    """runs: a row, its drafts, the tokens sampled behind its newest token and each draft."""
    out: list[int] = []
    for row, drafts, sampled in runs:
        kept = 1
        while row >= 0 and kept < len(sampled) and drafts[kept - 1] == sampled[kept - 1]:
            kept += 1
        out += sampled if row < 0 else sampled[:kept] + [-1] * (len(sampled) - kept)
    return out


ACCEPT = pytest.mark.parametrize("accept", [accept_tokens, reference.accept_tokens], ids=["kernel", "reference"])


def assert_accepted(
    accept: Callable[..., torch.Tensor], runs: list[tuple[int, list[int], list[int]]], starts: list[int],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """starts: where each row's first token of the step goes."""
    num_rows = len(starts)
    rows = [row for row, _, sampled in runs for _ in sampled]
    sampled = [token for _, _, tokens in runs for token in tokens]
    inputs = [token for _, drafts, _ in runs for token in [9, *drafts]]
    positions = [starts[row] + place for row, _, tokens in runs for place in range(len(tokens))]
    history, lengths = torch.full((num_rows, 64), 99, dtype=torch.int32, device=DEVICE), ints([50] * num_rows)
    out = accept(
        history, lengths, ints(rows), ints(positions), torch.tensor(sampled, dtype=dtype, device=DEVICE), ints(inputs)
    )
    expected, wanted, lens = accepted_one_by_one(runs), torch.full_like(history, 99), [50] * num_rows
    for row, position, token in zip(rows, positions, expected, strict=True):
        if row >= 0 and token >= 0:
            wanted[row, position], lens[row] = token, position + 1
    real = torch.tensor([row >= 0 for row in rows], device=DEVICE)
    assert out[real].tolist() == [token for row, token in zip(rows, expected, strict=True) if row >= 0]
    assert torch.equal(history, wanted)
    assert lengths.tolist() == lens


@ACCEPT
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("seed", range(6))
def test_rows_get_their_tokens_up_to_the_first_wrong_draft(
    accept: Callable[..., torch.Tensor], dtype: torch.dtype, seed: int
) -> None:
    random = np.random.default_rng(seed)
    num_rows = 40
    runs = []
    for row in random.permutation(num_rows)[: 3 + 6 * seed].tolist():
        num_drafts = int(random.integers(0, MOST_DRAFTS + 1)) if seed else 0
        runs.append((row, random.integers(0, 2, num_drafts).tolist(), random.integers(0, 2, num_drafts + 1).tolist()))
    runs += [(-1, [], [0])] * 3  # padding
    assert_accepted(accept, runs, random.integers(1, 20, num_rows).tolist(), dtype)


@ACCEPT
def test_one_wrong_draft_ends_a_row_however_many_right_ones_are_behind_it(accept: Callable[..., torch.Tensor]) -> None:
    """Each of the most that a row may have, in turn; and a row of none but right ones."""
    sampled = [5] * (MOST_DRAFTS + 1)
    drafts = [[6 if place == wrong else 5 for place in range(MOST_DRAFTS)] for wrong in range(MOST_DRAFTS + 1)]
    assert_accepted(
        accept, [(row, of_row, sampled) for row, of_row in enumerate(drafts)], [3] * len(drafts), torch.int32
    )


@pytest.mark.gpu
def test_a_captured_graph_follows_the_step_it_is_given() -> None:
    history, page_tables = numbered(300, 64), numbered(300, 4)
    step = ints([[0, 0, 1, 0]] * 256).T.contiguous()  # rows, starts, counts, offsets
    outputs = {
        name: torch.zeros(256, dtype=torch.int32, device=DEVICE)
        for name in ("input_ids", "positions", "slot_mapping", "seq_lens")
    }
    outputs["page_table"] = torch.zeros(256, 4, dtype=torch.int32, device=DEVICE)
    updates = torch.full((64, 3), -1, dtype=torch.int32, device=DEVICE)

    def launch() -> None:
        update_page_tables(page_tables, updates, launch_pdl=True)
        gather_step(*step, history, page_tables, 16, **outputs, launch_pdl=True)
        write_tokens(history, step[0], outputs["seq_lens"], outputs["input_ids"], launch_pdl=True)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for seed in range(5):
        rows = torch.randperm(300, generator=torch.Generator().manual_seed(seed))[:256].int()
        starts = torch.randint(0, 63, (256,), generator=torch.Generator().manual_seed(seed)).int()
        step.copy_(
            torch.stack((rows, starts, torch.ones(256, dtype=torch.int32), torch.arange(256, dtype=torch.int32)))
        )
        updates[seed] = ints([rows[0], starts[0] // 16, 9000 + seed])
        graph.replay()
        torch.cuda.synchronize()
        r, s = rows.long().to(DEVICE), starts.long().to(DEVICE)
        assert torch.equal(outputs["slot_mapping"], page_tables[r, s // 16] * 16 + s.int() % 16)
        assert outputs["slot_mapping"][0] == (9000 + seed) * 16 + s[0] % 16
        assert torch.equal(history[r, s + 1], history[r, s])
