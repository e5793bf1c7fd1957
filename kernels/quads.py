"""Numbers of 4 bits as the tensor cores want them for products in 16 bits: eight in a word of 32 bits, in the order in
which four neighbouring threads, a quad, multiply them.

`pack_quads` says where a number lies; device_quads.py, which alone needs the Triton language, reads it on the device:
an instruction takes two nibbles that lie 16 bits apart and puts them into the last bits of two floats of known
exponent, and a second one subtracts that.
Sources: numbers in a float's last bits: Kim et al., "Who Says Elephants Can't Run", 2022; an order made for the tensor
cores: Marlin, Frantar et al., 2024; PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16".
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_kernels.linear import WORDS_BLOCK, Linear


def pack_quads(numbers: Tensor) -> Tensor:
    """uint8 [rows, columns] below 16, columns a multiple of 128 -> uint8 [rows, columns / 128, 64], words of 32 bits.

    Word 4 q + p of a block of 128 columns holds columns 32 p + 8 i + 2 q + e, for i of 0 to 3 and e of 0 and 1, in the
    four bits from 16 e + 4 i on: what thread q of a quad has of products 2 p and 2 p + 1 of a row, as the tensor cores'
    first operand. So no number has to change places.
    """
    parts = numbers.view(len(numbers), -1, 4, 2, 2, 4, 2)  # row, block, p, i / 2, i % 2, q, e
    low, high = parts.unbind(4)
    return (low | (high << 4)).permute(0, 1, 4, 2, 5, 3).reshape(*parts.shape[:2], WORDS_BLOCK // 2)


def unpack_quads(packed: Tensor) -> Tensor:
    """What `pack_quads` was given."""
    parts = packed.reshape(*packed.shape[:2], 4, 4, 2, 2).permute(0, 1, 3, 5, 2, 4)  # row, block, p, i / 2, q, e
    return torch.stack((parts & 15, parts >> 4), 4).reshape(len(packed), -1)


def words_of(linear: Linear) -> Tensor:
    """A linear's words as they lie in memory, int32 [blocks, rows, 16].

    Raises ValueError if it is not in quads, or some of the rows of one.
    """
    in_quads = linear.format.order == "quads"
    words = linear.weight.transpose(0, 1) if in_quads else linear.weight
    if not in_quads or not words.is_contiguous():
        raise ValueError(f"{linear.format} of {linear.num_rows} x {linear.num_columns} is not in quads, and whole")
    return words.view(torch.int32)
