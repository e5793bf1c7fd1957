"""The one place that chooses a kernel for a product of a layer, from the number of rows, the matrix and what hangs on it.

One row: a matrix-vector kernel, with the norm before and everything behind in the same launch. Few rows: a kernel that reads each weight once. Many: cuBLAS.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from paged_kernels import activation, norm, small_linear
from paged_kernels.linear import Linear


class Products:
    """Keeps the scratch memory of its kernels; products run one after another on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._workspace = small_linear.make_linear_workspace(device)
        self._pdl = device.type == "cuda"

    def __call__(
        self,
        x: Tensor,
        linear: Linear,
        *,
        norm_before: tuple[Tensor, float] | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """[T, in] -> [T, out]: x is normed, multiplied, and then gated ([T, out / 2]) or added to residual, which is written over.

        norm_before: weight [in] and eps of an RMS norm. gated: silu(first half) * second half. residual: [T, out], not with gated or out.
        """
        weight, bias, pdl = linear.weight, linear.bias, self._pdl
        out = out if residual is None else residual
        if len(x) == 1:
            return small_linear.vector_linear(x, weight, bias, norm=norm_before, gated=gated, residual=residual, out=out, launch_pdl=pdl)
        if norm_before is not None:
            x = norm.rms_norm(x, *norm_before, launch_pdl=pdl)
        if small_linear.is_narrow(len(x), weight):
            return small_linear.narrow_linear(x, weight, bias, workspace=self._workspace, gated=gated, residual=residual, out=out, launch_pdl=pdl)
        if residual is not None:
            if bias is not None:
                residual += bias
            return residual.addmm_(x, weight.t())
        if gated:
            return activation.silu_mul(functional.linear(x, weight, bias), launch_pdl=pdl)
        if out is None:
            return functional.linear(x, weight, bias)
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
