"""Numbers of four bits, e2m1: a sign and one of eight magnitudes (OCP microscaling formats, 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the three lower bits; the fourth is the sign
MXFP4_GROUP = 32  # numbers that share a power of two


def numbers_of_e2m1(codes: Tensor) -> Tensor:
    """Codes, integers below 16 -> float32 of that shape."""
    table = torch.tensor((*MAGNITUDES, *(-x for x in MAGNITUDES)), device=codes.device)
    return table[codes.int()]


def codes_of_e2m1(numbers: Tensor) -> Tensor:
    """Floats -> the codes of the nearest numbers, uint8 of that shape; those beyond 6 become 6."""
    table = torch.tensor(MAGNITUDES, device=numbers.device)
    middles = (table[1:] + table[:-1]) / 2
    return torch.bucketize(numbers.abs(), middles).to(torch.uint8) | (numbers < 0).to(torch.uint8) << 3
