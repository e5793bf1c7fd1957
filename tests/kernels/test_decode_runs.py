"""Decodes of a sequence that are attended to together: its newest token and its drafts, against the float64 oracle, to
which each is a decode like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from paged_kernels.decode_attention import (
    DecodePlan,
    launch_constants,
    make_decode_workspace,
    packed_queries,
    paged_decode_attention,
    plan_decode_attention,
)
from paged_kernels.reference import reference
from tests.kernels.test_decode_attention import DEVICE, Case, Tensors, assert_close, attend, gpu, make, oracle, plan_for


@dataclass(frozen=True)
class Runs:
    """`sequences.lengths`: after their last decodes. num_decodes: of each sequence in the step."""

    sequences: Case
    num_decodes: tuple[int, ...]
    queries: int  # decodes of a run, at most

    @property
    def decodes(self) -> Case:
        """Each decode as a sequence of its own."""
        of_sequences = zip(self.sequences.lengths, self.num_decodes, strict=True)
        lengths = [max(length - behind, 0) for length, count in of_sequences for behind in range(count - 1, -1, -1)]
        return replace(self.sequences, lengths=tuple(lengths))


def make_runs(runs: Runs, seed: int) -> tuple[Tensors, torch.Tensor]:
    """A decode's row of the page table has the pages of its own tokens, and the others are of NaN. Returns the row of
    each decode, too: int32.
    """
    case, decodes = runs.sequences, runs.decodes
    window = case.window and case.window + max(runs.num_decodes) - 1
    tensors = make(replace(case, window=window), seed)
    counts = torch.tensor(runs.num_decodes)
    of_sequence = torch.repeat_interleave(torch.arange(len(counts)), counts)
    page_table = tensors.page_table[of_sequence.to(DEVICE)]
    poison = len(tensors.kv_pages) // 2
    for decode, length in enumerate(decodes.lengths):
        page_table[decode, -(-length // case.page_size) :] = poison
    lengths = torch.tensor(decodes.lengths, dtype=torch.int32)
    rows = torch.where(lengths > 0, 7 - of_sequence.to(torch.int32) % 8 + of_sequence.to(torch.int32) // 8 * 8, -1)
    q = torch.randn(len(lengths), *tensors.q.shape[1:], generator=torch.Generator().manual_seed(seed))
    made = replace(tensors, q=q.to(tensors.q), page_table=page_table, seq_lens=lengths.to(DEVICE))
    return made, rows.to(DEVICE)


def plan_of_runs(runs: Runs) -> DecodePlan:
    return plan_for(runs.sequences, sum(runs.num_decodes), runs.queries)


def small(lengths: tuple[int, ...], num_decodes: tuple[int, ...], queries: int, **options: object) -> Runs:
    return Runs(replace(Case(lengths, tile=16), **options), num_decodes, queries)  # type: ignore[arg-type]


TINY = {
    "one draft": small((20, 3), (2, 2), 2),
    "four drafts, at edges of pages and tiles": small((16, 17, 18, 20, 33, 5), (5, 5, 5, 5, 5, 5), 5, page_size=4),
    "seven drafts": small((40, 8), (8, 8), 8),
    "as many drafts as there may be": small((40, 16), (16, 16), 16),
    "one head to a KV head": small((37, 9), (5, 3), 5, num_q_heads=2),
    "four heads to a KV head": small((37, 9), (5, 3), 5, num_q_heads=8),
    "eight heads to a KV head": small((37, 9), (8, 3), 8, num_q_heads=8, num_kv_heads=1),
    "three heads to a KV head": small((37, 9), (5, 3), 5, num_q_heads=6),
    "fewer drafts than there may be": small((20, 33, 7, 50), (1, 5, 3, 2), 5),
    "padding": small((0, 20, 0, 9, 0), (3, 5, 1, 2, 4), 5),
    "only padding": small((0, 0), (3, 2), 5),
    "neighbours that go on with each other's lengths": small((9, 12, 15), (3, 3, 3), 5),
    "more drafts than are packed": small((50, 9, 20), (8, 4, 7), 3),
    "one sequence over all programs": small((200,), (5,), 5),
    "a piece behind the first decodes": small((197, 4), (5, 2), 5),
    "more sequences than programs": small((3, 20, 9, 33, 18, 7), (2, 5, 1, 4, 3, 5), 5, programs=1),
    "page of one token": small((7, 40), (4, 5), 5, page_size=1),
    "page larger than tile": small((70, 128), (5, 4), 5, page_size=64),
    "window": small((9, 26, 90, 34), (5, 5, 5, 3), 5, window=10),
    "window that ends within a tile": small((36, 52), (5, 5), 5, window=3, page_size=4),
    "pieces of a tile that some decodes see nothing of": small((50,), (8,), 8, window=30),
    "soft cap": small((5, 40), (3, 5), 5, soft_cap=0.5),
    "sinks": small((9, 40, 200), (2, 5, 5), 5, sinks=True),
    "sinks and window": small((133, 26, 129), (8, 5, 8), 8, sinks=True, window=114, num_q_heads=6),
    "sinks, and a first piece that some decodes see nothing of": small((50,), (8,), 8, sinks=True, window=30),
    "head_dim no power of two": small((9, 37), (5, 5), 5, head_dim=24),
    "K and V of 8 bits": small((9, 37, 64), (5, 5, 3), 5, kv_dtype=torch.float8_e4m3fn),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("runs", TINY.values(), ids=TINY.keys())
def test_each_decode_of_a_run_equals_float64(runs: Runs) -> None:
    tensors, rows = make_runs(runs, seed=1)
    case, plan = runs.decodes, plan_of_runs(runs)
    expected = oracle(case, tensors)
    assert_close(case, attend(case, tensors, plan, rows), expected)
    assert not plan.workspace.arrivals.any(), "an arrival counter was left set"
    options = tensors.scale, case.window or None, case.soft_cap or None, tensors.sinks
    twin = reference.decode_attention(
        tensors.q, tensors.kv_pages, tensors.page_table, tensors.seq_lens, max(case.lengths), *options
    )
    torch.testing.assert_close(twin.double(), expected, rtol=0, atol=1e-5)  # 200 terms of size one in float32


def test_a_sequence_lies_on_the_line_once() -> None:
    """Two of three and one tiles, of which the last is one with 17 tokens, instead of a line of every decode's."""
    runs = small((36, 33, 17), (5, 1, 4), 5)
    tensors, rows = make_runs(runs, seed=2)
    plan = plan_of_runs(runs)
    plan_decode_attention(tensors.seq_lens, plan, rows)
    assert plan.line[1] == 3 + 3 + 2
    # the last decode of each, how many of its run come before it, and its length
    found = [(run // 5, run % 5, length) for run, length in plan.records[:3].tolist()]
    assert found == [(4, 4, 36), (5, 0, 33), (9, 3, 17)]


def test_a_plan_of_runs_serves_steps_of_other_runs() -> None:
    plan = plan_of_runs(small((90,), (24,), 5))
    for seed, (lengths, counts) in enumerate([((90, 3, 0, 50), (5, 1, 2, 4)), ((5,), (1,)), ((0, 70), (1, 5))]):
        runs = small(lengths, counts, 5)
        tensors, rows = make_runs(runs, seed)
        assert_close(runs.decodes, attend(runs.decodes, tensors, plan, rows), oracle(runs.decodes, tensors))


def test_queries_and_outputs_may_be_strided() -> None:
    runs = small((20, 40), (3, 5), 5)
    tensors, rows = make_runs(runs, seed=3)
    packed = torch.full((8, 8, 16), float("nan"), device=DEVICE)
    packed[:, 2:6] = tensors.q
    out = torch.full((8, 5, 16), float("nan"), device=DEVICE)
    plan = plan_of_runs(runs)
    plan_decode_attention(tensors.seq_lens, plan, rows)
    paged_decode_attention(packed[:, 2:6], tensors.kv_pages, tensors.page_table, out[:, :4], plan, scale=tensors.scale)
    assert_close(runs.decodes, out[:, :4], oracle(runs.decodes, tensors))
    assert out[:, 4].isnan().all()


def test_rows_are_given_to_plans_of_runs_and_to_no_others() -> None:
    lengths = torch.ones(3, dtype=torch.int32, device=DEVICE)
    for queries, rows in ((5, None), (5, lengths[:2]), (1, lengths)):
        with pytest.raises(ValueError, match="queries to a run"):
            plan_decode_attention(lengths, plan_of_runs(small((9,), (5,), queries)), rows)


@pytest.mark.parametrize(
    ("group", "head_dim", "num_drafts", "expected"),
    [
        (4, 128, 0, 1),
        (4, 128, 4, 5),
        (8, 64, 7, 8),
        (1, 128, 15, 16),
        (8, 128, 15, 8),
        (16, 128, 4, 3),
        (20, 96, 4, 3),
        (32, 128, 1, 2),
        (48, 128, 4, 1),
        (8, 256, 4, 3),
        (64, 256, 4, 1),
    ],
)
def test_no_more_is_packed_than_a_tile_holds(group: int, head_dim: int, num_drafts: int, expected: int) -> None:
    assert packed_queries(group, head_dim, num_drafts) == expected


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 8, 16])
def test_float32_queries_of_runs_fit_beside_the_pipeline(group: int, head_dim: int, kv_dtype: torch.dtype) -> None:
    """As of other decodes: tiles on their way with their queries, a tile in the queries' type, and scores."""
    queries = packed_queries(group, head_dim, 7)
    workspace = make_decode_workspace(2 * group, 2, head_dim, kv_dtype, DEVICE, queries=queries)
    rows = launch_constants(workspace, 16, pairs=False)["ROWS"]
    stages = workspace.num_stages - (head_dim > 128 and kv_dtype == torch.bfloat16)
    on_their_way = (stages - 1) * (2 * workspace.tile * kv_dtype.itemsize + rows * 4) * head_dim
    converted = 4 * workspace.tile * head_dim if kv_dtype == torch.bfloat16 else 0
    assert on_their_way + converted + 4 * rows * workspace.tile <= 227 * 1024


