"""The one place that chooses a kernel for a product of a layer, from the number of rows, the matrix and what hangs on
it.

One row: a matrix-vector kernel, with the norm before and everything behind in the same launch. Few rows, and one where
the matrix is large: a kernel that reads each weight once. Many: cuBLAS. Quantised weights are read as they are stored
by one row (fp8_vector.py, int4_vector.py, quant_vector.py) and by few (quant_linear.py; int4_narrow.py where int4 lies
in quads). From two rows on fp8 goes to 8-bit tensor cores if activations are of fp8 too, and these are rounded in the
launch of the norm: few by fp8_narrow.py; many by cuBLASLt where a row of the weight has one scale, and by
block_linear.py where blocks have. Many rows of other formats meet a weight that was dequantised into 16 bits before
cuBLAS.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from paged_kernels import activation as activations
from paged_kernels import (
    fp8_narrow,
    fp8_vector,
    int4_narrow,
    int4_vector,
    norm,
    quant_linear,
    quant_vector,
    small_linear,
)
from paged_kernels.block_linear import GROUP, block_linear
from paged_kernels.codes import dequantise
from paged_kernels.dequantise import dequantised
from paged_kernels.device_traits import traits_of
from paged_kernels.linear import Linear
from paged_kernels.norm_value import Norm
from paged_kernels.round_rows import round_rows

# Up to which an 8-bit product is fp8_narrow.py's, as measured on an H200 with Llama-3.1-8B's matrices: it takes less
# time than cuBLASLt for 64 tokens, and more for 128 (gate and up 37 us against 46, then 47 against 42); for 256 less
# than block_linear.py where rows are split, and little more elsewhere (down 57 against 77, gate and up 107 against
# 100). quant_linear.py, whose activations need no rounding, is as fast for 16 tokens where a matrix is small, or a
# little faster beside blocks, and slower where it is large (out 10 against 11, or 12; gate and up 46 against 33).
_NARROW_TOKENS = {"rows": 64, "blocks": fp8_narrow.MAX_TOKENS}


class Products:
    """Keeps the scratch memory of its kernels; products run one after another on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._workspace = small_linear.make_linear_workspace(device)
        self._pdl = traits_of(device).launches_dependents

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
        """[T, in] -> [T, out]: x is normed, multiplied, and then gated ([T, out / 2]) or added to residual, which is
        written over.

        norm_before: of [in]. gated: activation(first half) * second half. residual: [T, out], not with gated or out.
        """
        if linear.format.codes != "plain":
            return self._quantised(x, linear, norm_before, gated, activation, residual, out)
        weight, bias, pdl = linear.weight, linear.bias, self._pdl
        out = out if residual is None else residual
        behind: dict[str, Any] = {
            "gated": gated,
            "activation": activation,
            "residual": residual,
            "out": out,
            "launch_pdl": pdl,
        }
        narrow = small_linear.is_narrow(len(x), weight)
        vector = len(x) == 1 and not narrow
        if norm_before is not None and not (vector and not norm_before.centred and norm_before.bias is None):
            x, norm_before = norm.norm(x, norm_before, launch_pdl=pdl), None
        if vector:
            return small_linear.vector_linear(x, weight, bias, norm=norm_before, **behind)
        if narrow:
            return small_linear.narrow_linear(x, weight, bias, workspace=self._workspace, **behind)
        if residual is not None:
            if bias is not None:
                residual += bias
            return residual.addmm_(x, weight.t())
        if gated:
            return activations.gate(functional.linear(x, weight, bias), activation, out=out, launch_pdl=pdl)
        if out is None:
            return functional.linear(x, weight, bias)
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)

    def _quantised(
        self,
        x: Tensor,
        linear: Linear,
        norm_before: Norm | None,
        gated: bool,
        activation: str,
        residual: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        pdl, num_tokens = self._pdl, len(x)
        has_fp8_product = _has_fp8_product(x, linear)
        in_quads = linear.format.order == "quads"
        most = 1 if has_fp8_product else quant_linear.most_tokens(linear)
        few = num_tokens <= most and (in_quads or quant_linear.reaches(linear))
        vector = _vector_of(x, linear, gated) if few and num_tokens == 1 else None
        # which takes the norm in
        rounds = not few and norm_before is not None and norm_before.is_plain and has_fp8_product
        if norm_before is not None and (norm_before.centred or norm_before.bias is not None or not (vector or rounds)):
            x, norm_before = norm.norm(x, norm_before, launch_pdl=pdl), None
        if few:
            behind: dict[str, Any] = {
                "gated": gated,
                "activation": activation,
                "residual": residual,
                "out": out if residual is None else residual,
            }
            if vector is not None:
                return vector(x, linear, norm=norm_before, launch_pdl=pdl, **behind)
            narrow = int4_narrow.int4_narrow_linear if in_quads else quant_linear.quant_narrow_linear
            return narrow(x, linear, workspace=self._workspace, launch_pdl=pdl, **behind)
        if has_fp8_product:
            return self._fp8(x, linear, norm_before, gated, activation, residual, out)
        if norm_before is not None:
            x = norm.norm(x, norm_before, launch_pdl=pdl)
        weight = (
            dequantised(linear, x.dtype, launch_pdl=pdl)
            if in_quads or quant_linear.reaches(linear)
            else dequantise(linear).to(x.dtype)
        )
        # not as a programmatic dependent: those of one token read the weight before the launches that make it are
        # complete
        if num_tokens == 1:
            out = out if residual is None else residual
            return small_linear.vector_linear(
                x, weight, linear.bias, gated=gated, activation=activation, residual=residual, out=out
            )
        return self(x, Linear(weight, linear.bias), gated=gated, activation=activation, residual=residual, out=out)

    def _fp8(
        self,
        x: Tensor,
        linear: Linear,
        norm_before: Norm | None,
        gated: bool,
        activation: str,
        residual: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        """By 8-bit tensor cores; activations are rounded as the format says."""
        rounding, pdl = linear.format.rounding, self._pdl
        assert rounding is not None and linear.scale is not None
        kind = "blocks" if linear.format.block[1] else "rows"
        narrow = len(x) <= _NARROW_TOKENS[kind]
        by_cublas = kind == "rows" and not narrow
        if gated and (by_cublas or not fp8_narrow.reaches(linear, gated)):  # with the gate in a launch of its own
            product = self._fp8(x, linear, norm_before, False, activation, None, None)
            return activations.gate(product, activation, out=out, launch_pdl=pdl)
        numbers, scales = round_rows(x, rounding, linear.input_scale, norm=norm_before, launch_pdl=pdl)
        if by_cublas:
            scales = scales.flatten()[:, None]  # with the strides that it wants
            product = torch._scaled_mm(
                numbers, linear.weight.t(), scale_a=scales, scale_b=linear.scale.t(), bias=linear.bias,
                out_dtype=x.dtype,
            )  # fmt: skip
            if residual is not None:
                return residual.add_(product)
            return product if out is None else out.copy_(product)
        out = out if residual is None else residual
        if out is None:
            out = x.new_empty(len(x), linear.num_rows // (2 if gated else 1))
        behind: dict[str, Any] = {"gated": gated, "activation": activation, "residual": residual, "launch_pdl": pdl}
        if narrow:
            return fp8_narrow.fp8_narrow_linear(numbers, scales, linear, out, workspace=self._workspace, **behind)
        return block_linear(numbers, scales, linear, out, **behind)


def _vector_of(x: Tensor, linear: Linear, gated: bool) -> Any:
    """The product of one token without tensor cores, if that is the fastest one."""
    if linear.format.order == "quads":
        return int4_vector.int4_vector_linear if x.itemsize == 2 and int4_vector.is_vector(linear, gated) else None
    if fp8_vector.reaches(linear):
        return fp8_vector.fp8_vector_linear
    return quant_vector.quant_vector_linear if quant_linear.sums_in_registers(x, linear) else None


def _has_fp8_product(x: Tensor, linear: Linear) -> bool:
    """Whether 8-bit tensor cores can multiply x with the linear: both sides are of fp8; cuBLASLt wants bfloat16,
    multiples of 16, and Hopper or newer.
    """
    format = linear.format
    if format.codes != "fp8" or format.rounding is None or format.rounding.codes != "fp8":
        return False
    if format.block[1]:
        return format.block[1] == GROUP == format.rounding.group
    sizes = linear.num_rows % 16 == 0 and linear.num_columns % 16 == 0
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and sizes
        and not format.rounding.group
        and traits_of(x.device).capability >= (9, 0)
    )
