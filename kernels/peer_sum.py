"""The sum of every rank's partial product plus the residual, in one launch over memory that all GPUs of the ranks can
read (one-shot all-reduce).

Each rank has a *peer buffer*: two sides of `capacity` numbers, and a flag for each program of each rank. A program
copies its share of x into one side of its own buffer, says so in the flags of all ranks, waits until all have said so,
and adds up everybody's share in the order of the ranks: all get equal bits.

Small sums have fewer programs than large ones; those that are not launched count the call all the same.

Sides alternate. A rank that has begun call n has seen all ranks begin call n - 1, and a kernel begins when the one
before it is complete: nobody reads call n - 2 any more when its side is written again. The number of a call comes from
the device, so nothing of it is baked into a captured graph; it may wrap.
Source: one-shot all-reduce with flags in peer memory, as NCCL's LL protocol and PyTorch's symmetric memory describe it;
    written anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_begin

_PROGRAMS = 128  # of a large sum; all of them must be resident at once, beside nothing else of the stream
_SHARE_OF_SMALL = 4  # a small sum has so many times fewer: each waits for a flag of every other rank
_SMALL_BLOCKS = 8  # of _SMALLEST_BLOCK numbers a program, at most, in a small sum
_SMALLEST_BLOCK, _LARGEST_BLOCK = 256, 2048  # numbers; a warp's threads take 16 bytes each of the smallest
_FLAG_BYTES = 4


@triton.jit
def _flag(base, side_bytes, at):
    """The at-th flag of the peer buffer that begins at address `base`."""
    return (base + 2 * side_bytes).to(tl.pointer_type(tl.int32)) + at


@kernel
def _sum_kernel(
    x, residual, peers, calls, num_elements, side_bytes,
    RANK: tl.constexpr, SIZE: tl.constexpr, PROGRAMS: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """peers: int64 [SIZE] addresses of the peer buffers; calls: int32 [MOST]. PROGRAMS were launched, which divides
    MOST. The result goes where residual is, or x.
    """
    pdl_begin(LAUNCH_PDL)
    program = tl.program_id(0)
    number = tl.load(calls + program) + 1
    side = (number & 1).to(tl.int64) * side_bytes
    span = tl.cdiv(tl.cdiv(num_elements, PROGRAMS), BLOCK) * BLOCK
    begin = program * span
    stop = begin + span
    own = tl.load(peers + RANK)
    mine = tl.multiple_of((own + side).to(tl.pointer_type(x.dtype.element_ty)), 16)
    for start in range(begin, tl.minimum(stop, num_elements), BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(mine + at, tl.load(x + at, mask=at < num_elements), mask=at < num_elements)

    tl.debug_barrier()  # every thread's stores are before the release below
    for other in tl.static_range(SIZE):
        if other != RANK:
            tl.atomic_xchg(
                _flag(tl.load(peers + other), side_bytes, RANK * MOST + program), number, sem="release", scope="sys"
            )
    for other in tl.static_range(SIZE):
        if other != RANK:
            flag = _flag(own, side_bytes, other * MOST + program)
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            while seen - number < 0:  # a difference, for numbers wrap
                seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    tl.debug_barrier()

    out = residual if ADD else x
    for start in range(begin, tl.minimum(stop, num_elements), BLOCK):
        at = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for other in tl.static_range(SIZE):
            theirs = tl.multiple_of((tl.load(peers + other) + side).to(tl.pointer_type(x.dtype.element_ty)), 16)
            # past the L1 cache
            total += tl.load(theirs + at, mask=at < num_elements, other=0.0, cache_modifier=".cg").to(tl.float32)
        if ADD:
            total += tl.load(residual + at, mask=at < num_elements, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=at < num_elements)
    for absent in tl.static_range(MOST // PROGRAMS):
        tl.store(calls + absent * PROGRAMS + program, number)


@dataclass(frozen=True)
class PeerBuffers:
    """One rank's view of all ranks' peer buffers. calls: int32 [programs], how many sums were begun; peers: int64
    [size], addresses that this GPU can read.
    """

    rank: int
    size: int
    capacity: int  # numbers of one sum
    dtype: torch.dtype
    peers: torch.Tensor
    calls: torch.Tensor

    @property
    def side_bytes(self) -> int:
        return self.capacity * self.dtype.itemsize

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `peer_sum` can add up this tensor."""
        return x.dtype == self.dtype and 0 < x.numel() <= self.capacity and x.is_contiguous()


def peer_buffer_bytes(size: int, capacity: int, dtype: torch.dtype, *, num_programs: int = _PROGRAMS) -> int:
    """Of one rank's peer buffer, which must be zero before the first sum of any rank. capacity: a multiple of 16
    numbers.

    Raises ValueError for another capacity.
    """
    if capacity < 16 or capacity % 16:
        raise ValueError(f"capacity {capacity} is no multiple of 16")
    return 2 * capacity * dtype.itemsize + size * num_programs * _FLAG_BYTES


def make_peer_buffers(
    rank: int,
    addresses: Sequence[int],
    capacity: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_programs: int = _PROGRAMS,
) -> PeerBuffers:
    """addresses: of every rank's peer buffer, in the order of the ranks. num_programs: of a sum, the same on all
    ranks.
    """
    peers = torch.tensor(addresses, dtype=torch.int64, device=device)
    return PeerBuffers(
        rank, len(addresses), capacity, dtype, peers, torch.zeros(num_programs, dtype=torch.int32, device=device)
    )


def peer_sum(
    x: torch.Tensor, residual: torch.Tensor | None, buffers: PeerBuffers, *, launch_pdl: bool = False
) -> torch.Tensor:
    """residual + the sum of every rank's x, written over residual; without one, the sum, written over x. All ranks call
    it in the same order, with as many numbers. Sums are float32 in the order of the ranks, rounded once.

    x, residual: contiguous, of one shape and the buffers' type. launch_pdl: as elsewhere; nothing is read before the
    kernel before is complete. Raises ValueError for what the buffers do not take.
    """
    if not buffers.takes(x):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} does not fit buffers of {buffers.capacity} {buffers.dtype}, or has gaps"
        )
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous()
    ):
        raise ValueError(
            f"residual {tuple(residual.shape)} {residual.dtype} is not like x {tuple(x.shape)} {x.dtype}, without gaps"
        )
    most = len(buffers.calls)
    few = max(1, most // _SHARE_OF_SMALL)
    num_programs = few if most % few == 0 and x.numel() <= few * _SMALL_BLOCKS * _SMALLEST_BLOCK else most
    block = min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, triton.next_power_of_2(triton.cdiv(x.numel(), num_programs))))
    _sum_kernel[(num_programs,)](
        x, x if residual is None else residual, buffers.peers, buffers.calls, x.numel(), buffers.side_bytes,
        RANK=buffers.rank, SIZE=buffers.size, PROGRAMS=num_programs, MOST=most, BLOCK=block, ADD=residual is not None,
        LAUNCH_PDL=launch_pdl, num_warps=block // _SMALLEST_BLOCK,
    )  # fmt: skip
    return x if residual is None else residual
