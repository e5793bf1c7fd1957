"""MXFP4 as 8-bit tensor cores want it: eight numbers of e2m1 in a word of 32 bits, exponents of groups beside them.

`pack_words` says where a number lies; device_words.py, which alone needs the Triton language, reads it on the device. A
group's power of two is stored in two parts: that of its row, a float32, and a byte with what is left of the exponent, 0
to 11, times eight. So much can be added to the exponent of an e2m1, and it is still a number of e4m3, if both are 2 **
5 too small.
Sources: OCP Microscaling Formats v1.0, 2023; PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk32".
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_kernels.e2m1 import MXFP4_GROUP as GROUP
from paged_kernels.e2m1 import codes_of_e2m1, numbers_of_e2m1
from paged_kernels.linear import WORDS_BLOCK, Linear

MOST_STEPS = 11  # that the exponent of an e2m1 can grow, and it is still a number of e4m3


def in_blocks(x: Tensor, size: int) -> Tensor:
    """[rows, columns] -> a tensor of that shape, in whose memory `size` columns of all rows come first, then those of
    the next: what a kernel reads at once lies together.
    """
    return x.view(len(x), -1, size).transpose(0, 1).contiguous().view(x.shape)


def in_rows(x: Tensor, size: int) -> Tensor:
    """What `in_blocks` was given."""
    return x.contiguous().view(-1, len(x), size).transpose(0, 1).reshape(x.shape)


def pack_words(codes: Tensor) -> Tensor:
    """uint8 [rows, columns] below 16, of e2m1 -> uint8 [rows, columns up to a multiple of 128 / 2], words of 32 bits,
    in another order than the shape says: `in_blocks`.

    Word 4 q + i of a block of 128 columns holds columns 32 i + 16 h + 4 q + e, for h of 0 and 1 and e of 0 to 3: what
    thread q of a quad has of product i of a row, as the tensor cores' first operand. So no number has to change places.
    The magnitude of number (h, e) is in bits 16 h + 4 e to 16 h + 4 e + 2, where an instruction takes it as the index
    of a byte; its sign in bit 8 e + 7 - 4 h, where a byte has it, or four below.
    """
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % WORDS_BLOCK))
    parts = padded.view(len(codes), -1, 4, 2, 4, 4).int().transpose(2, 4)  # row, block, q, h, i, e
    h, e = _places(codes.device)
    bits = ((parts & 7) << (16 * h + 4 * e)) | ((parts >> 3) << (8 * e + 7 - 4 * h))
    return in_blocks(bits.sum((3, 5), dtype=torch.int32).view(len(codes), -1).view(torch.uint8), WORDS_BLOCK // 2)


def unpack_words(packed: Tensor, num_columns: int) -> Tensor:
    """What `pack_words` was given, so many columns."""
    words = in_rows(packed, WORDS_BLOCK // 2).view(torch.int32)
    words = words.view(len(packed), -1, 4, 1, 4, 1)  # row, block, q, h, i, e
    h, e = _places(packed.device)
    codes = ((words >> (16 * h + 4 * e)) & 7) | ((words >> (8 * e + 7 - 4 * h)) & 1) << 3
    return codes.to(torch.uint8).transpose(2, 4).reshape(len(packed), -1)[:, :num_columns]


def _places(device: torch.device) -> tuple[Tensor, Tensor]:
    """h and e of a word's numbers, int32 [2, 1, 1] and [4]."""
    h = torch.arange(2, dtype=torch.int32, device=device)
    return h[:, None, None], torch.arange(4, dtype=torch.int32, device=device)


def group_scales(scale: Tensor) -> Tensor:
    """Linear.scale of a linear in words, uint8 [rows, stored groups], `in_blocks` -> the powers of two that it means,
    float32 of that shape, in rows.
    """
    return (in_rows(scale, WORDS_BLOCK // GROUP).float() / 8).exp2()


def fill_words(linear: Linear, codes: Tensor, exponents: Tensor) -> None:
    """Stores uint8 [out, in], e2m1 below 16, times powers of two, uint8 [out, in / 32], 127 more than their exponents.

    A group whose power of two is 2 ** 12 times or more smaller than the greatest of its row gets the least that there
    is for that row, 2 ** 11 times smaller, and its numbers are rounded: by at most 2 ** -13 of the greatest power.
    """
    assert linear.scale is not None and linear.row_scale is not None
    used = (codes.view(len(codes), -1, GROUP) & 7).any(2)
    known = exponents.int() * used  # of nothing but zeros any will do
    least = (known.amax(1, keepdim=True) - MOST_STEPS).clamp(min=0)
    steps = known - least
    if bool((used & (steps < 0)).any()):
        below = steps.clamp(max=0).float().exp2().repeat_interleave(GROUP, 1)
        codes = codes_of_e2m1(numbers_of_e2m1(codes) * below)
    padded = torch.nn.functional.pad(steps.clamp(min=0) * 8, (0, linear.scale.shape[1] - steps.shape[1]))
    linear.weight.copy_(pack_words(codes))
    linear.scale.copy_(in_blocks(padded, WORDS_BLOCK // GROUP))
    linear.row_scale.copy_((least[:, 0].float() - 127).exp2())
