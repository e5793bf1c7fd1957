"""Which tokens top-k, top-p and min-p leave, as one threshold logit per row, found without a sort.

What stays are the logits of at least a threshold. Float32 and its int32 keys order alike (`order_of`), so the threshold is the smallest key v above
min-p's floor with

    top-k:  number of logits above v < k         top-p:  mass of the logits above v < top_p * mass of all that min-p and top-k left

Both left sides fall as v grows, so a search closes in on v: in (lo, hi], lo fails and hi holds. A pass over the logits counts what is above eight pivots and
keeps the two around the threshold; when no more than a chunk of logits is left between them, these are gathered and one program bisects them in registers.
Rows that need nothing, or no further pass, cost an empty program per chunk. Should too many logits be left after the last pass, the row's last program bisects
over the whole row.

Masses are sums of integers, exp((logit - highest) / temperature) * 2^37, so they do not depend on the order of addition: the same row is cut at the same place
in any batch. A pass packs both into one int64, the count above bit 50: a chunk has at most 2^12 logits.

Ideas: threshold instead of sort, FlashInfer's sampling kernels (Ye et al., 2025); pivots in passes, multi-way bisection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.sampling import SamplingWorkspace, arrive, check_logits, order_of, value_of

_PASSES = 3
# Entries of workspace.search: what the search is for (0 nothing, 1 top-k, 2 top-p), its interval (keys), numbers of logits above both ends, mass above hi,
# mass to stay below, number gathered so far. The highest logit is in workspace.best_scores.


@triton.jit
def _mass(x, highest, temperature):
    """int64 exp((x - highest) / temperature) * 2^37."""
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    return (tl.exp2((x - safe) * (1.4426950408889634 / temperature)) * 137438953472.0).to(tl.int64)


@triton.jit
def _share(p, mass):
    """p * mass, at least 1, so that nothing is too small a part of anything."""
    return tl.maximum((p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _remaining(search):
    """(what the search is for, how many logits are still between its ends or, for top-k, above the lower one)."""
    aim = tl.load(search)
    above_lo = tl.load(search + 3)
    return aim, tl.where(aim == 1, above_lo, above_lo - tl.load(search + 4))


@triton.jit
def _start_kernel(
    logits, rows, temperature, top_k, top_p, min_p, thresholds, arrivals, highests, search, pivots, logits_stride, state_stride,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PAD: tl.constexpr,
    HEATED: tl.constexpr, HAS_ROWS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
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
        highest = tl.max(tl.load(highests + m * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf"), cache_modifier=".cg"), 0)
        floor = tl.where(least > 0, highest + t * tl.log(tl.where(least > 0, least, 1.0)), float("-inf"))
        tl.store(thresholds + m, floor)  # the last word if nothing is searched
        tl.store(search, tl.where(by_rank, 1, tl.where(p < 1, 2, 0)))
        lo = order_of(floor) - 1
        tl.store(search + 1, lo)
        tl.store(search + 2, order_of(highest))
        tl.store(search + 3, VOCAB)
        tl.store(search + 4, 0)
        tl.store(search + 5, 0)
        tl.store(search + 7, 0)
        tl.store(highests + m * CHUNKS, highest)
        step = tl.arange(0, 8)  # the first pivot is the floor, the others are at growing distances from the highest logit
        distance = 0.3 * tl.exp2(0.85 * step.to(tl.float32)) * tl.where(by_rank, 1.0, t)
        tl.store(pivots + m * 8 + step, tl.where(step == 0, lo, tl.maximum(order_of(highest - distance), lo)))
        tl.store(arrivals + m, 0)


@triton.jit
def _spread(lo, hi, highest, temperature):
    """Eight pivots between lo and hi: evenly between their logits, or at growing distances from the highest logit if lo has no finite one."""
    step = tl.arange(0, 8).to(tl.float32)
    low, high = value_of(lo), value_of(hi)
    distance = tl.maximum(highest - high, 0.3 * temperature)
    bounded = low > -1e30
    even = high - (high - tl.where(bounded, low, high)) * ((8.0 - step) / 9.0)
    growing = highest - distance * tl.exp2(0.4 * (step + 1.0))
    pivot = order_of(tl.where(bounded, even, growing))
    return tl.minimum(tl.maximum(pivot, lo), hi)


@triton.jit
def _narrow_kernel(
    logits, rows, temperature, top_k, top_p, arrivals, highests, search, pivots, partial, logits_stride, state_stride,
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
    highest = tl.load(highests + m * CHUNKS)
    token = part * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + m * logits_stride + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    key = tl.where(token < VOCAB, order_of(x), -2147483648)
    packed = _mass(x, highest, t) + (1 << 50)
    for i in tl.static_range(8):
        tl.store(partial + (m * CHUNKS + part) * STRIDE + i, tl.sum(tl.where(key > tl.load(pivots + i), packed, 0), 0))

    if arrive(arrivals + m, CHUNKS):
        chunk = tl.arange(0, CHUNKS_PAD)
        j = tl.arange(0, 8)
        cell = partial + (m * CHUNKS + chunk[:, None]) * STRIDE + j[None, :]
        parts = tl.load(cell, mask=(chunk < CHUNKS)[:, None], other=0, cache_modifier=".cg")
        above = tl.sum(parts >> 50, 0)
        mass = tl.sum(parts & ((1 << 50) - 1), 0)
        pivot = tl.load(pivots + j)
        lo = tl.load(search + 1).to(tl.int32)
        hi = tl.load(search + 2).to(tl.int32)
        bound = tl.load(search + 6)
        if FIRST:
            bound = _share(tl.load(top_p + state * state_stride), tl.max(mass, 0))  # of the mass above the floor
            tl.store(search + 6, bound)
        holds = tl.where(aim == 1, above < tl.load(top_k + state * state_stride).to(tl.int64), mass < bound) & (pivot > lo)
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
        over = (order_of(x) > key) & (token < VOCAB)
        count += tl.sum(over.to(tl.int64), 0)
        mass += tl.sum(tl.where(over, _mass(x, highest, temperature), 0), 0)
    return count, mass


@triton.jit
def _bisect(
    logits, key, masses, in_registers, lo, hi, base, bound, highest, temperature, BY_MASS: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The smallest key in (lo, hi] with fewer than `bound` logits, or less mass, above it; hi if there is none before it."""
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


