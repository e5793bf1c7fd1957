"""Bytes of few bits as floats in registers, against the table of what they mean."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from paged_kernels.codes import decode
from paged_kernels.linear import Format, Linear
from paged_kernels.quant_tile import FP4_REST, scaled_fp4

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP8_SCALES = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
POWERS = torch.cat((2.0 ** torch.arange(-93, 34), torch.zeros(1)))


@triton.jit
def _scale(codes, scales, out, COUNT: tl.constexpr, PACKED: tl.constexpr):
    """[COUNT, 256] bytes -> float32 [COUNT, 2, 256]."""
    row, column = tl.arange(0, COUNT)[:, None], tl.arange(0, 256)[None, :]
    w = tl.load(codes + row * 256 + column)
    low, high = scaled_fp4(w, tl.load(scales + row), PACKED)
    tl.store(out + row * 512 + column, low.to(tl.float32) * FP4_REST)
    tl.store(out + row * 512 + 256 + column, high.to(tl.float32) * FP4_REST)


@pytest.mark.parametrize("scales", [FP8_SCALES, POWERS], ids=["fp8", "powers of two"])
def test_four_bits_times_a_scale_are_exact(scales: torch.Tensor) -> None:
    count = 128
    scales = torch.nn.functional.pad(scales, (0, count - len(scales))).to(DEVICE)
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).expand(count, 256).contiguous()
    numbers = decode(Linear(codes, format=Format("fp4"), scale=scales)).view(count, 2, 256)
    out = torch.full((count, 2, 256), float("nan"), device=DEVICE)
    _scale[(1,)](codes, scales, out, COUNT=count, PACKED=DEVICE.type == "cuda")
    assert torch.equal(out, numbers * scales[:, None, None])
