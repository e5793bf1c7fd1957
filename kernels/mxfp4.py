"""Numbers of 4 bits in groups of 32 that share a scale (OCP Microscaling Formats v1.0, 2023): what gpt-oss's experts
are published in.

A number is e2m1: sign, two bits of exponent, one of mantissa, so 0, 0.5, 1, 1.5, 2, 3, 4 or 6. Two lie in a byte, the
first in the lower half. A group's scale is e8m0: 2 ** (byte - 127), and 255 is no number.
"""

from __future__ import annotations

import torch

GROUP = 32  # numbers of a scale
GROUP_BYTES = 16
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NOT_A_NUMBER = 255  # as a scale


def dequantise(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [..., n / 2] and [..., at least n / 32] -> [..., n]."""
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.float32, device=packed.device)
    numbers = torch.stack((values[(packed & 0xF).long()], values[(packed >> 4).long()]), dim=-1).flatten(-2)
    exponents = scales[..., : packed.shape[-1] // GROUP_BYTES].int() - 127
    powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    return (numbers.unflatten(-1, (-1, GROUP)) * powers[..., None]).flatten(-2).to(dtype)
