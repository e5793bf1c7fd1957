"""The rows' state and a step's inputs: moves, so everything is exact."""

from __future__ import annotations

import pytest
import torch

from paged_kernels.row_update import gather_step, update_page_tables, write_spans, write_tokens

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
