"""The likeliest tokens and their log-probabilities: each chunk of a row brings a few candidates, and the last of a
row's programs to arrive takes the best of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_begin
from paged_kernels.sampling import (
    MAX_TOP,
    TOP_PAD,
    SamplingWorkspace,
    arrive,
    check_logits,
    mass_below,
    merge_log_mass,
    order_of,
    value_of,
)

_NOTHING = tl.constexpr(-(2**63))  # less than any candidate


@kernel
def _peaks_kernel(logits, masses, logits_stride, VOCAB: tl.constexpr, CHUNK: tl.constexpr, LAUNCH_PDL: tl.constexpr):
    """Maximum and mass of every chunk."""
    pdl_begin(LAUNCH_PDL)
    m = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + m * logits_stride + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    cell = masses + (m * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(cell, top)
    tl.store(cell + 1, mass_below(x, top))


@kernel(ints=["n", "ids_stride", "logprobs_stride"], unaligned=["ids", "logprobs"])
def _top_kernel(
    logits, ids, logprobs, arrivals, candidates, num_candidates, masses, n, logits_stride, ids_stride, logprobs_stride,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PAD: tl.constexpr, TOP_PAD: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """A candidate is one int64: the logit's order above, the token's complement below, so that the larger is the
    likelier, then the smaller token.

    At least n logits reach the maximum of the n-th highest chunk, so a chunk takes only those of its logits that reach
    it, at most n: a few.
    """
    pdl_begin(LAUNCH_PDL)
    part = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    masses += m * CHUNKS * 2
    candidates += m * CHUNKS * TOP_PAD
    num_candidates += m * CHUNKS
    chunk = tl.arange(0, CHUNKS_PAD)
    peak = order_of(tl.load(masses + chunk * 2, mask=chunk < CHUNKS, other=float("-inf")))
    higher = (peak[None, :] > peak[:, None]) | ((peak[None, :] == peak[:, None]) & (chunk[None, :] < chunk[:, None]))
    rank = tl.sum(higher.to(tl.int32), 1)
    least = tl.max(tl.where(rank == n - 1, peak, -2147483648), 0).to(tl.int64) << 32

    token = part * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + m * logits_stride + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    packed = (order_of(x).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    packed = tl.where(token < VOCAB, packed, _NOTHING)
    taken = 0
    best = tl.max(packed, 0)
    while (taken < n) & (best >= least) & (best > _NOTHING):
        tl.store(candidates + part * TOP_PAD + taken, best)
        taken += 1
        packed = tl.where(packed == best, _NOTHING, packed)
        best = tl.max(packed, 0)
    tl.store(num_candidates + part, taken)

    if arrive(arrivals + m, CHUNKS):
        place = tl.arange(0, TOP_PAD)
        found = tl.load(num_candidates + chunk, mask=chunk < CHUNKS, other=0, cache_modifier=".cg")
        cell = candidates + chunk[:, None] * TOP_PAD + place[None, :]
        left = tl.load(cell, mask=place[None, :] < found[:, None], other=_NOTHING, cache_modifier=".cg")
        log_mass = merge_log_mass(masses, chunk, CHUNKS)
        for i in range(n):
            best = tl.max(tl.max(left, 1), 0)
            left = tl.where(left == best, _NOTHING, left)
            winner = tl.minimum(0x7FFFFFFF - (best & 0x7FFFFFFF), VOCAB - 1)
            tl.store(ids + m * ids_stride + i, winner.to(ids.dtype.element_ty))
            tl.store(logprobs + m * logprobs_stride + i, value_of((best >> 32).to(tl.int32)) - log_mass)
        tl.store(arrivals + m, 0)


def top_logprobs(
    logits: torch.Tensor,
    n: int,
    *,
    workspace: SamplingWorkspace,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    launch_pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The n largest of log softmax(logits[m]), largest first, of equals the smaller token first: ids [M, n] int64 (or
    int32), log-probabilities [M, n] float32.

    1 <= n <= MAX_TOP and n <= V. As `argmax` otherwise. Raises ValueError for another n.
    """
    if not 1 <= n <= min(MAX_TOP, workspace.vocab_size):
        raise ValueError(f"n {n} is not between 1 and {min(MAX_TOP, workspace.vocab_size)}")
    shape = (len(logits), n)
    ids, values = (
        (logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32))
        if out is None
        else out
    )
    check_logits(logits, workspace)
    if len(logits):
        w = workspace
        flags = {"VOCAB": w.vocab_size, "CHUNK": w.chunk, "LAUNCH_PDL": launch_pdl, "num_warps": 4}
        _peaks_kernel[(w.chunks, len(logits))](logits, w.masses, logits.stride(0), **flags)
        _top_kernel[(w.chunks, len(logits))](
            logits, ids, values, w.arrivals, w.candidates, w.best_tokens, w.masses, n, logits.stride(0), ids.stride(0),
            values.stride(0),
            CHUNKS=w.chunks, CHUNKS_PAD=triton.next_power_of_2(w.chunks), TOP_PAD=TOP_PAD, **flags,
        )  # fmt: skip
    return ids, values
