"""Paged prefill attention against a float64 oracle. Everything a kernel must not read is NaN: unused pages, slots past
a length, tokens before a window.

Without a CUDA device the kernel runs in the Triton language's interpreter, in float32 (it computes bfloat16 wrongly),
on tiny shapes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton

from paged_kernels import prefill_attention
from paged_kernels.prefill_attention import PrefillShape, paged_prefill_attention
from paged_kernels.reference import reference

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Rounding of the output alone is 2^-9 / sqrt(3) = 1.1e-3 in bfloat16 and 1.4e-4 in float16; the weights are rounded
# once too. Sums are float32.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 2e-5}


@dataclass(frozen=True)
class Case:
    lens: tuple[tuple[int, int], ...]  # (query_len, seq_len)
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 16
    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None  # as dtype
    shape: PrefillShape | None = None
    spare_queries: int = 3  # rows of q and out that belong to no sequence
    pool_elements: int = 0  # at least so many


@dataclass(frozen=True)
class Tensors:
    q: torch.Tensor
    kv_pages: torch.Tensor
    page_table: torch.Tensor
    query_starts: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    sinks: torch.Tensor | None


def make(case: Case, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-n // case.page_size) for _, n in case.lens]
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
    page_table = torch.full((len(case.lens), max(needed, default=0) + 2), poison, dtype=torch.int32)
    for row, ((query_len, length), pages) in enumerate(zip(case.lens, needed, strict=True)):
        page_table[row, :pages] = torch.tensor([ids.pop() for _ in range(pages)], dtype=torch.int32)
        tokens = torch.arange(max(0, length - query_len + 1 - case.window) if case.window else 0, length)
        keys_values = torch.randn(2, len(tokens), case.num_kv_heads, case.head_dim, generator=generator)
        page = page_table[row, tokens // case.page_size].to(DEVICE).long()
        for side in range(2):
            kv_pages[page, side, :, (tokens % case.page_size).to(DEVICE)] = keys_values[side].to(DEVICE, case.dtype)
    starts = torch.tensor([0, *(query_len for query_len, _ in case.lens)]).cumsum(0)
    q = torch.randn(int(starts[-1]) + case.spare_queries, case.num_q_heads, case.head_dim, generator=generator).to(
        DEVICE, case.dtype
    )
    lengths = torch.tensor([n for _, n in case.lens], dtype=torch.int32, device=DEVICE)
    sinks = torch.linspace(-2, 6, case.num_q_heads).to(DEVICE, case.dtype) if case.sinks else None
    return Tensors(
        q,
        kv_pages.to(case.kv_dtype or case.dtype),
        page_table.to(DEVICE),
        starts.to(DEVICE, torch.int32),
        lengths,
        case.head_dim**-0.5,
        sinks,
    )


def oracle(case: Case, tensors: Tensors) -> torch.Tensor:
    """float64 [num_tokens, num_q_heads, head_dim] of the tokens that belong to a sequence."""
    out = []
    # torch cannot index these
    kv_pages = tensors.kv_pages.float() if tensors.kv_pages.itemsize == 1 else tensors.kv_pages
    for row, (query_len, length) in enumerate(case.lens):
        begin = max(0, length - query_len + 1 - case.window) if case.window else 0
        key_at, query_at = (
            torch.arange(begin, length, device=DEVICE),
            torch.arange(length - query_len, length, device=DEVICE)[:, None],
        )
        page = tensors.page_table[row].long()[key_at // case.page_size]
        # [heads, tokens, dim]
        keys, values = (kv_pages[page, side, :, key_at % case.page_size].double().transpose(0, 1) for side in range(2))
        at = sum(n for n, _ in case.lens[:row])
        queries = tensors.q[at : at + query_len].double().unflatten(1, (case.num_kv_heads, -1)).permute(1, 2, 0, 3)
        scores = queries @ keys[:, None].transpose(2, 3) * tensors.scale
        if case.soft_cap:
            scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
        visible = (key_at <= query_at) & (key_at > query_at - case.window) if case.window else key_at <= query_at
        scores.masked_fill_(~visible, float("-inf"))
        if tensors.sinks is not None:
            scores = torch.cat(
                (scores, tensors.sinks.double().view(case.num_kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1
            )
        out.append(
            (scores.softmax(-1)[..., : length - begin] @ values[:, None])
            .permute(2, 0, 1, 3)
            .reshape(query_len, case.num_q_heads, case.head_dim)
        )
    return torch.cat(out)


def attend(case: Case, tensors: Tensors, spare_tiles: int = 0) -> torch.Tensor:
    out = torch.full_like(tensors.q, float("nan"))
    paged_prefill_attention(
        tensors.q, tensors.kv_pages, tensors.page_table, tensors.query_starts, tensors.seq_lens, out,
        max_query_len=max(n for n, _ in case.lens) + spare_tiles, scale=tensors.scale, sliding_window=case.window,
        soft_cap=case.soft_cap, sinks=tensors.sinks, shape=case.shape,
    )  # fmt: skip
    return out


def assert_close(case: Case, out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out[len(expected) :].isnan().all(), "a row of no sequence was written"
    error, size = (out[: len(expected)].double() - expected).norm(), expected.norm()
    assert error <= TOLERANCE[case.dtype] * size, f"relative RMS error {error / size:.2e}"  # NaN fails too


SMALL = PrefillShape(rows=16, tile=16, num_warps=4, num_stages=1)
WIDE = PrefillShape(rows=32, tile=32, num_warps=4, num_stages=1)
TINY = {
    "one token": Case(((1, 1),), shape=SMALL),
    "one sequence": Case(((50, 50),), shape=SMALL),
    "a chunk over a prefix": Case(((20, 70),), shape=SMALL),
    "page and tile edges": Case(((15, 15), (16, 16), (17, 17), (1, 32), (2, 33), (16, 48)), shape=SMALL),
    "sequences without queries": Case(((0, 5), (7, 9), (0, 0), (0, 40), (3, 3), (0, 2)), shape=SMALL),
    "page of one token": Case(((9, 20), (5, 5)), page_size=1, shape=SMALL),
    "page of four tokens": Case(((9, 43), (5, 5)), page_size=4, shape=WIDE),
    "K and V of 8 bits": Case(((20, 70), (1, 5)), kv_dtype=torch.float8_e4m3fn, shape=SMALL),
    "page larger than tile": Case(((20, 140), (9, 9)), page_size=64, shape=SMALL),
    "window": Case(((3, 3), (12, 26), (20, 41), (1, 90)), window=10, shape=SMALL),
    "window of several tiles": Case(((30, 30), (20, 77)), window=40, page_size=4, shape=SMALL),
    "window of one token": Case(((20, 37),), window=1, shape=SMALL),
    "soft cap": Case(((9, 40),), soft_cap=0.5, shape=SMALL),
    "sinks": Case(((9, 40), (5, 5)), sinks=True, shape=SMALL),
    "sinks, window and soft cap": Case(
        ((20, 41), (1, 90)), sinks=True, window=10, soft_cap=2.0, num_q_heads=6, shape=SMALL
    ),
    "head_dim no power of two": Case(((9, 37),), head_dim=24, shape=SMALL),
    "three queries to a head": Case(((13, 37), (6, 6)), num_q_heads=6, shape=SMALL),
    "one query to a head": Case(((37, 40), (3, 3)), num_q_heads=2, shape=WIDE),
    "more queries to a head than rows": Case(((3, 20),), num_q_heads=20, num_kv_heads=1, shape=SMALL),
    "tuned shape": Case(((40, 75), (3, 3))),
    "a long chunk beside tails": Case(((50, 50), *((2, 9), (1, 1), (0, 7), (7, 8)) * 5), shape=SMALL),
    "more sequences than are counted at once": Case(((1, 1),) * 255 + ((3, 4), (9, 9), (1, 2)), 2, 1, shape=SMALL),
}


@pytest.mark.parametrize("case", TINY.values(), ids=TINY.keys())
def test_equals_float64_on_tiny_shapes(case: Case) -> None:
    tensors = make(case, seed=1)
    assert_close(case, attend(case, tensors), oracle(case, tensors))


@pytest.mark.parametrize("page_size", [4, 64])
def test_queries_of_a_sequence_of_length_0_are_padding(page_size: int) -> None:
    """A captured step gives the tokens that it has too many to one more sequence; nothing is read or written for
    them.
    """
    tensors = make(Case(((5, 9), (3, 3), (40, 40)), page_size=page_size, shape=SMALL), seed=4)
    tensors.seq_lens[-1] = 0
    tensors.page_table[-1] = 2**30  # read, it would be noticed
    case = Case(((5, 9), (3, 3)), page_size=page_size, shape=SMALL)
    assert_close(case, attend(case, tensors, spare_tiles=35), oracle(case, tensors))


@pytest.mark.parametrize("window", [0, 12], ids=["all keys", "window"])
def test_equals_its_reference(window: int) -> None:
    case = Case(((20, 40), (5, 5), (1, 18)), window=window, shape=SMALL, spare_queries=0)
    tensors = make(case, seed=2)
    kv_pages = tensors.kv_pages.nan_to_num()  # the reference gathers whole tiles
    expected = reference.prefill_attention(
        tensors.q, kv_pages, tensors.page_table, case.lens, tensors.scale, window or None
    )
    assert_close(case, attend(case, tensors), expected.double())


@pytest.mark.parametrize(
    ("lens", "wanted"),
    [
        pytest.param(((12288, 12288), *((8, 1024),) * 200), 8 * ((12288 + 200 * 8 + 3) // 32 + 201), id="200 tails"),
        pytest.param(((8192, 8192),), 8 * (8192 // 32 + 1), id="one sequence"),
    ],
)
def test_programs_are_as_many_as_the_tokens_need_and_one_for_each_sequence(
    monkeypatch: pytest.MonkeyPatch, lens: tuple[tuple[int, int], ...], wanted: int
) -> None:
    grids: list[tuple[int, ...]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *arguments, **constants: None

    monkeypatch.setattr(prefill_attention, "_prefill_kernel", Recorded())
    case = Case(lens, 32, 8, 128, dtype=torch.bfloat16)
    num_tokens = sum(n for n, _ in lens) + case.spare_queries
    q = torch.empty(num_tokens, 32, 128, dtype=torch.bfloat16, device=DEVICE)
    ints = torch.zeros(len(lens) + 1, dtype=torch.int32, device=DEVICE)
    pages = torch.empty(1, 2, 8, 16, 128, dtype=torch.bfloat16, device=DEVICE)
    paged_prefill_attention(
        q,
        pages,
        ints[:-1, None],
        ints,
        ints[:-1],
        torch.empty_like(q),
        max_query_len=max(n for n, _ in lens),
        scale=1.0,
    )
    assert grids == [(wanted,)]


def test_max_query_len_may_be_too_great() -> None:
    case = Case(((20, 40), (5, 5)), shape=SMALL)
    tensors = make(case, seed=3)
    assert torch.equal(attend(case, tensors, spare_tiles=30)[:25], attend(case, tensors)[:25])


def test_rows_may_be_strided() -> None:
    """Queries are a slice of a packed QKV row, and the output one of a wider buffer."""
    case = Case(((20, 40),), shape=SMALL, spare_queries=0)
    tensors = make(case, seed=4)
    packed = torch.full((20, 8, 16), float("nan"), device=DEVICE)
    packed[:, 2:6] = tensors.q
    out = torch.full((20, 5, 16), float("nan"), device=DEVICE)
    paged_prefill_attention(
        packed[:, 2:6],
        tensors.kv_pages,
        tensors.page_table,
        tensors.query_starts,
        tensors.seq_lens,
        out[:, :4],
        max_query_len=20,
        scale=tensors.scale,
    )
    assert_close(case, out[:, :4], oracle(case, tensors))
    assert out[:, 4].isnan().all()


def test_refuses_what_it_cannot_compute() -> None:
    case = Case(((20, 40), (5, 5)))
    t = make(case, seed=5)

    def launch(**changed: torch.Tensor) -> None:
        tensors = {
            "q": t.q,
            "kv_pages": t.kv_pages,
            "page_table": t.page_table,
            "query_starts": t.query_starts,
            "seq_lens": t.seq_lens,
            "out": t.q.clone(),
        }
        paged_prefill_attention(**{**tensors, **changed}, max_query_len=20, scale=1.0)

    with pytest.raises(ValueError, match="one dtype"):
        launch(q=t.q.half())
    with pytest.raises(ValueError, match="do not fit each other"):
        launch(q=t.q[:, :3], out=t.q[:, :3])
    with pytest.raises(ValueError, match="query starts"):
        launch(seq_lens=t.seq_lens[:1])
    with pytest.raises(ValueError, match="no power of two"):
        launch(kv_pages=t.kv_pages[:, :, :, :12].contiguous())
    with pytest.raises(ValueError, match="contiguous"):
        launch(kv_pages=t.kv_pages.transpose(3, 4).contiguous().transpose(3, 4))


RAGGED = (
    (1, 1),
    (0, 15),
    (16, 16),
    (17, 300),
    (64, 64),
    (65, 129),
    (1, 1000),
    (0, 0),
    (333, 333),
    (200, 1025),
    (2, 2),
    (128, 4096),
    (0, 7),
)
BIG = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": torch.bfloat16}
LARGE = {
    **{f"page size {n}": Case(RAGGED, **{**BIG, "page_size": n}) for n in (1, 2, 8, 16, 32, 64, 128, 256)},
    **{f"head_dim {n}": Case(RAGGED, **{**BIG, "head_dim": n}) for n in (64, 80, 96, 256)},
    **{f"float16, head_dim {n}": Case(RAGGED, 16, 2, n, dtype=torch.float16) for n in (64, 80, 128, 256)},
    **{f"float32, head_dim {n}": Case(RAGGED, 8, 2, n) for n in (64, 96, 256)},
    **{f"{q}/{kv} heads": Case(RAGGED, q, kv, 128, dtype=torch.bfloat16) for q, kv in ((28, 4), (32, 32), (48, 1))},
    **{f"window {n}": Case(RAGGED, window=n, **BIG) for n in (1, 100, 1024, 100000)},
    "window in pages of one token": Case(RAGGED, window=100, page_size=1, **BIG),
    **{
        f"8 bits, head_dim {n}": Case(RAGGED, **{**BIG, "head_dim": n, "kv_dtype": torch.float8_e4m3fn})
        for n in (64, 80, 128, 256)
    },
    **{
        f"8 bits, page size {n}": Case(RAGGED, **{**BIG, "page_size": n, "kv_dtype": torch.float8_e4m3fn})
        for n in (1, 8, 128)
    },
    "8 bits, window": Case(RAGGED, window=100, kv_dtype=torch.float8_e4m3fn, **BIG),
    "8 bits, float32": Case(RAGGED, 8, 2, 64, kv_dtype=torch.float8_e4m3fn),
    "8 bits, few queries each": Case(tuple((n % 5, 50 * n) for n in range(5, 40)), kv_dtype=torch.float8_e4m3fn, **BIG),
    "soft cap": Case(RAGGED, 16, 8, 256, soft_cap=2.0, dtype=torch.bfloat16),
    "few queries each": Case(tuple((n % 5, 50 * n) for n in range(5, 40)), **BIG),
    "a long chunk beside tails": Case(((4500, 5000), *((8, 300), (1, 40), (0, 9)) * 100), **BIG),
    "one long sequence": Case(((4500, 4500),), 8, 2, 128, dtype=torch.bfloat16),
    "offsets past 2^31": Case(RAGGED, pool_elements=2**31 + 2**28, **BIG),
    "offsets past 2^32": Case(RAGGED, pool_elements=2**32 + 2**28, page_size=128, **BIG),
}


@gpu
@needs_gpu
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE.keys())
def test_equals_float64_on_the_gpu(case: Case) -> None:
    tensors = make(case, seed=6)
    assert_close(case, attend(case, tensors), oracle(case, tensors))


@gpu
@needs_gpu
def test_repeated_launches_are_bit_equal_and_wait_for_nothing() -> None:
    case = Case(RAGGED, **BIG)
    tensors = make(case, seed=7)
    first = attend(case, tensors)
    outs = [torch.full_like(first, float("nan")) for _ in range(20)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for out in outs:
            paged_prefill_attention(
                tensors.q,
                tensors.kv_pages,
                tensors.page_table,
                tensors.query_starts,
                tensors.seq_lens,
                out,
                max_query_len=333,
                scale=tensors.scale,
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first.nan_to_num(), out.nan_to_num()) for out in outs)
