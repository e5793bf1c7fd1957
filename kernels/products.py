"""The one place that chooses a kernel for a product of a layer, from the number of rows, the matrix and what hangs on it.

One row: a matrix-vector kernel, with the norm before and everything behind in the same launch. Few rows: a kernel that reads each weight once. Many: cuBLAS.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from paged_kernels import activation as activations
from paged_kernels import norm, small_linear
from paged_kernels.linear import Linear
from paged_kernels.norm_value import Norm


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
        norm_before: Norm | None = None,
        gated: bool = False,
        activation: str = "silu",
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """[T, in] -> [T, out]: x is normed, multiplied, and then gated ([T, out / 2]) or added to residual, which is written over.

        norm_before: of [in]. gated: activation(first half) * second half. residual: [T, out], not with gated or out.
        """
        weight, bias, pdl = linear.weight, linear.bias, self._pdl
        out = out if residual is None else residual
        behind: dict[str, Any] = {"gated": gated, "activation": activation, "residual": residual, "out": out, "launch_pdl": pdl}
        if norm_before is not None and (len(x) > 1 or norm_before.centred or norm_before.bias is not None):
            x, norm_before = norm.norm(x, norm_before, launch_pdl=pdl), None
        if len(x) == 1:
            return small_linear.vector_linear(x, weight, bias, norm=norm_before, **behind)
        if small_linear.is_narrow(len(x), weight):
            return small_linear.narrow_linear(x, weight, bias, workspace=self._workspace, **behind)
        if residual is not None:
            if bias is not None:
                residual += bias
            return residual.addmm_(x, weight.t())
        if gated:
            return activations.gate(functional.linear(x, weight, bias), activation, launch_pdl=pdl)
        if out is None:
            return functional.linear(x, weight, bias)
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
