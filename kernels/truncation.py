"""Which tokens top-k, top-p and min-p leave, as one threshold logit per row, found without a sort.

What stays are the logits of at least a threshold. Float32 and int32 keys order alike (`_order`), so the threshold is the smallest key v above min-p's floor with

    top-k:  number of logits above v < k         top-p:  mass of the logits above v < top_p * mass of all that min-p and top-k left

Both sides fall as v grows, so a search closes in on it: in (lo, hi], lo fails and hi holds. Every pass over the logits counts what is above eight pivots and
keeps the two around the threshold; when no more than a chunk of logits is left between them, these are gathered and one program bisects them in registers. Rows that
need nothing, or no further pass, cost an empty program per chunk. Should too many logits be left after the last pass, the row's last program bisects over the row.

Masses are sums of integers, exp((logit - highest) / temperature) * 2^37, so they do not depend on the order of addition: the same row is cut at the same place
in any batch. A pass packs count and mass into one int64.

Ideas: threshold instead of sort, FlashInfer's sampling kernels (Ye et al., 2025); pivots in passes, multi-way bisection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.sampling import SamplingWorkspace, check_logits

_PASSES = 3
_PIVOTS = 8
_COUNT_BIT = 50  # of a packed (count, mass): a chunk has at most 2^12 logits of mass up to 2^37 each
# Entries of workspace.search: what the search is for (0 nothing, 1 top-k, 2 top-p), its interval (keys), numbers of logits above both ends, mass above hi,
# mass to stay below, number gathered so far. The highest logit is in workspace.best_scores.


@triton.jit
def _order(x):
    """int32 keys that order as float32 x does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _mass(x, highest, temperature):
    """int64 exp((x - highest) / temperature) * 2^37."""
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    return (tl.exp((x - safe) / temperature) * 137438953472.0).to(tl.int64)


@triton.jit
def _arrive(arrivals, num_chunks):
    tl.debug_barrier()  # every thread's stores are before the release below
    return tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == num_chunks - 1


@triton.jit
def _gathers(search, CAP: tl.constexpr):
    """(what the search is for, how many logits are still between its ends or, for top-k, above the lower one)."""
    aim = tl.load(search)
    above_lo = tl.load(search + 3)
    return aim, tl.where(aim == 1, above_lo, above_lo - tl.load(search + 4))


