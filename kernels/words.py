"""MXFP4 as 8-bit tensor cores want it: eight numbers of e2m1 in a word of 32 bits, exponents of groups beside them.

`pack_words` says where a number lies, `numbers_of_words` reads it on the device. A group's power of two is stored in
two parts: that of its row, a float32, and a byte with what is left of the exponent, 0 to 11, times eight. So much can
be added to the exponent of an e2m1, and it is still a number of e4m3, if both are 2 ** 5 too small.
Sources: OCP Microscaling Formats v1.0, 2023; PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk32".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paged_kernels.e2m1 import MXFP4_GROUP as GROUP
from paged_kernels.e2m1 import codes_of_e2m1, numbers_of_e2m1
from paged_kernels.linear import WORDS_BLOCK, Linear

BLOCK = tl.constexpr(WORDS_BLOCK)  # columns that lie together, which kernels read at once
WORDS = tl.constexpr(WORDS_BLOCK // 8)  # of a row in a block
WORDS_REST = tl.constexpr(2.0**5)  # what `numbers_of_words` leaves to the sums: 0.5 is e4m3's least normal number there
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


@triton.jit
def numbers_of_words(w, s, DTYPE: tl.constexpr, PACKED: tl.constexpr):
    """Words int32 [ROWS, WORDS], and what is added to the exponents of their four groups, eight times, in the bytes of
    s, int32 [ROWS] -> DTYPE [ROWS, BLOCK], columns in order, WORDS_REST too small.

    PACKED: by instructions for four numbers at once, DTYPE is float8_e4m3fn. In the layout that tensor cores want the
    numbers stay with the thread that has read them.
    """
    ROWS: tl.constexpr = w.shape[0]
    if PACKED:
        a, b, c, d, e, f, g, h = _fp8_of_words(w, tl.broadcast_to(s[:, None], (ROWS, WORDS)))
        low = tl.join(tl.join(a, e), tl.join(c, g))
        found = tl.join(low, tl.join(tl.join(b, f), tl.join(d, h)))  # row, word, then bits 2, 1 and 0 of 16 columns'
        found = tl.reshape(tl.permute(found, (0, 2, 3, 4, 1)), (ROWS, BLOCK))
    else:
        column = tl.arange(0, BLOCK)
        # each word for all its columns: row, q, i, h, e
        wide = tl.reshape(w, (ROWS, 4, 4))
        wide = tl.reshape(
            tl.broadcast_to(tl.permute(wide, (0, 2, 1))[:, :, None, :, None], (ROWS, 4, 2, 4, 4)), (ROWS, BLOCK)
        )
        i, half, e = column // 32, column // 16 % 2, column % 4
        bits = ((wide >> (16 * half + 4 * e)[None, :]) & 7) << 22
        bits |= (wide >> (8 * e + 7 - 4 * half)[None, :]) << 31
        more = (s[:, None] >> (8 * i + 3)[None, :]) & 31
        # exponent and mantissa are where float32 has them, 2 ** 126 too small: 2 ** 100, 2 ** 21 and WORDS_REST
        factor = ((more + (127 + 21)) << 23).to(tl.float32, bitcast=True)
        found = (bits.to(tl.float32, bitcast=True) * 2.0**100 * factor).to(DTYPE)
    return found


# Of the words of product i of four columns each: a table of the eight magnitudes with the group's exponent added, in
# which magnitudes are looked up, four at once; then their signs.
_OF_PRODUCT = """
        prmt.b32 more, ${scale}, 0, 0x444{i};
        mad.lo.u32 small, more, 0x01010100, 0x14100800;
        mad.lo.u32 large, more, 0x01010101, 0x24201c18;
        and.b32 at, ${word}, 0x77777777;
        prmt.b32 four, small, large, at;
        lop3.b32 ${low}, ${word}, 0x80808080, four, 0xea;
        shr.u32 at, at, 16;
        prmt.b32 four, small, large, at;
        shl.b32 at, ${word}, 4;
        lop3.b32 ${high}, at, 0x80808080, four, 0xea;"""
_FP8_OF_WORDS = tl.constexpr(
    "{\n        .reg .b32 more, small, large, at, four;"
    + "".join(_OF_PRODUCT.format(i=i, low=2 * i, high=2 * i + 1, word=8 + i, scale=12 + i) for i in range(4))
    + "\n        }"
)


@triton.jit
def _fp8_of_words(w, s):
    """Four words of a row as eight times four numbers: number k of word c is column 16 k + c of the block."""
    return tl.inline_asm_elementwise(
        _FP8_OF_WORDS, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r", [w, s], dtype=(tl.float8e4nv,) * 8,
        is_pure=True, pack=4,
    )  # fmt: skip
