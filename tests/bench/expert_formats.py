"""The formats that experts are published in, or rounded to while they are loaded, by the names that benchmarks take."""

from __future__ import annotations

from dataclasses import replace

import torch

from paged_kernels.experts import MXFP4, ExpertLinear
from paged_kernels.linear import PLAIN, Format

EXPERT_FORMATS = {
    "plain": PLAIN,
    "fp8_block": Format("fp8", (128, 128)),
    "fp8": Format("fp8", (1, 0)),
    "int4": Format("int4", (1, 128)),
    "int4_g32": Format("int4", (1, 32), zeros=True, scale_dtype=torch.float16),
    "int8": Format("int8", (1, 0)),
    "mxfp4": MXFP4,
    "nvfp4": Format("fp4", (1, 16), row_scales=True, scale_dtype=torch.float8_e4m3fn),
}


def format_of(name: str, num_columns: int) -> Format:
    """Of a matrix of so many columns: groups are halved until they divide them, as loading does."""
    format = EXPERT_FORMATS[name]
    rows, group = format.block
    while format.nibbles and group and num_columns % group:
        group //= 2
    return replace(format, block=(rows, group))


def format_bytes(name: str, num_rows: int, num_columns: int) -> int:
    """Of a matrix with its scales."""
    format = format_of(name, num_columns)
    if format.codes == "plain":
        return 2 * num_rows * num_columns
    scales_rows, scales_columns = format.scale_shape(num_rows, num_columns)
    of_a_scale = format.scale_dtype.itemsize + (1 if format.zeros else 0)
    numbers = num_rows * format.stored_columns(num_columns) // (2 if format.nibbles else 1)
    return numbers + scales_rows * scales_columns * of_a_scale + (4 * num_rows if format.row_scales else 0)


def fill_at_random(linear: ExpertLinear) -> None:
    """With numbers of about the size that keeps activations as large as they are."""
    deviation = linear.num_columns**-0.5
    for tensor in linear.tensors:
        if tensor is linear.scale and linear.format.order == "words":
            tensor.zero_()
        elif tensor is linear.row_scale and linear.format.order == "words":
            tensor.fill_(2.0**-6)
        elif tensor is linear.row_scale:
            tensor.fill_(1.0)
        elif tensor is linear.scale:
            tensor.copy_(torch.full_like(tensor, deviation / 8, dtype=torch.float32))
        elif tensor is linear.zero:
            tensor.fill_(8 if linear.format.codes == "int4" else 128)
        elif tensor.dtype == torch.float8_e4m3fn:
            tensor.copy_(torch.randn(tensor.shape[1:], device=tensor.device).expand(tensor.shape))
        elif tensor.dtype == torch.int8:
            tensor.random_(-128, 128)
        elif tensor.dtype == torch.uint8:
            tensor.random_(0, 256)
        else:
            tensor.normal_(0, deviation)