@triton.jit
def _find(logits, gathered, num_gathered, aim, lo, hi, base, bound, k, p, highest, temperature, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """The threshold's key. gathered: the logits in question, if no more than CHUNK; else the whole row is looked at, again and again."""
    in_registers = num_gathered <= CHUNK
    at = tl.arange(0, CHUNK)
    there = at < tl.where(in_registers, num_gathered, 0)
    x = tl.load(gathered + at, mask=there, other=float("-inf"), cache_modifier=".cg")
    key = tl.where(there, order_of(x), -2147483648)
    masses = tl.where(there, _mass(x, highest, temperature), 0)
    if aim == 1:
        hi = _bisect(logits, key, masses, in_registers, lo, hi, base, k, highest, temperature, False, VOCAB, CHUNK)
        lo = hi
        if p < 1:  # among what top-k left
            left = tl.sum(tl.where(key >= hi.to(tl.int32), masses, 0), 0)
            if in_registers == 0:
                _, left = _row_above(logits, hi.to(tl.int32) - 1, highest, temperature, VOCAB, CHUNK)
            bound = _share(p, left)
            lo = hi - 1
            hi = order_of(highest).to(tl.int64)
    return _bisect(logits, key, masses, in_registers, lo, hi, base, bound, highest, temperature, True, VOCAB, CHUNK).to(tl.int32)


@triton.jit
def _finish_kernel(
    logits, rows, temperature, top_k, top_p, thresholds, arrivals, highests, search, gathered, logits_stride, state_stride,
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
    aim, left = _remaining(search)
    if aim == 0:
        return
    lo = tl.load(search + 1)
    hi = tl.load(search + 2)
    if left <= CHUNK:
        token = part * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + m * logits_stride + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        key = order_of(x)
        wanted = ((key > lo) & ((aim == 1) | (key <= hi)) & (token < VOCAB)).to(tl.int32)
        count = tl.sum(wanted, 0)
        if count > 0:
            place = tl.atomic_add(search + 7, count.to(tl.int64), sem="relaxed") + tl.cumsum(wanted, 0) - 1
            tl.store(gathered + place, x, mask=(wanted > 0) & (place < CHUNK))
    if arrive(arrivals + m, CHUNKS):
        state = m
        if HAS_ROWS:
            state = tl.load(rows + m).to(tl.int64)
        t = 1.0
        if HEATED:
            t = tl.load(temperature + state * state_stride)
        base = tl.where(aim == 1, 0, tl.load(search + 5))
        k = tl.load(top_k + state * state_stride).to(tl.int64)
        p = tl.load(top_p + state * state_stride)
        highest = tl.load(highests + m * CHUNKS)
        found = _find(logits + m * logits_stride, gathered, left, aim, lo, hi, base, tl.load(search + 6), k, p, highest, t, VOCAB, CHUNK)
        tl.store(thresholds + m, value_of(found))
        tl.store(arrivals + m, 0)


def truncation_thresholds(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, *, workspace: SamplingWorkspace,
    temperature: torch.Tensor | None = None, rows: torch.Tensor | None = None, out: torch.Tensor | None = None, launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out[m]: reference.truncate(logits / temperature, ...) keeps the logits of row m that are at least out[m] (-inf: all); float32 [M].

    logits: [M, V], any floating dtype, rows contiguous, may be strided. top_k (integers; <= 0 or >= V: none), top_p, min_p, temperature (float32; 0: the row is
    not sampled, nothing is cut; None: 1 everywhere): of one stride, [M], or [R] if rows [M] says which entry is row m's (-1: padding). Five launches; what a
    row does not need is skipped on the device. top_k above the workspace's chunk works, slowly. launch_pdl: begin while the kernel before drains
    (programmatic dependent launch); reads nothing before that kernel is complete. Raises ValueError if logits do not fit the workspace.
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
    flags |= {"launch_pdl": True} if launch_pdl else {}
    grid, strides = (w.chunks, len(logits)), (logits.stride(0), state_stride)
    _start_kernel[grid](
        logits, rows_of, heat, top_k, top_p, min_p, out, w.arrivals, w.best_scores, w.search, w.pivots, *strides, CHUNKS_PAD=pad, **sizes, **flags
    )
    for index in range(_PASSES):
        _narrow_kernel[grid](
            logits, rows_of, heat, top_k, top_p, w.arrivals, w.best_scores, w.search, w.pivots, w.candidates, *strides,
            CHUNKS_PAD=pad, STRIDE=w.candidates.shape[2], FIRST=index == 0, **sizes, **flags,
        )  # fmt: skip
    _finish_kernel[grid](logits, rows_of, heat, top_k, top_p, out, w.arrivals, w.best_scores, w.search, w.gathered, *strides, **sizes, **flags)
    return out
