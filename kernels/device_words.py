"""What words.py packs, read in a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from paged_kernels.linear import WORDS_BLOCK

BLOCK = tl.constexpr(WORDS_BLOCK)  # columns that lie together, which kernels read at once
WORDS = tl.constexpr(WORDS_BLOCK // 8)  # of a row in a block
WORDS_REST = tl.constexpr(2.0**5)  # what `numbers_of_words` leaves to the sums: 0.5 is e4m3's least normal number there


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
