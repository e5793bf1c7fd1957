"""Attention of a lone token in one launch against the reference's two steps. Everything that the kernel must not read
is NaN: unused pages, tokens before a window, and the newest token's own slot.

Without a CUDA device the kernel runs in the Triton language's interpreter, in float32 (it computes bfloat16 wrongly),
on tiny shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from paged_kernels import rope_kv
from paged_kernels.decode_attention import make_decode_workspace
from paged_kernels.decode_plan import DecodeWorkspace
from paged_kernels.lone_attention import computes, lone_attention
from paged_kernels.lone_token import HeadRules, LoneToken
from paged_kernels.norm_value import Norm
from paged_kernels.reference import reference

gpu = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Rounding of the output alone is 1.1e-3 in bfloat16 and 1.4e-4 in float16; weights are rounded once too, and queries
# where the kernel's last bits before rounding are not the reference's.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 2e-5}
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    length: int
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 16
    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False
    norm: bool = False
    plus_one: bool = False
    rotary: int | None = None  # numbers of a head that are rotated; None: all
    interleaved: bool = False
    factors: bool = False
    dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int64
    tile: int | None = 16
    programs: int | None = None
    stored: bool = True
    pool_elements: int = 0  # at least so many


@dataclass(frozen=True)
class Tensors:
    qkv: torch.Tensor
    heads: HeadRules
    kv_pages: torch.Tensor
    at: LoneToken
    sinks: torch.Tensor | None


def make(case: Case, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, case.dtype)

    length, page_size, head_dim = case.length, case.page_size, case.head_dim
    used = -(-length // page_size)
    page_elements = 2 * case.num_kv_heads * page_size * head_dim
    num_pages = max(used + 3, -(-case.pool_elements // page_elements))
    shape = num_pages, 2, case.num_kv_heads, page_size, head_dim
    kv_pages = torch.full(shape, float("nan"), dtype=case.dtype, device=DEVICE)
    page_table = torch.full((1, used + 2), num_pages // 2, dtype=torch.int32)  # a page that stays NaN
    ids = torch.cat((torch.arange(num_pages // 2), torch.arange(num_pages // 2 + 1, num_pages)))
    ids = torch.cat((ids[: used + 1], ids[-used - 1 :])).unique()  # both ends of the pool
    page_table[0, :used] = ids[torch.randperm(len(ids), generator=generator)[:used]]
    seen = torch.arange(max(0, length - case.window) if case.window else 0, max(length - 1, 0))
    page = page_table[0, seen // page_size].to(DEVICE).long()
    for side in range(2):
        kv_pages[page, side, :, (seen % page_size).to(DEVICE)] = randn(len(seen), case.num_kv_heads, head_dim)
    newest = max(length - 1, 0)
    slot = int(page_table[0, newest // page_size]) * page_size + newest % page_size if length and case.stored else -1
    rotary = head_dim if case.rotary is None else case.rotary
    angles = torch.arange(length + 1)[:, None] * 100 ** -(torch.arange(rotary // 2) / max(rotary // 2, 1))
    norms = [Norm(randn(head_dim), EPS, plus_one=case.plus_one) for _ in range(2)]
    heads = HeadRules(
        case.num_q_heads,
        (norms[0], norms[1]) if case.norm else None,
        torch.cat((angles.cos(), angles.sin()), dim=1).float().to(DEVICE) if rotary else None,
        case.interleaved,
        torch.linspace(0.5, 1.5, length + 1).to(DEVICE) if case.factors else None,
    )
    at = LoneToken(
        torch.tensor([newest], dtype=case.index_dtype, device=DEVICE),
        torch.tensor([slot], dtype=case.index_dtype, device=DEVICE),
        page_table.to(DEVICE),
        torch.tensor([length], dtype=torch.int32, device=DEVICE),
        length,
    )
    sinks = torch.linspace(-2, 6, case.num_q_heads).to(DEVICE, case.dtype) if case.sinks else None
    return Tensors(randn(1, (case.num_q_heads + 2 * case.num_kv_heads) * head_dim), heads, kv_pages, at, sinks)


def workspace_for(case: Case) -> DecodeWorkspace:
    of_heads = case.num_q_heads, case.num_kv_heads, case.head_dim, case.dtype, DEVICE
    return make_decode_workspace(*of_heads, tile=case.tile, programs_per_multiprocessor=case.programs)


def attend(case: Case, tensors: Tensors, workspace: DecodeWorkspace, **launch: bool) -> torch.Tensor:
    """Of kv_pages only the newest token's slot may be another afterwards."""
    out = torch.full((1, case.num_q_heads, case.head_dim), float("nan"), dtype=case.dtype, device=DEVICE)
    given = tensors.qkv, tensors.heads, tensors.kv_pages, tensors.at, workspace
    options = {"scale": case.head_dim**-0.5, "sliding_window": case.window, "soft_cap": case.soft_cap}
    assert lone_attention(*given, **options, sinks=tensors.sinks, out=out, **launch) is out
    assert not workspace.arrivals.any(), "an arrival counter was left set"
    return out