SEVERAL = (9, 1000, 64, 65, 129, 0, 4097, 333, 5, 2048)
COUNTS = (5, 5, 4, 1, 3, 2, 5, 5, 2, 5)


def large(num_q_heads: int, num_kv_heads: int, head_dim: int, queries: int, **options: object) -> Runs:
    case = replace(Case(SEVERAL, num_q_heads, num_kv_heads, head_dim, dtype=torch.bfloat16), **options)  # type: ignore[arg-type]
    return Runs(case, tuple(min(count, queries) for count in COUNTS), queries)


LARGE = {
    **{f"{n - 1} drafts": large(32, 8, 128, n) for n in (2, 5, 8, 16)},
    **{f"{q}/{kv} heads": large(q, kv, 128, 5) for q, kv in ((8, 8), (28, 4), (64, 8), (24, 2))},
    **{f"head_dim {n}": large(32, 8, n, 5) for n in (64, 80, 96, 256)},
    **{f"page size {n}": large(32, 8, 128, 5, page_size=n) for n in (1, 8, 64, 128)},
    **{f"window {n}": large(32, 8, 128, 5, window=n) for n in (1, 100, 1024)},
    **{f"8 bits, head_dim {n}": large(32, 8, n, 5, kv_dtype=torch.float8_e4m3fn) for n in (64, 80, 128, 256)},
    "8 bits, many rows": large(64, 8, 128, 8, kv_dtype=torch.float8_e4m3fn),
    "8 bits, window": large(32, 8, 128, 5, window=100, kv_dtype=torch.float8_e4m3fn),
    "many rows": large(64, 8, 128, 8),
    "many rows of wide heads": large(16, 4, 256, 8),
    "float16": large(32, 8, 128, 5, dtype=torch.float16),
    "float32": large(8, 2, 128, 5, dtype=torch.float32),
    "float32, many rows": large(16, 2, 128, 8, dtype=torch.float32),
    "float32, 16 bits, many rows": large(16, 2, 128, 8, dtype=torch.float32, kv_dtype=torch.bfloat16),
    "float32, 16 bits, wide heads": large(8, 2, 256, 8, dtype=torch.float32, kv_dtype=torch.bfloat16),
    "soft cap": large(16, 8, 256, 5, soft_cap=2.0),
    "sinks": large(64, 8, 64, 5, sinks=True),
    "sinks and window": large(64, 8, 64, 5, sinks=True, window=128),
    "one long sequence": Runs(Case((65536,), 32, 8, 128, dtype=torch.bfloat16), (5,), 5),
}


