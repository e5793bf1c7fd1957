"""Which tokens top-k, top-p and min-p leave, as one threshold logit per row, found without a sort.

What stays are the logits of at least a threshold. Float32 and its int32 keys order alike (`order_of`), so the threshold
is the smallest key v above min-p's floor with

    top-k:  number of logits above v < k         top-p:  mass of the logits above v < top_p * mass of all that min-p and
    top-k left

Both left sides fall as v grows, so a search closes in on v: in (lo, hi], lo fails and hi holds. A pass over the logits
counts what is above eight pivots and keeps the two around the threshold; when no more than a chunk of logits is left
between them, these are gathered and one program bisects them in registers. Rows that need nothing, or no further pass,
cost an empty program per chunk. Should too many logits be left after the last pass, that program bisects over the whole
row.

A row is cut at the same place in any batch: chunks have one size and are summed in one order, and gathered logits,
whose order is left to chance, are summed as integers, exp((logit - highest) / temperature) * 2^37.

Ideas: threshold instead of sort, FlashInfer's sampling kernels (Ye et al., 2025); pivots in passes, multi-way
    bisection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_begin
from paged_kernels.sampling import SamplingWorkspace, arrive, check_logits, order_of, value_of

_PASSES = 3
# Entries of workspace.search, int32: what the search is for (0 nothing, 1 top-k, 2 top-p), its interval (two keys), the
# numbers of logits above both ends, the number gathered so far. Of workspace.levels, float32: the highest logit, the
# mass above the interval, the mass to stay below.


@triton.jit
def _mass(x, highest, temperature):
    """exp((x - highest) / temperature)."""
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    return tl.exp2((x - safe) * (1.4426950408889634 / temperature))


@triton.jit
def _whole(mass):
    """A mass in units of 2^-37, int64: sums do not depend on the order."""
    return (mass * 137438953472.0).to(tl.int64)


@triton.jit
def _remaining(search):
    """(what the search is for, how many logits are still between its ends or, for top-k, above the lower one)."""
    aim = tl.load(search)
    above_lo = tl.load(search + 3)
    return aim, tl.where(aim == 1, above_lo, above_lo - tl.load(search + 4))


@triton.jit
def _above(key, mass, pivot, LANES: tl.constexpr):
    """How many keys of [ROWS, WIDTH] are above the pivot, and their mass, summed as far as a thread has them at hand:
    [LANES, 2].
    """
    over = key > pivot
    count = tl.sum(tl.where(over, 1.0, 0.0), 0)
    mass = tl.sum(tl.where(over, mass, 0.0), 0)
    EACH: tl.constexpr = key.shape[1] // LANES
    return tl.join(tl.sum(tl.reshape(count, (LANES, EACH)), 1), tl.sum(tl.reshape(mass, (LANES, EACH)), 1))


@triton.jit
def _above_pivots(key, mass, pivots, LANES: tl.constexpr):
    """[LANES, 16]: number of keys above each of eight pivots, then their masses."""
    a = tl.join(_above(key, mass, tl.load(pivots), LANES), _above(key, mass, tl.load(pivots + 4), LANES))
    b = tl.join(_above(key, mass, tl.load(pivots + 1), LANES), _above(key, mass, tl.load(pivots + 5), LANES))
    c = tl.join(_above(key, mass, tl.load(pivots + 2), LANES), _above(key, mass, tl.load(pivots + 6), LANES))
    d = tl.join(_above(key, mass, tl.load(pivots + 3), LANES), _above(key, mass, tl.load(pivots + 7), LANES))
    joined = tl.join(tl.join(a, c), tl.join(b, d))  # [LANES, count or mass, 4's bit of the pivot, 2's bit, 1's bit]
    return tl.reshape(joined, (LANES, 16))


@kernel(unaligned=["rows", "temperature", "top_k", "top_p", "min_p", "thresholds"])
def _start_kernel(
    logits, rows, temperature, top_k, top_p, min_p, thresholds, arrivals, highests, search, levels, pivots,
    logits_stride, state_stride,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PAD: tl.constexpr,
    HEATED: tl.constexpr, HAS_ROWS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """The highest logit, and from it min-p's floor and the first pivots."""
    pdl_begin(LAUNCH_PDL)
    part = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    state = m
    if HAS_ROWS:
        state = tl.load(rows + m).to(tl.int64)
    search += m * 8
    levels += m * 4
    t = 1.0
    if HEATED:
        t = tl.load(temperature + tl.maximum(state, 0) * state_stride)
    k = tl.load(top_k + tl.maximum(state, 0) * state_stride)
    p = tl.load(top_p + tl.maximum(state, 0) * state_stride)
    least = tl.load(min_p + tl.maximum(state, 0) * state_stride)
    by_rank = (k > 0) & (k < VOCAB)
    if (state < 0) | (t <= 0) | ((p >= 1) & (least <= 0) & (by_rank == 0)):
        if part == 0:
            tl.store(search, 0)
            tl.store(thresholds + m, float("-inf"))
        return
    token = part * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + m * logits_stride + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    tl.store(highests + m * CHUNKS + part, tl.max(x, 0))
    if arrive(arrivals + m, CHUNKS):
        chunk = tl.arange(0, CHUNKS_PAD)
        highest = tl.max(
            tl.load(highests + m * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf"), cache_modifier=".cg"), 0
        )
        floor = tl.where(least > 0, highest + t * tl.log(tl.where(least > 0, least, 1.0)), float("-inf"))
        tl.store(thresholds + m, floor)  # the last word if nothing is searched
        tl.store(search, tl.where(by_rank, 1, tl.where(p < 1, 2, 0)))
        lo = order_of(floor) - 1
        tl.store(search + 1, lo)
        tl.store(search + 2, order_of(highest))
        tl.store(search + 3, VOCAB)
        tl.store(search + 4, 0)
        tl.store(search + 5, 0)
        tl.store(levels, highest)
        tl.store(levels + 1, 0.0)
        # the first pivot is the floor, the others are at growing distances from the highest logit
        step = tl.arange(0, 8)
        distance = 0.3 * tl.exp2(0.85 * step.to(tl.float32)) * tl.where(by_rank, 1.0, t)
        tl.store(pivots + m * 8 + step, tl.where(step == 0, lo, tl.maximum(order_of(highest - distance), lo)))
        tl.store(arrivals + m, 0)


@triton.jit
def _spread(lo, hi, highest, temperature):
    """Eight pivots between lo and hi: evenly between their logits, or at growing distances from the highest logit if lo
    has no finite one.
    """
    step = tl.arange(0, 8).to(tl.float32)
    low, high = value_of(lo), value_of(hi)
    distance = tl.maximum(highest - high, 0.3 * temperature)
    bounded = low > -1e30
    even = high - (high - tl.where(bounded, low, high)) * ((8.0 - step) / 9.0)
    growing = highest - distance * tl.exp2(0.4 * (step + 1.0))
    pivot = order_of(tl.where(bounded, even, growing))
    return tl.minimum(tl.maximum(pivot, lo), hi)


@kernel(unaligned=["rows", "temperature", "top_k", "top_p"])
def _narrow_kernel(
    logits, rows, temperature, top_k, top_p, arrivals, search, levels, pivots, above, logits_stride, state_stride,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PAD: tl.constexpr, WIDTH: tl.constexpr,
    LANES: tl.constexpr, FIRST: tl.constexpr, HEATED: tl.constexpr, HAS_ROWS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """One pass: count and mass above each pivot, then the interval between the best two and new pivots in it."""
    pdl_begin(LAUNCH_PDL)
    part = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    search += m * 8
    levels += m * 4
    pivots += m * 8
    aim, left = _remaining(search)
    ENOUGH: tl.constexpr = -1 if FIRST else CHUNK
    if (aim == 0) | (left <= ENOUGH):
        return
    state = m
    if HAS_ROWS:
        state = tl.load(rows + m).to(tl.int64)
    t = 1.0
    if HEATED:
        t = tl.load(temperature + state * state_stride)
    highest = tl.load(levels)
    TILE: tl.constexpr = 1024 if CHUNK > 1024 else CHUNK
    sums = tl.zeros([LANES, 16], tl.float32)
    for begin in range(part * CHUNK, part * CHUNK + CHUNK, TILE):
        token = begin + tl.arange(0, TILE // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        x = tl.load(logits + m * logits_stride + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        key = tl.where(token < VOCAB, order_of(x), -2147483648)
        sums += _above_pivots(key, _mass(x, highest, t), pivots, LANES)
    above += m * CHUNKS * 16
    tl.store(above + part * 16 + tl.arange(0, 16), tl.sum(sums, 0))

    if arrive(arrivals + m, CHUNKS):
        j = tl.arange(0, 8)
        chunk = tl.arange(0, CHUNKS_PAD)
        cell = above + chunk[:, None] * 16 + j[None, :]
        there = (chunk < CHUNKS)[:, None]
        count = tl.sum(tl.load(cell, mask=there, other=0.0, cache_modifier=".cg"), 0).to(tl.int32)
        mass = tl.sum(tl.load(cell + 8, mask=there, other=0.0, cache_modifier=".cg"), 0)
        if FIRST:
            bound = tl.load(top_p + state * state_stride) * tl.max(mass, 0)  # of the mass above the floor
            tl.store(levels + 2, bound)
        else:
            bound = tl.load(levels + 2)
        pivot = tl.load(pivots + j)
        lo = tl.load(search + 1)
        hi = tl.load(search + 2)
        holds = tl.where(aim == 1, count < tl.load(top_k + state * state_stride), mass < bound) & (pivot > lo)
        new_lo = tl.maximum(lo, tl.max(tl.where(holds, lo, pivot), 0))
        new_hi = tl.minimum(hi, tl.min(tl.where(holds, pivot, hi), 0))
        tl.store(search + 1, new_lo)
        tl.store(search + 2, new_hi)
        tl.store(search + 3, tl.minimum(tl.load(search + 3), tl.min(tl.where(holds, VOCAB, count), 0)))
        tl.store(search + 4, tl.maximum(tl.load(search + 4), tl.max(tl.where(holds, count, 0), 0)))
        tl.store(levels + 1, tl.maximum(tl.load(levels + 1), tl.max(tl.where(holds, mass, 0.0), 0)))
        tl.store(pivots + j, _spread(new_lo, new_hi, highest, t))
        tl.store(arrivals + m, 0)


@kernel
def _gather_kernel(
    logits, search, gathered, logits_stride, VOCAB: tl.constexpr, CHUNK: tl.constexpr, LAUNCH_PDL: tl.constexpr
):  # fmt: skip
    """The logits that are left, if they fit, in any order."""
    pdl_begin(LAUNCH_PDL)
    m = tl.program_id(1).to(tl.int64)
    search += m * 8
    aim, left = _remaining(search)
    if (aim == 0) | (left > CHUNK):
        return
    lo = tl.load(search + 1)
    hi = tl.where(aim == 1, 2147483647, tl.load(search + 2))
    TILE: tl.constexpr = 1024 if CHUNK > 1024 else CHUNK
    for begin in range(tl.program_id(0) * CHUNK, tl.program_id(0) * CHUNK + CHUNK, TILE):
        token = begin + tl.arange(0, TILE)
        x = tl.load(logits + m * logits_stride + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        key = tl.where(token < VOCAB, order_of(x), -2147483648)
        wanted = ((key > lo) & (key <= hi)).to(tl.int32)
        count = tl.sum(wanted, 0)
        if count > 0:
            place = tl.atomic_add(search + 5, count, sem="relaxed") + tl.cumsum(wanted, 0) - 1
            tl.store(gathered + m * CHUNK + place, x, mask=(wanted > 0) & (place < CHUNK))


@triton.jit
def _row_above(logits, key, highest, temperature, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """(count, mass in units of 2^-37) of a whole row's logits above key, by one program."""
    count = tl.full([], 0, tl.int64)
    mass = tl.full([], 0, tl.int64)
    for begin in range(0, VOCAB, CHUNK):
        token = begin + tl.arange(0, CHUNK)
        x = tl.load(logits + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        over = (order_of(x) > key) & (token < VOCAB)
        count += tl.sum(over.to(tl.int32), 0)
        mass += tl.sum(tl.where(over, _whole(_mass(x, highest, temperature)), 0), 0)
    return count, mass


@triton.jit
def _bisect(
    logits, key, masses, in_registers, lo, hi, base, bound, highest, temperature, BY_MASS: tl.constexpr,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The smallest key in (lo, hi] with fewer than `bound` logits, or less mass, above it; hi if there is none before
    it.
    """
    while hi - lo > 1:
        middle = (lo + hi) >> 1
        if BY_MASS:
            above = tl.sum(tl.where(key > middle.to(tl.int32), masses, 0), 0) + base
        else:
            above = tl.sum((key > middle.to(tl.int32)).to(tl.int32), 0).to(tl.int64)
        if in_registers == 0:
            count, mass = _row_above(logits, middle.to(tl.int32), highest, temperature, VOCAB, CHUNK)
            above = mass if BY_MASS else count
        lo = tl.where(above < bound, lo, middle)
        hi = tl.where(above < bound, middle, hi)
    return hi


@kernel(unaligned=["rows", "temperature", "top_k", "top_p", "thresholds"])
def _finish_kernel(
    logits, rows, temperature, top_k, top_p, thresholds, search, levels, gathered, logits_stride, state_stride,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, HEATED: tl.constexpr, HAS_ROWS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """One program per row: bisect what was gathered, or else the row."""
    pdl_begin(LAUNCH_PDL)
    m = tl.program_id(0).to(tl.int64)
    search += m * 8
    levels += m * 4
    logits += m * logits_stride
    aim, left = _remaining(search)
    if aim == 0:
        return
    state = m
    if HAS_ROWS:
        state = tl.load(rows + m).to(tl.int64)
    t = 1.0
    if HEATED:
        t = tl.load(temperature + state * state_stride)
    lo, hi = tl.load(search + 1).to(tl.int64), tl.load(search + 2).to(tl.int64)
    highest = tl.load(levels)
    base, bound = _whole(tl.load(levels + 1)), tl.maximum(_whole(tl.load(levels + 2)), 1)
    in_registers = left <= CHUNK
    at = tl.arange(0, CHUNK)
    there = at < tl.where(in_registers, left, 0)
    x = tl.load(gathered + m * CHUNK + at, mask=there, other=float("-inf"))
    key = tl.where(there, order_of(x), -2147483648)
    masses = tl.where(there, _whole(_mass(x, highest, t)), 0)
    if aim == 1:
        k = tl.load(top_k + state * state_stride).to(tl.int64)
        hi = _bisect(logits, key, masses, in_registers, lo, hi, base, k, highest, t, False, VOCAB, CHUNK)
        lo = hi
        p = tl.load(top_p + state * state_stride)
        if p < 1:  # among what top-k left
            mass = tl.sum(tl.where(key >= hi.to(tl.int32), masses, 0), 0)
            if in_registers == 0:
                _, mass = _row_above(logits, hi.to(tl.int32) - 1, highest, t, VOCAB, CHUNK)
            bound = tl.maximum((p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64), 1)
            base = tl.full([], 0, tl.int64)
            lo = hi - 1
            hi = order_of(highest).to(tl.int64)
    hi = _bisect(logits, key, masses, in_registers, lo, hi, base, bound, highest, t, True, VOCAB, CHUNK)
    tl.store(thresholds + m, value_of(hi.to(tl.int32)))


def truncation_thresholds(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, *,
    workspace: SamplingWorkspace, temperature: torch.Tensor | None = None, rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None, launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out[m]: reference.truncate(logits / temperature, ...) keeps the logits of row m that are at least out[m] (-inf:
    all); float32 [M].

    logits: [M, V], any floating dtype, rows contiguous, may be strided. top_k (integers; <= 0 or >= V: none), top_p,
    min_p, temperature (float32; 0: the row is not sampled, nothing is cut; None: 1 everywhere): of one stride, [M], or
    [R] if rows [M] says which entry is row m's (-1: padding). Six launches; what a row does not need is skipped on the
    device. top_k above the workspace's chunk works, slowly. launch_pdl: begin while the kernel before drains
    (programmatic dependent launch); reads nothing before that kernel is complete. Raises ValueError if logits do not
    fit the workspace.
    """
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device) if out is None else out
    check_logits(logits, workspace, rows, out)
    if len(logits) == 0:
        return out
    state_stride = top_k.stride(0)
    if any(tensor is not None and tensor.stride(0) != state_stride for tensor in (top_p, min_p, temperature)):
        raise ValueError("top_k, top_p, min_p and temperature must have one stride")
    w, unused = workspace, workspace.arrivals
    rows_of, heat = unused if rows is None else rows, unused if temperature is None else temperature
    flags = {"HEATED": temperature is not None, "HAS_ROWS": rows is not None, "LAUNCH_PDL": launch_pdl, "num_warps": 4}
    sizes = {"VOCAB": w.vocab_size, "CHUNK": w.chunk, "CHUNKS": w.chunks}
    pad = triton.next_power_of_2(w.chunks)
    each = 16 // logits.element_size()  # loaded by a thread at once
    lanes = min(128, w.chunk // each)  # threads
    grid, strides = (w.chunks, len(logits)), (logits.stride(0), state_stride)
    _start_kernel[grid](
        logits, rows_of, heat, top_k, top_p, min_p, out, w.arrivals, w.best_scores, w.search, w.levels, w.pivots,
        *strides, CHUNKS_PAD=pad, **sizes, **flags
    )  # fmt: skip
    for index in range(_PASSES):
        _narrow_kernel[grid](
            logits, rows_of, heat, top_k, top_p, w.arrivals, w.search, w.levels, w.pivots, w.above, *strides,
            CHUNKS_PAD=pad, WIDTH=lanes * each, LANES=lanes, FIRST=index == 0, **sizes, **flags,
        )  # fmt: skip
    _gather_kernel[grid](
        logits,
        w.search,
        w.gathered,
        logits.stride(0),
        VOCAB=w.vocab_size,
        CHUNK=w.chunk,
        LAUNCH_PDL=launch_pdl,
        num_warps=4,
    )
    _finish_kernel[(len(logits),)](
        logits, rows_of, heat, top_k, top_p, out, w.search, w.levels, w.gathered, *strides,
        VOCAB=w.vocab_size, CHUNK=w.chunk, **{**flags, "num_warps": 8},
    )  # fmt: skip
    return out
