"""Paged decode attention against a float64 oracle. Everything a kernel must not read is NaN: unused pages, slots past a
length, tokens before a window.

Without a CUDA device the kernels run in the Triton language's interpreter, in float32 (it computes bfloat16 wrongly),
on tiny shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from paged_kernels import decode_attention
from paged_kernels.decode_attention import (
    DecodePlan,
    make_decode_plan,
    make_decode_workspace,
    paged_decode_attention,
    plan_decode_attention,
)
from paged_kernels.reference import reference

gpu = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Rounding of the output alone is 2^-9 / sqrt(3) = 1.1e-3 in bfloat16 and 1.4e-4 in float16; the weights are rounded
# once too. Sums are float32.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 2e-5}


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 16
    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None  # as dtype
    tile: int | None = None
    programs: int | None = None
    pool_elements: int = 0  # at least so many


@dataclass(frozen=True)
class Tensors:
    q: torch.Tensor
    kv_pages: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    sinks: torch.Tensor | None


def make(case: Case, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-n // case.page_size) for n in case.lengths]
    page_elements = 2 * case.num_kv_heads * case.page_size * case.head_dim
    num_pages = max(sum(needed) + 2, -(-case.pool_elements // page_elements))
    kv_pages = torch.full(
        (num_pages, 2, case.num_kv_heads, case.page_size, case.head_dim), float("nan"), dtype=case.dtype, device=DEVICE
    )
    poison = num_pages // 2  # stays NaN
    # the pool's two ends
    ids = torch.cat([torch.arange(num_pages - sum(needed) // 2 - 1, num_pages), torch.arange(sum(needed) + 1)])
    ids = ids[ids != poison].unique()
    ids = ids[torch.randperm(len(ids), generator=generator)].tolist()
    page_table = torch.full((len(case.lengths), max(needed, default=0) + 2), poison, dtype=torch.int32)
    for row, (length, pages) in enumerate(zip(case.lengths, needed, strict=True)):
        mine = [ids.pop() for _ in range(pages)]
        page_table[row, :pages] = torch.tensor(mine, dtype=torch.int32)
        first = max(0, length - case.window) if case.window else 0
        tokens = torch.arange(first, length)
        keys_values = torch.randn(2, len(tokens), case.num_kv_heads, case.head_dim, generator=generator)
        page = page_table[row, tokens // case.page_size].to(DEVICE).long()
        for side in range(2):
            kv_pages[page, side, :, (tokens % case.page_size).to(DEVICE)] = keys_values[side].to(DEVICE, case.dtype)
    q = torch.randn(len(case.lengths), case.num_q_heads, case.head_dim, generator=generator).to(DEVICE, case.dtype)
    sinks = torch.linspace(-2, 6, case.num_q_heads).to(DEVICE, case.dtype) if case.sinks else None
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=DEVICE)
    return Tensors(
        q, kv_pages.to(case.kv_dtype or case.dtype), page_table.to(DEVICE), lengths, case.head_dim**-0.5, sinks
    )


def oracle(case: Case, tensors: Tensors) -> torch.Tensor:
    """float64 [num_sequences, num_q_heads, head_dim]; zeros in rows of length 0."""
    out = torch.zeros(tensors.q.shape, dtype=torch.float64, device=DEVICE)
    # torch cannot index these
    kv_pages = tensors.kv_pages.float() if tensors.kv_pages.itemsize == 1 else tensors.kv_pages
    for row, length in enumerate(case.lengths):
        tokens = torch.arange(max(0, length - case.window) if case.window else 0, length, device=DEVICE)
        if len(tokens) == 0:
            continue
        page = tensors.page_table[row].long()[tokens // case.page_size]
        # [heads, tokens, dim]
        keys, values = (kv_pages[page, side, :, tokens % case.page_size].double().transpose(0, 1) for side in range(2))
        queries = tensors.q[row].double().view(case.num_kv_heads, -1, case.head_dim)
        scores = queries @ keys.transpose(1, 2) * tensors.scale
        if case.soft_cap:
            scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
        if tensors.sinks is not None:
            scores = torch.cat((scores, tensors.sinks.double().view(case.num_kv_heads, -1, 1)), dim=-1)
        out[row] = (scores.softmax(-1)[..., : len(tokens)] @ values).reshape(case.num_q_heads, case.head_dim)
    return out


def plan_for(case: Case, max_sequences: int | None = None, queries: int = 1) -> DecodePlan:
    workspace = make_decode_workspace(
        case.num_q_heads,
        case.num_kv_heads,
        case.head_dim,
        case.kv_dtype or case.dtype,
        DEVICE,
        queries=queries,
        tile=case.tile,
        programs_per_multiprocessor=case.programs,
    )
    return make_decode_plan(workspace, max_sequences or len(case.lengths), case.window)


def attend(
    case: Case, tensors: Tensors, plan: DecodePlan, rows: torch.Tensor | None = None, **launch: bool
) -> torch.Tensor:
    out = torch.full_like(tensors.q, float("nan"))
    plan_decode_attention(tensors.seq_lens, plan, rows)
    options = {"scale": tensors.scale, "soft_cap": case.soft_cap, "sinks": tensors.sinks}
    paged_decode_attention(tensors.q, tensors.kv_pages, tensors.page_table, out, plan, **options, **launch)
    return out


def assert_close(case: Case, out: torch.Tensor, expected: torch.Tensor) -> None:
    filled = torch.tensor(case.lengths, device=DEVICE) > 0
    assert out[~filled].isnan().all(), "a padding row was written"
    error, size = (out[filled].double() - expected[filled]).norm(), expected[filled].norm()
    assert error <= TOLERANCE[case.dtype] * size, f"relative RMS error {error / size:.2e}"  # NaN fails too


TINY = {
    "one token": Case((1,)),
    "one sequence over all programs": Case((200,), tile=16),
    "page and tile edges": Case((15, 16, 17, 31, 32, 33, 64, 65), tile=16),
    "padding rows": Case((0, 5, 0, 0, 40, 0), tile=16),
    "only padding rows": Case((0, 0, 0)),
    "more items than programs": Case((3, 20, 1, 9, 33, 2, 18, 7), tile=16, programs=1),
    "page of one token": Case((1, 7, 40), page_size=1, tile=16),
    "page larger than tile": Case((1, 70, 128), page_size=64, tile=16),
    "window": Case((1, 9, 10, 11, 26, 90), window=10, tile=16),
    "window of several tiles": Case((30, 50, 77), window=40, page_size=4, tile=16),
    "soft cap": Case((5, 40), soft_cap=0.5, tile=16),
    "sinks": Case((1, 9, 40, 0, 5), sinks=True, tile=16),
    "sinks over all programs": Case((200, 3), sinks=True, soft_cap=2.0, tile=16),
    "sinks and window": Case((26, 90), sinks=True, window=10, num_q_heads=6, tile=16),
    "head_dim no power of two": Case((3, 37), head_dim=24, tile=16),
    "three queries to a head": Case((3, 37), num_q_heads=6, tile=16),
    "one query to a head": Case((37, 3), num_q_heads=2, tile=16),
    "K and V of 8 bits": Case((3, 37, 64), kv_dtype=torch.float8_e4m3fn, tile=16),
    "more than sixteen queries to a head": Case((37, 3), num_q_heads=20, num_kv_heads=1, tile=16),
}


@pytest.mark.parametrize("case", TINY.values(), ids=TINY.keys())
def test_equals_float64_on_tiny_shapes(case: Case) -> None:
    tensors = make(case, seed=1)
    expected = oracle(case, tensors)
    assert_close(case, attend(case, tensors, plan_for(case)), expected)
    options = tensors.scale, case.window or None, case.soft_cap or None, tensors.sinks
    twin = reference.decode_attention(
        tensors.q, tensors.kv_pages, tensors.page_table, tensors.seq_lens, max(case.lengths), *options
    )
    torch.testing.assert_close(twin.double(), expected, rtol=0, atol=1e-5)  # 200 terms of size one in float32


def test_a_plan_serves_batches_of_other_sizes_and_leaves_no_trace() -> None:
    plan = plan_for(Case((1,), tile=16), max_sequences=8)
    for seed, lengths in enumerate([(90, 3, 0, 17, 50, 2, 8, 31), (5,), (0, 70)]):
        case = Case(lengths, tile=16)
        tensors = make(case, seed)
        assert_close(case, attend(case, tensors, plan), oracle(case, tensors))
        assert not plan.workspace.arrivals.any(), "an arrival counter was left set"


def test_rows_may_be_strided() -> None:
    """Queries are a slice of a packed QKV row, and the output one of a wider buffer."""
    case = Case((20, 40), tile=16)
    tensors = make(case, seed=3)
    packed = torch.full((2, 8, 16), float("nan"), device=DEVICE)
    packed[:, 2:6] = tensors.q
    out = torch.full((2, 5, 16), float("nan"), device=DEVICE)
    plan = plan_for(case)
    plan_decode_attention(tensors.seq_lens, plan)
    paged_decode_attention(packed[:, 2:6], tensors.kv_pages, tensors.page_table, out[:, :4], plan, scale=tensors.scale)
    assert_close(case, out[:, :4], oracle(case, tensors))
    assert out[:, 4].isnan().all()


def test_refuses_what_it_cannot_compute() -> None:
    case = Case((20, 40))
    tensors, plan = make(case, seed=4), plan_for(case)
    with pytest.raises(ValueError, match="no multiple"):
        make_decode_workspace(5, 2, 16, torch.float32, DEVICE)
    with pytest.raises(ValueError, match="the plan holds 2"):
        plan_decode_attention(torch.ones(3, dtype=torch.int32, device=DEVICE), plan)
    with pytest.raises(ValueError, match="one dtype"):
        paged_decode_attention(tensors.q.half(), tensors.kv_pages, tensors.page_table, tensors.q, plan, scale=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        paged_decode_attention(
            tensors.q[:, :2], tensors.kv_pages, tensors.page_table, tensors.q[:, :2], plan, scale=1.0
        )


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("num_q_heads", [8, 64])
def test_keys_that_become_float32_fit_beside_the_pipeline(
    num_q_heads: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles on their way, a tile of keys or values in the queries' type, and scores: as compiled for sm_90, to a few
    bytes.
    """
    case = Case((40,), num_q_heads, 2, head_dim, kv_dtype=torch.bfloat16)
    tensors, plan, seen = make(case, seed=4), plan_for(case), dict[str, int]()
    launcher = {(plan.workspace.num_work_items * 2,): lambda *arguments, **constants: seen.update(constants)}
    monkeypatch.setattr(decode_attention, "_decode_kernel", launcher)
    paged_decode_attention(tensors.q, tensors.kv_pages, tensors.page_table, tensors.q, plan, scale=1.0)
    tile, rows, width = seen["TILE"], seen["ROWS"], seen["HEAD_PAD"]
    on_their_way = (seen["num_stages"] - 1) * (2 * tile * 2 + rows * 4) * width
    assert on_their_way + 4 * tile * width + 4 * rows * tile <= 227 * 1024