@gpu
@pytest.mark.parametrize("runs", LARGE.values(), ids=LARGE.keys())
def test_each_decode_of_a_run_equals_float64_on_the_gpu(runs: Runs) -> None:
    tensors, rows = make_runs(runs, seed=5)
    assert_close(runs.decodes, attend(runs.decodes, tensors, plan_of_runs(runs), rows), oracle(runs.decodes, tensors))


@gpu
@pytest.mark.parametrize("launch_pdl", [False, True], ids=["one after the other", "overlapping"])
def test_a_captured_graph_follows_the_device_rows_and_lengths(launch_pdl: bool) -> None:
    """Of twenty decodes some are drafts, of one sequence or another, and some are padding."""
    plan = plan_of_runs(Runs(Case((1,) * 20, 32, 8, 128, dtype=torch.bfloat16), (1,) * 20, 5))
    longest = Runs(Case((2000,) * 4, 32, 8, 128, dtype=torch.bfloat16), (5,) * 4, 5)
    tensors, rows = make_runs(longest, seed=7)
    attend(longest.decodes, tensors, plan, rows, launch_pdl=launch_pdl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(longest.decodes, tensors, plan, rows, launch_pdl=launch_pdl)
    for lengths, counts in (((2000, 1, 77), (5, 1, 3)), ((1999, 2000, 64, 1025), (2, 5, 4, 5)), ((5,), (4,))):
        of_padding = 20 - sum(counts)
        case = Case((*lengths, 0), 32, 8, 128, dtype=torch.bfloat16)
        runs = Runs(case, (*counts, of_padding), 5)
        made, of_rows = make_runs(runs, seed=8)
        width = made.page_table.shape[1]
        kv_pages = tensors.kv_pages
        kv_pages[: len(made.kv_pages)] = made.kv_pages[: len(kv_pages)]
        tensors.page_table[:, :width] = made.page_table
        for target, source in ((tensors.q, made.q), (tensors.seq_lens, made.seq_lens), (rows, of_rows)):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        filled = made.seq_lens > 0
        error = (out[filled].double() - oracle(runs.decodes, made)[filled]).norm()
        assert error <= 4e-3 * oracle(runs.decodes, made)[filled].norm()