@triton.jit
def _start_kernel(
    logits, rows, temperature, top_k, top_p, min_p, thresholds, arrivals, highests, search, pivots, logits_stride,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PAD: tl.constexpr, HEATED: tl.constexpr, HAS_ROWS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """The highest logit, and from it min-p's floor and the first pivots."""
    if LAUNCH_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    part = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    state = m
    if HAS_ROWS:
        state = tl.load(rows + m).to(tl.int64)
    search += m * 8
    t = 1.0
    if HEATED:
        t = tl.load(temperature + tl.maximum(state, 0))
    k = tl.load(top_k + tl.maximum(state, 0))
    p = tl.load(top_p + tl.maximum(state, 0))
    least = tl.load(min_p + tl.maximum(state, 0))
    by_rank = (k > 0) & (k < VOCAB)
    if (state < 0) | (t <= 0) | ((p >= 1) & (least <= 0) & (by_rank == 0)):
        if part == 0:
            tl.store(search, 0)
            tl.store(thresholds + m, float("-inf"))
        return
    token = part * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + m * logits_stride + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    tl.store(highests + m * CHUNKS + part, tl.max(x, 0))
    if _arrive(arrivals + m, CHUNKS):
        chunk = tl.arange(0, CHUNKS_PAD)
        highest = tl.max(tl.load(highests + m * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf"), cache_modifier=".cg"), 0)
        floor = tl.where(least > 0, highest + t * tl.log(tl.where(least > 0, least, 1.0)), float("-inf"))
        tl.store(thresholds + m, floor)  # the last word if nothing is searched
        tl.store(search, tl.where(by_rank, 1, tl.where(p < 1, 2, 0)))
        lo = _order(floor) - 1
        tl.store(search + 1, lo)
        tl.store(search + 2, _order(highest))
        tl.store(search + 3, VOCAB)
        tl.store(search + 4, 0)
        tl.store(search + 5, 0)
        tl.store(search + 7, 0)
        tl.store(highests + m * CHUNKS, highest)
        step = tl.arange(0, 8)  # the first pivot is the floor, the others are at growing distances from the highest logit
        distance = 0.3 * tl.exp2(0.85 * step.to(tl.float32)) * tl.where(by_rank, 1.0, t)
        tl.store(pivots + m * 8 + step, tl.where(step == 0, lo, tl.maximum(_order(highest - distance), lo)))
        tl.store(arrivals + m, 0)


@triton.jit
def _spread(lo, hi, highest, temperature):
    """Eight pivots between lo and hi: evenly between their logits, or at growing distances from the highest logit if lo has no finite one."""
    step = tl.arange(0, 8).to(tl.float32)
    low, high = _value(lo), _value(hi)
    distance = tl.maximum(highest - high, 0.3 * temperature)
    even = low + (high - low) * ((step + 1.0) / 9.0)
    growing = highest - distance * tl.exp2(0.4 * (step + 1.0))
    pivot = _order(tl.where(low > -1e30, even, growing))
    return tl.minimum(tl.maximum(pivot, lo), hi)


@triton.jit
def _narrow_kernel(
    logits, rows, temperature, top_k, top_p, arrivals, highests, search, pivots, partial, logits_stride,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PAD: tl.constexpr, STRIDE: tl.constexpr,
    FIRST: tl.constexpr, HEATED: tl.constexpr, HAS_ROWS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """One pass: count and mass above each pivot, then the interval between the best two and new pivots in it."""
    if LAUNCH_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    part = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    search += m * 8
    pivots += m * 8
    aim, left = _gathers(search, CHUNK)
    if aim == 0:
        return
    if FIRST == 0:
        if left <= CHUNK:
            return
    state = m
    if HAS_ROWS:
        state = tl.load(rows + m).to(tl.int64)
    t = 1.0
    if HEATED:
        t = tl.load(temperature + state)
    highest = tl.load(highests + m * CHUNKS)
    token = part * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + m * logits_stride + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    key = tl.where(token < VOCAB, _order(x), -2147483648)
    packed = _mass(x, highest, t) + (1 << 50)
    for j in tl.static_range(8):
        above = tl.sum(tl.where(key > tl.load(pivots + j), packed, 0), 0)
        tl.store(partial + (m * CHUNKS + part) * STRIDE + j, above)

    if _arrive(arrivals + m, CHUNKS):
        chunk = tl.arange(0, CHUNKS_PAD)
        j = tl.arange(0, 8)
        cell = partial + (m * CHUNKS + chunk[:, None]) * STRIDE + j[None, :]
        parts = tl.load(cell, mask=(chunk < CHUNKS)[:, None], other=0, cache_modifier=".cg")
        above = tl.sum(parts >> 50, 0)
        mass = tl.sum(parts & ((1 << 50) - 1), 0)
        pivot = tl.load(pivots + j)
        lo = tl.load(search + 1).to(tl.int32)
        hi = tl.load(search + 2).to(tl.int32)
        if FIRST:
            all_mass = tl.max(mass, 0)  # above the floor
            tl.store(search + 6, (tl.load(top_p + state).to(tl.float64) * all_mass.to(tl.float64)).to(tl.int64))
        bound = tl.load(search + 6)
        if FIRST:
            bound = (tl.load(top_p + state).to(tl.float64) * all_mass.to(tl.float64)).to(tl.int64)
        holds = tl.where(aim == 1, above < tl.load(top_k + state).to(tl.int64), mass < bound) & (pivot > lo)
        new_lo = tl.maximum(lo, tl.max(tl.where(holds, lo, pivot), 0))
        new_hi = tl.minimum(hi, tl.min(tl.where(holds, pivot, hi), 0))
        tl.store(search + 1, new_lo)
        tl.store(search + 2, new_hi)
        tl.store(search + 3, tl.minimum(tl.load(search + 3), tl.min(tl.where(holds, VOCAB, above), 0)))
        tl.store(search + 4, tl.maximum(tl.load(search + 4), tl.max(tl.where(holds, above, 0), 0)))
        tl.store(search + 5, tl.maximum(tl.load(search + 5), tl.max(tl.where(holds, mass, 0), 0)))
        tl.store(pivots + j, _spread(new_lo, new_hi, highest, t))
        tl.store(arrivals + m, 0)


@triton.jit
def _row_above(logits, key, highest, temperature, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """(count, mass) of a whole row's logits above key, by one program."""
    count = tl.full([], 0, tl.int64)
    mass = tl.full([], 0, tl.int64)
    for begin in range(0, VOCAB, CHUNK):
        token = begin + tl.arange(0, CHUNK)
        x = tl.load(logits + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        over = (_order(x) > key) & (token < VOCAB)
        count += tl.sum(over.to(tl.int64), 0)
        mass += tl.sum(tl.where(over, _mass(x, highest, temperature), 0), 0)
    return count, mass


@triton.jit
def _bisect(logits, gathered, num_gathered, aim, lo, hi, base, bound, k, p, highest, temperature, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """The threshold's key. gathered: the logits in question, if no more than CHUNK; else the whole row is looked at. base: mass above those gathered."""
    in_registers = num_gathered <= CHUNK
    at = tl.arange(0, CHUNK)
    x = tl.load(gathered + at, mask=(at < num_gathered) & in_registers, other=float("-inf"), cache_modifier=".cg")
    key = tl.where((at < num_gathered) & in_registers, _order(x), -2147483648)
    masses = _mass(x, highest, temperature)
    lo, hi = lo.to(tl.int64), hi.to(tl.int64)
    while hi - lo > 1:
        middle = (lo + hi) >> 1
        over = key > middle.to(tl.int32)
        count = tl.sum(over.to(tl.int32), 0).to(tl.int64)
        mass = tl.sum(tl.where(over, masses, 0), 0) + base
        if in_registers == 0:
            count, mass = _row_above(logits, middle.to(tl.int32), highest, temperature, VOCAB, CHUNK)
        holds = tl.where(aim == 1, count < k, mass < bound)
        lo = tl.where(holds, lo, middle)
        hi = tl.where(holds, middle, hi)
        if (aim == 1) & (hi - lo <= 1) & (p < 1):  # top-k is found; now top-p among what it left
            mass = tl.sum(tl.where(key >= hi.to(tl.int32), masses, 0), 0)
            if in_registers == 0:
                count, mass = _row_above(logits, hi.to(tl.int32) - 1, highest, temperature, VOCAB, CHUNK)
            bound = (p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64)
            aim = tl.full([], 2, tl.int64)
            lo = hi - 1
            hi = _order(highest).to(tl.int64)
    return hi.to(tl.int32)


@triton.jit
def _finish_kernel(
    logits, rows, temperature, top_k, top_p, thresholds, arrivals, highests, search, gathered, logits_stride,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, HEATED: tl.constexpr, HAS_ROWS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """Gather what is left, in any order, and bisect it."""
    if LAUNCH_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    part = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    search += m * 8
    gathered += m * CHUNK
    aim, left = _gathers(search, CHUNK)
    if aim == 0:
        return
    lo = tl.load(search + 1).to(tl.int32)
    hi = tl.load(search + 2).to(tl.int32)
    if left <= CHUNK:
        token = part * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + m * logits_stride + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        key = _order(x)
        wanted = ((key > lo) & ((aim == 1) | (key <= hi)) & (token < VOCAB)).to(tl.int32)
        count = tl.sum(wanted, 0)
        if count > 0:
            place = tl.atomic_add(search + 7, count.to(tl.int64), sem="relaxed") + tl.cumsum(wanted, 0) - 1
            tl.store(gathered + place, x, mask=(wanted > 0) & (place < CHUNK))
    if _arrive(arrivals + m, CHUNKS):
        state = m
        if HAS_ROWS:
            state = tl.load(rows + m).to(tl.int64)
        t = 1.0
        if HEATED:
            t = tl.load(temperature + state)
        base = tl.where(aim == 1, 0, tl.load(search + 5))
        bound = tl.load(search + 6)
        k = tl.load(top_k + state).to(tl.int64)
        p = tl.load(top_p + state)
        highest = tl.load(highests + m * CHUNKS)
        found = _bisect(logits + m * logits_stride, gathered, left, aim, lo, hi, base, bound, k, p, highest, t, VOCAB, CHUNK)
        tl.store(thresholds + m, _value(found))
        tl.store(arrivals + m, 0)