RAGGED = (1, 0, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 0, 4097, 333, 2, 0)
LARGE = {
    **{
        f"page size {n}": Case(RAGGED, 32, 8, 128, page_size=n, dtype=torch.bfloat16)
        for n in (1, 2, 4, 8, 16, 32, 64, 128)
    },
    **{f"head_dim {n}": Case(RAGGED, 32, 8, n, dtype=torch.bfloat16) for n in (64, 80, 96, 128, 256)},
    **{f"float16, head_dim {n}": Case(RAGGED, 16, 2, n, dtype=torch.float16) for n in (64, 80, 128, 256)},
    **{f"float32, head_dim {n}": Case(RAGGED, 8, 2, n, dtype=torch.float32) for n in (64, 96, 128, 256)},
    **{
        f"{q}/{kv} heads": Case(RAGGED, q, kv, 128, dtype=torch.bfloat16)
        for q, kv in ((28, 4), (32, 32), (32, 2), (48, 1), (8, 8))
    },
    **{f"window {n}": Case(RAGGED, 32, 8, 128, window=n, dtype=torch.bfloat16) for n in (1, 100, 1024, 100000)},
    "window in pages of one token": Case(RAGGED, 32, 8, 128, window=100, page_size=1, dtype=torch.bfloat16),
    **{
        f"8 bits, head_dim {n}": Case(RAGGED, 32, 8, n, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn)
        for n in (64, 80, 96, 128, 256)
    },
    **{
        f"8 bits, page size {n}": Case(
            RAGGED, 28, 4, 128, page_size=n, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn
        )
        for n in (1, 8, 32, 128)
    },
    "8 bits, window": Case(RAGGED, 32, 8, 128, window=100, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn),
    "8 bits, float16": Case(RAGGED, 32, 2, 128, dtype=torch.float16, kv_dtype=torch.float8_e4m3fn),
    "8 bits, float32": Case(RAGGED, 8, 2, 64, dtype=torch.float32, kv_dtype=torch.float8_e4m3fn),
    "8 bits, one head": Case(RAGGED, 48, 1, 128, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn),
    **{
        f"16 bits, float32, head_dim {n}": Case(RAGGED, 8, 2, n, dtype=torch.float32, kv_dtype=torch.bfloat16)
        for n in (64, 128, 192, 256)
    },
    "16 bits, float32, many queries": Case(RAGGED, 64, 2, 256, dtype=torch.float32, kv_dtype=torch.bfloat16),
    "32 bits": Case(RAGGED, 8, 2, 64, dtype=torch.bfloat16, kv_dtype=torch.float32),
    "soft cap": Case(RAGGED, 16, 8, 256, soft_cap=2.0, dtype=torch.bfloat16),
    "sinks": Case(RAGGED, 64, 8, 64, sinks=True, dtype=torch.bfloat16),
    "sinks and window": Case(RAGGED, 64, 8, 64, sinks=True, window=128, dtype=torch.bfloat16),
    "sinks, 8 bits": Case(RAGGED, 64, 8, 64, sinks=True, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn),
    "one long sequence": Case((65536,), 32, 8, 128, dtype=torch.bfloat16),
    "one long sequence, one head": Case((20000,), 4, 1, 128, dtype=torch.bfloat16),
    "one short sequence": Case((1,), 32, 8, 128, dtype=torch.bfloat16),
    "many short sequences": Case(tuple(range(256)), 32, 8, 64, dtype=torch.bfloat16),
    "a thousand sequences": Case(tuple(n % 61 for n in range(1000)), 8, 2, 64, dtype=torch.bfloat16),
    "offsets past 2^31": Case(RAGGED, 32, 8, 128, dtype=torch.bfloat16, pool_elements=2**31 + 2**28),
    "offsets past 2^32": Case(RAGGED, 32, 8, 128, dtype=torch.bfloat16, pool_elements=2**32 + 2**28, page_size=128),
}


