"""What quads.py packs, read in a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from paged_kernels.linear import WORDS_BLOCK

BLOCK = tl.constexpr(WORDS_BLOCK)  # columns whose words lie in an order of their own
WORDS = tl.constexpr(WORDS_BLOCK // 8)  # of a row in a block
INT4_ZERO = tl.constexpr(8)  # what means 0 where no zero is given


@triton.jit
def numbers_of_quads(w, zero, DTYPE: tl.constexpr, PACKED: tl.constexpr):
    """Words int32 [ROWS, WORDS], and what means 0 in each row, int32 [ROWS] -> DTYPE [ROWS, BLOCK], columns in order.

    PACKED: by instructions for two numbers at once, DTYPE is bfloat16 or float16. In the layout that tensor cores want
    the numbers stay with the thread that has read them.
    """
    ROWS: tl.constexpr = w.shape[0]
    if PACKED:
        # 2 ** 7 and more in bfloat16, and 2 ** 10 and more in float16: the last bits count ones
        less = (zero + (0xC300 if tl.bfloat16 == DTYPE else 0xE400)) * 0x10001
        less = tl.broadcast_to(less[:, None], (ROWS, WORDS))
        if tl.bfloat16 == DTYPE:
            a, b, c, d, e, f, g, h = _bfloat16_of_quads(w, less)
        else:
            a, b, c, d, e, f, g, h = _float16_of_quads(w, less)
        low = tl.join(tl.join(a, e), tl.join(c, g))
        found = tl.join(low, tl.join(tl.join(b, f), tl.join(d, h)))  # row, word, then bits 5, 4 and 3 of the column
        found = tl.reshape(found, (ROWS, 4, 2, 2, 2, 2, 2))  # row, q, bit 6, bit 0, bits 5, 4 and 3
        found = tl.reshape(tl.permute(found, (0, 2, 4, 5, 6, 1, 3)), (ROWS, BLOCK))
    else:
        column = tl.arange(0, BLOCK)
        # each word for all its columns: row, p, i, q, e
        wide = tl.permute(tl.reshape(w, (ROWS, 4, 4)), (0, 2, 1))
        wide = tl.reshape(tl.broadcast_to(wide[:, :, None, :, None], (ROWS, 4, 4, 4, 2)), (ROWS, BLOCK))
        found = (wide >> (16 * (column % 2) + 4 * (column // 8 % 4))[None, :]) & 15
        found = (found - zero[:, None]).to(DTYPE)
    return found


# Two words of a row as eight times two numbers; those of a quad's first thread are columns 8 k and 8 k + 1 of 64. Each
# is put into a float of the exponent at which the last bits count ones; that and what means 0 are subtracted.
_OF_NUMBER = """
        shr.b32 two, ${word}, {shift};
        lop3.b32 two, two, 0x000f000f, {ones}, 0xea;
        fma.rn.{type}x2 ${k}, two, one, $10;"""


def _of_quads(type: str, one: str, ones: str) -> tl.constexpr:
    numbers = "".join(_OF_NUMBER.format(word=8 + k // 4, shift=k % 4 * 4, ones=ones, type=type, k=k) for k in range(8))
    return tl.constexpr(f"{{\n        .reg .b32 two, one;\n        mov.b32 one, {one};{numbers}\n        }}")


_BFLOAT16_OF_QUADS = _of_quads("bf16", "0x3f803f80", "0x43004300")
_FLOAT16_OF_QUADS = _of_quads("f16", "0x3c003c00", "0x64006400")


@triton.jit
def _bfloat16_of_quads(w, less):
    return tl.inline_asm_elementwise(
        _BFLOAT16_OF_QUADS, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r", [w, less], dtype=(tl.bfloat16,) * 8,
        is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _float16_of_quads(w, less):
    return tl.inline_asm_elementwise(
        _FLOAT16_OF_QUADS, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r", [w, less], dtype=(tl.float16,) * 8,
        is_pure=True, pack=2,
    )  # fmt: skip