def expected_of(case: Case, tensors: Tensors) -> torch.Tensor:
    options = case.head_dim**-0.5, case.window or None, case.soft_cap or None, tensors.sinks
    return reference.lone_attention(tensors.qkv, tensors.heads, tensors.kv_pages, tensors.at, *options)


def assert_close(case: Case, out: torch.Tensor, expected: torch.Tensor) -> None:
    error, size = (out.double() - expected.double()).norm(), expected.double().norm()
    assert error <= TOLERANCE[case.dtype] * size, f"relative RMS error {error / size:.2e}"  # NaN fails too


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.itemsize])


def stored_at(case: Case, kv_pages: torch.Tensor, slot: int) -> torch.Tensor:
    """[2, num_kv_heads, head_dim]: K and V."""
    return kv_pages[slot // case.page_size, :, :, slot % case.page_size]


def check(case: Case) -> None:
    """The output, what is written into the pages, and that nothing else is."""
    tensors = make(case)
    before, twin = tensors.kv_pages.clone(), replace(tensors, kv_pages=tensors.kv_pages.clone())
    out, slot = attend(case, tensors, workspace_for(case)), int(tensors.at.slot)
    assert_close(case, out, expected_of(case, twin))
    found, expected = stored_at(case, tensors.kv_pages, slot), stored_at(case, twin.kv_pages, slot)
    assert torch.equal(found[1], expected[1]), "V is not the product's"
    # where the last bits before rounding differ, a number is rounded to a neighbour
    torch.testing.assert_close(found[0], expected[0], rtol=2 * torch.finfo(case.dtype).eps, atol=1e-6)
    found[:] = stored_at(case, before, slot)
    assert torch.equal(bits(tensors.kv_pages), bits(before)), "more than the token's slot was written"


NORMED = Case(37, norm=True)
TINY = {
    "one token": Case(1),
    "one token, all options": Case(1, norm=True, sinks=True, soft_cap=2.0, window=5, factors=True),
    "two tokens": Case(2),
    **{f"{n} tokens, pages of 16": Case(n) for n in (15, 16, 17, 31, 32, 33)},
    "newest token in a tile of its own": Case(65),
    "one tile exactly": Case(32, tile=32),
    "one tile and one token": Case(33, tile=32),
    "one item": Case(80, num_q_heads=8, num_kv_heads=8, programs=1),
    "several tiles to an item": Case(200, programs=1),
    "many pieces": Case(400, num_q_heads=2, num_kv_heads=1, programs=6),
    "many pieces of large heads": Case(200, num_q_heads=1, num_kv_heads=1, head_dim=256, programs=4),
    "more items than tiles": Case(40, programs=4),
    "page of one token": Case(40, page_size=1),
    "page larger than a tile": Case(130, page_size=64),
    "page larger than the sequence": Case(20, page_size=64),
    "window of one": Case(33, window=1),
    "window of one at a tile's edge": Case(32, window=1),
    "window of two": Case(33, window=2),
    "window larger than the sequence": Case(30, window=40),
    "window as long as the sequence": Case(30, window=30),
    "window within a tile": Case(90, window=7),
    "window from a tile's edge": Case(80, window=48),
    "window that ends behind a tile's edge": Case(81, window=48),
    "window of several tiles": Case(77, window=40, page_size=4),
    "sinks": Case(40, sinks=True),
    "sinks in one item": Case(9, sinks=True),
    "sinks and window over all items": Case(100, sinks=True, window=60, num_q_heads=6, programs=4),
    "soft cap": Case(40, soft_cap=0.5),
    "soft cap and sinks": Case(70, soft_cap=2.0, sinks=True),
    "norm": NORMED,
    "1 + w": replace(NORMED, plus_one=True),
    "half of a head": replace(NORMED, rotary=8),
    "three quarters of a head": replace(NORMED, head_dim=24, rotary=18),
    "neighbouring pairs": replace(NORMED, interleaved=True),
    "neighbouring pairs of half a head": Case(37, head_dim=24, rotary=12, interleaved=True),
    "no positions": replace(NORMED, rotary=0),
    "neither norm nor positions": Case(37, rotary=0),
    "queries that grow": replace(NORMED, factors=True),
    "queries that grow, no positions": Case(37, factors=True, rotary=0),
    "int32 indices": Case(37, index_dtype=torch.int32),
    **{f"heads of {d}": replace(NORMED, head_dim=d) for d in (64, 80, 96, 128, 256)},
    **{f"{n} queries to a head": Case(37, num_q_heads=2 * n) for n in (1, 4, 7, 8)},
    "sixteen queries to a head": Case(70, num_q_heads=16, num_kv_heads=1),
    "float16": replace(NORMED, dtype=torch.float16),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", TINY.values(), ids=TINY.keys())
def test_equals_the_reference_and_writes_the_newest_token_alone(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [Case(20), Case(20, head_dim=24, rotary=12, interleaved=True), Case(20, rotary=0), Case(20, dtype=torch.float16)],
    ids=["rotated", "neighbouring pairs of half a head", "no positions", "float16"],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is multiplied and added at once is left to the compiler")
def test_keys_and_values_are_stored_as_rope_kv_stores_them_to_the_bit(case: Case) -> None:
    tensors = make(case)
    twin, heads, at = tensors.kv_pages.clone(), tensors.heads, tensors.at
    attend(case, tensors, workspace_for(case))
    rope_kv.rope_write_kv(
        tensors.qkv, heads.num_heads, None, heads.rope_table, at.position, twin, at.slot, interleaved=heads.interleaved
    )
    assert torch.equal(bits(tensors.kv_pages), bits(twin))


def test_without_a_slot_the_newest_token_is_seen_but_not_stored() -> None:
    case = Case(37, stored=False)
    tensors = make(case)
    before = tensors.kv_pages.clone()
    expected = expected_of(case, replace(make(replace(case, stored=True)), qkv=tensors.qkv))
    assert_close(case, attend(case, tensors, workspace_for(case)), expected)
    assert torch.equal(bits(tensors.kv_pages), bits(before))


def test_a_padding_row_reads_and_writes_nothing() -> None:
    case = Case(0, sinks=True, norm=True)
    tensors = make(case)
    assert attend(case, tensors, workspace_for(case)).isnan().all()
    assert tensors.kv_pages.isnan().all()


def test_a_workspace_serves_one_launch_after_another() -> None:
    """Of all lengths, whose pieces are of other items."""
    workspace = workspace_for(Case(1))
    for seed, length in enumerate((90, 3, 200, 0, 17, 200)):
        case = Case(length)
        tensors = make(case, seed)
        out = attend(case, tensors, workspace)
        if length:
            assert_close(case, out, expected_of(case, tensors))


def test_a_sequence_that_grows_sees_what_was_stored_before() -> None:
    """Of tokens that came one by one, each of which left its keys and values, as if all had been there."""
    case = Case(20, norm=True)
    tensors, workspace = make(case), workspace_for(case)
    tensors.kv_pages.fill_(float("nan"))
    twin = tensors.kv_pages.clone()
    generator = torch.Generator().manual_seed(9)
    for position in range(case.length):
        page = int(tensors.at.page_table[0, position // case.page_size])
        slot = page * case.page_size + position % case.page_size
        at = LoneToken(
            torch.tensor([position], device=DEVICE),
            torch.tensor([slot], device=DEVICE),
            tensors.at.page_table,
            torch.tensor([position + 1], dtype=torch.int32, device=DEVICE),
            case.length,
        )
        qkv = torch.randn(tensors.qkv.shape, generator=generator).to(DEVICE)
        now = replace(tensors, qkv=qkv, at=at)
        assert_close(case, attend(case, now, workspace), expected_of(case, replace(now, kv_pages=twin)))
    torch.testing.assert_close(tensors.kv_pages, twin, equal_nan=True)


def test_refuses_what_it_cannot_compute() -> None:
    case = Case(20, norm=True)
    tensors, workspace = make(case), workspace_for(case)
    qkv, heads, kv_pages, at = tensors.qkv, tensors.heads, tensors.kv_pages, tensors.at
    assert computes(qkv, heads, kv_pages)
    assert heads.qk_norm is not None
    q_norm, k_norm = heads.qk_norm
    wide, runs, other = (
        torch.ones(64, device=DEVICE),
        make_decode_workspace(4, 2, 16, torch.float32, DEVICE, queries=2),
        make_decode_workspace(8, 2, 16, torch.float32, DEVICE),
    )
    of_all = replace(q_norm, weight=wide), replace(k_norm, weight=wide[:32])
    of_ranks = replace(q_norm, partial=True), replace(k_norm, partial=True)
    for norms in (of_all, of_ranks):
        assert not computes(qkv, replace(heads, qk_norm=norms), kv_pages)
    with pytest.raises(ValueError, match="not of this kernel"):
        lone_attention(qkv, replace(heads, qk_norm=of_ranks), kv_pages, at, workspace, scale=1.0)
    with pytest.raises(ValueError, match="not of this kernel"):
        lone_attention(qkv, heads, kv_pages.half(), at, workspace, scale=1.0)
    with pytest.raises(ValueError, match="in runs of 2"):
        lone_attention(qkv, heads, kv_pages, at, runs, scale=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        lone_attention(qkv, heads, kv_pages, at, other, scale=1.0)
    with pytest.raises(ValueError, match="sinks"):
        lone_attention(qkv, heads, kv_pages, at, workspace, scale=1.0, sinks=torch.zeros(3, device=DEVICE))
    with pytest.raises(ValueError, match="heads of 16"):
        lone_attention(qkv, replace(heads, num_heads=3), kv_pages, at, workspace, scale=1.0)


BF16 = Case(1000, 32, 8, 128, dtype=torch.bfloat16, tile=None)
LARGE = {
    **{f"{n} tokens": replace(BF16, length=n) for n in (1, 2, 16, 63, 64, 65, 129, 1000, 2048, 4097, 20000)},
    **{f"page size {n}": replace(BF16, page_size=n) for n in (1, 4, 8, 32, 64, 128)},
    **{f"head_dim {n}": replace(BF16, head_dim=n, norm=True) for n in (64, 80, 96, 128, 256)},
    **{f"float16, head_dim {n}": replace(BF16, head_dim=n, dtype=torch.float16) for n in (64, 80, 128, 256)},
    **{f"float32, head_dim {n}": Case(300, 8, 2, n, norm=True, tile=None) for n in (64, 96, 128, 256)},
    **{
        f"{q}/{kv} heads": replace(BF16, num_q_heads=q, num_kv_heads=kv, norm=True)
        for q, kv in ((28, 4), (32, 32), (32, 2), (16, 1), (8, 8), (64, 8), (64, 4))
    },
    **{f"window {n}": replace(BF16, window=n) for n in (1, 2, 100, 512, 4096)},
    "sinks and window": replace(BF16, num_q_heads=64, head_dim=64, sinks=True, window=128),
    "soft cap, 1 + w": replace(BF16, head_dim=256, soft_cap=2.0, norm=True, plus_one=True),
    "neighbouring pairs of half a head": replace(BF16, rotary=64, interleaved=True),
    "offsets past 2^31": replace(BF16, pool_elements=2**31 + 2**28),
}


@gpu
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE.keys())
def test_equals_the_reference_on_the_gpu(case: Case) -> None:
    check(case)


OVERLAP = {
    "one after the other": {},
    "overlapping": {"launch_pdl": True},
    "overlapping, pages read early": {"launch_pdl": True, "store_settled": True},
}


@gpu
@pytest.mark.parametrize("launch", OVERLAP.values(), ids=OVERLAP.keys())
def test_repeated_launches_are_bit_equal(launch: dict[str, bool]) -> None:
    """Pieces are merged in the line's order, whoever comes last; launches that overlap share the workspace. All write
    the same keys and values.
    """
    case = replace(BF16, length=9000)
    tensors, workspace = make(case), workspace_for(case)
    first = attend(case, tensors, workspace)
    given = tensors.qkv, tensors.heads, tensors.kv_pages, tensors.at, workspace
    outs = [torch.full_like(first, float("nan")) for _ in range(200)]
    torch.cuda.synchronize()
    for out in outs:
        lone_attention(*given, scale=case.head_dim**-0.5, out=out, **launch)
    assert all(torch.equal(first, out) for out in outs)


@gpu
@pytest.mark.parametrize("launch", OVERLAP.values(), ids=OVERLAP.keys())
def test_a_captured_graph_follows_the_device_lengths(launch: dict[str, bool]) -> None:
    longest = replace(BF16, length=2000)
    tensors, workspace = make(longest), workspace_for(longest)
    attend(longest, tensors, workspace)
    torch.cuda.synchronize()
    options = {"scale": longest.head_dim**-0.5, **launch}
    given = tensors.qkv, tensors.heads, tensors.kv_pages, tensors.at, workspace
    lone_attention(*given, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lone_attention(*given, **options)
    for length in (1, 77, 1999, 0, 1025):
        tensors.at.seq_len.fill_(length)
        tensors.at.position.fill_(max(length - 1, 0))
        newest = max(length - 1, 0)
        page = int(tensors.at.page_table[0, newest // longest.page_size])
        tensors.at.slot.fill_(page * longest.page_size + newest % longest.page_size if length else -1)
        graph.replay()
        torch.cuda.synchronize()
        if length:
            assert_close(longest, out, expected_of(longest, tensors))
        assert not workspace.arrivals.any()
