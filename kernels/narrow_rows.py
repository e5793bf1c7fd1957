"""What products of few tokens have in common, whatever the weight's format: the end of their tiles, and what is asked
of their companions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.activation import activated
from paged_kernels.linear import Linear


@triton.jit
def store_rows(
    sums, first, token, known, residual, residual_stride, out, out_stride,
    N: tl.constexpr, HEIGHT: tl.constexpr, TOKENS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """Stores HEIGHT rows of the result from row `first` on, for the known tokens: sums, gated or added to residual.

    sums: [HEIGHT, TOKENS], or GATED: [2 HEIGHT, TOKENS], of each 16 rows 8 of the gate and 8 of what it lets through,
    so that in the tensor cores' layout a thread has what belongs together. token, known: [TOKENS].
    """
    result = sums
    if GATED:
        pairs = tl.permute(tl.reshape(sums, (HEIGHT // 8, 2, 8, TOKENS)), (0, 2, 3, 1))
        gate, up = tl.split(tl.reshape(pairs, (HEIGHT, TOKENS, 2)))
        result = activated(gate, ACTIVATION) * up
    below = first + tl.arange(0, HEIGHT)
    wanted = (below < N)[:, None] & known[None, :]
    if ADD:
        residual_at = residual + below[:, None] + (token * residual_stride)[None, :]
        result += tl.load(residual_at, mask=wanted, other=0.0).to(tl.float32)
    tl.store(out + below[:, None] + (token * out_stride)[None, :], result.to(out.dtype.element_ty), mask=wanted)


def check_outputs(x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor, num_rows: int) -> None:
    """Raises ValueError if they are not [tokens, num_rows] of x's dtype, with contiguous rows."""
    num_tokens = len(x)
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None and (
            tensor.shape != (num_tokens, num_rows) or tensor.dtype != x.dtype or tensor.stride(1) != 1
        ):
            raise ValueError(
                f"{name} {tuple(tensor.shape)} {tensor.dtype} is not [{num_tokens}, {num_rows}] {x.dtype} with "
                "contiguous rows"
            )


def check_sides(
    x: torch.Tensor, linear: Linear, residual: torch.Tensor | None, out: torch.Tensor, num_rows: int, max_tokens: int
) -> None:
    """Raises ValueError if shapes, strides or dtypes do not fit each other, whatever the linear's format."""
    num_tokens, num_columns = x.shape
    if not 1 <= num_tokens <= max_tokens or linear.num_columns != num_columns or linear.num_rows % num_rows:
        raise ValueError(
            f"x {tuple(x.shape)} (1 to {max_tokens} tokens) and a weight of {linear.num_rows} x "
            f"{linear.num_columns} do not fit each other"
        )
    check_outputs(x, residual, out, num_rows)
    if x.stride(1) != 1 or (linear.bias is not None and linear.bias.dtype != x.dtype):
        raise ValueError(f"rows of x must be contiguous, and bias of x's dtype {x.dtype}")