@gpu
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE.keys())
def test_equals_float64_on_the_gpu(case: Case) -> None:
    tensors = make(case, seed=5)
    assert_close(case, attend(case, tensors, plan_for(case)), oracle(case, tensors))


OVERLAP = {
    "one after the other": {},
    "overlapping": {"launch_pdl": True},
    "overlapping, plan read early": {"launch_pdl": True, "plan_settled": True},
}


@gpu
@pytest.mark.parametrize("launch", OVERLAP.values(), ids=OVERLAP.keys())
def test_repeated_launches_are_bit_equal(launch: dict[str, bool]) -> None:
    """Pieces are merged in the line's order, whoever comes last; launches that overlap share the workspace."""
    case = Case((9000, 300, 17, 2500), 32, 8, 128, dtype=torch.bfloat16)
    tensors, plan = make(case, seed=6), plan_for(case)
    first = attend(case, tensors, plan)
    assert_close(case, first, oracle(case, tensors))
    outs = [torch.full_like(first, float("nan")) for _ in range(200)]
    torch.cuda.synchronize()
    for out in outs:
        paged_decode_attention(
            tensors.q, tensors.kv_pages, tensors.page_table, out, plan, scale=tensors.scale, **launch
        )
    assert all(torch.equal(first, out) for out in outs)


@gpu
@pytest.mark.parametrize("launch_pdl", [False, True], ids=["one after the other", "overlapping"])
def test_a_captured_graph_follows_the_device_lengths(launch_pdl: bool) -> None:
    longest = Case((2000, 2000, 2000, 2000), 32, 8, 128, dtype=torch.bfloat16)
    tensors, plan = make(longest, seed=7), plan_for(longest)
    attend(longest, tensors, plan, launch_pdl=launch_pdl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(longest, tensors, plan, launch_pdl=launch_pdl)
    for lengths in ((2000, 1, 0, 77), (5, 0, 0, 0), (1999, 2000, 64, 1025)):
        case = Case(lengths, 32, 8, 128, dtype=torch.bfloat16)
        tensors.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        assert_close(case, out, oracle(case, tensors))
