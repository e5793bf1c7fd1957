"""The best of a rank's own tokens, as the keys of rank_ops.py: argmax and the seeded race of sampling.py over a part of
the vocabulary.

A row is cut into chunks, one program each; the greatest key of a row's chunks is found by an atomic maximum, whose
result does not depend on their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_begin
from paged_kernels.sampling import _race, _row_key, order_of

NO_TOKEN = -(2**63)  # less than any key
_CHUNK = 4096  # tokens of a program


@kernel(ints=["first", "end"], unaligned=["rows", "temperature", "seeds", "positions", "logits"])
def _keys_kernel(
    logits, rows, temperature, seeds, positions, keys, first, end, logits_stride, temperature_stride, seeds_stride,
    CHUNK: tl.constexpr, RANDOM: tl.constexpr, ON_GPU: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """The tokens first … end of the vocabulary: column 0 of the logits is `first`."""
    pdl_begin(LAUNCH_PDL)
    m = tl.program_id(1).to(tl.int64)
    begin = first + tl.program_id(0) * CHUNK
    row = logits + m * logits_stride - first  # such that a token is its own offset
    t = 0.0
    key = tl.full([], 0, tl.uint64)
    drawn = True
    if RANDOM:
        state = tl.load(rows + m).to(tl.int64)
        drawn = state >= 0
        t = tl.load(temperature + state * temperature_stride, mask=drawn, other=0.0)
        key = _row_key(tl.load(seeds + state * seeds_stride, mask=drawn, other=0), tl.load(positions + m))
    if drawn:
        best, token = _race(row, begin, t, key, float("-inf"), end, CHUNK, False, ON_GPU)
        packed = (order_of(best + 0.0).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
        tl.atomic_max(keys + m, packed, sem="relaxed")


def best_keys(logits: torch.Tensor, first: int, *, launch_pdl: bool = False) -> torch.Tensor:
    """[M, L], the tokens first … first + L -> int64 [M]: the key of the most likely, of equals the smallest token. As
    RankOps.best_keys.

    logits: any floating dtype, rows contiguous, may be strided. launch_pdl: begin while the kernel before drains; reads
    nothing before it is complete. Raises ValueError otherwise.
    """
    return _launch(logits, first, None, launch_pdl)


def best_draw_keys(
    logits: torch.Tensor, first: int, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor,
    rows: torch.Tensor, *, launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """As `best_keys`, of the race of reference.sample among these tokens; the most likely at temperature 0. A row of -1
    is padding: NO_TOKEN.

    temperature [R] float32 and seeds [R] int64 may be strided; positions and rows [M] integers. Raises ValueError for
    rows that do not fit.
    """
    if (
        rows.shape != (len(logits),)
        or positions.shape != rows.shape
        or not (rows.is_contiguous() and positions.is_contiguous())
    ):
        raise ValueError(f"expected one entry per row of logits {tuple(logits.shape)}, without gaps")
    return _launch(logits, first, (rows, temperature, seeds, positions), launch_pdl)


def _launch(logits: torch.Tensor, first: int, draw: tuple[torch.Tensor, ...] | None, launch_pdl: bool) -> torch.Tensor:
    if logits.ndim != 2 or logits.shape[1] < 1 or logits.stride(1) != 1:
        raise ValueError(
            f"expected rows of logits without gaps, got {tuple(logits.shape)} with strides {logits.stride()}"
        )
    keys = torch.full((len(logits),), NO_TOKEN, dtype=torch.int64, device=logits.device)
    if len(logits):
        rows, temperature, seeds, positions = draw or (keys,) * 4
        grid = triton.cdiv(logits.shape[1], _CHUNK), len(logits)
        _keys_kernel[grid](
            logits, rows, temperature, seeds, positions, keys, first, first + logits.shape[1], logits.stride(0),
            0 if draw is None else temperature.stride(0), 0 if draw is None else seeds.stride(0),
            CHUNK=_CHUNK, RANDOM=draw is not None, ON_GPU=logits.is_cuda, LAUNCH_PDL=launch_pdl, num_warps=4,
        )  # fmt: skip
    return keys
