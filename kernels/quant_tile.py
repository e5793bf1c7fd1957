"""Quantised numbers as they are stored -> floats in registers: what the kernels that multiply by them share.

In bfloat16 four bytes become floats at once, by instructions on pairs: a product of few tokens has no time for more
than three instructions for each number of a weight of 4 bits, whose bytes come at 4.6 TB/s. Elsewhere each is converted
alone.

Sources: numbers put into the last bits of a float of known exponent: Kim et al., "Who Says Elephants Can't Run", 2022;
e4m3 and e2m1: OCP 8-bit floating point and microscaling formats, 2023.
"""

from __future__ import annotations

import triton
import triton.language as tl

CODE_OF = {"fp8": 0, "int8": 1, "int4": 2, "fp4": 3}
_FP8, INT4, _FP4 = tl.constexpr(0), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def floats(codes, CODES: tl.constexpr):
    """What is stored in a byte, or in the lower half of one, without scale and zero: float32."""
    if CODES == _FP4:
        bits = ((codes & 7).to(tl.uint16) << 9) | ((codes & 8).to(tl.uint16) << 12)
        numbers = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    elif CODES == _FP8:
        numbers = codes.to(tl.float32)
    else:
        # The conversion of bytes is an eighth as fast as an addition: a number is added to the last bits of 1.5 * 2 **
        # 23, and that is subtracted.
        numbers = (codes.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    return numbers


@triton.jit
def numbers(w, CODES: tl.constexpr, MIDDLE: tl.constexpr, DTYPE: tl.constexpr, PACKED: tl.constexpr):
    """Bytes as floats without scale and zero, MIDDLE subtracted: those of whole bytes or low nibbles, and of high ones.
    PACKED: DTYPE is bfloat16, and four bytes are read at once.
    """
    if PACKED and CODES == _FP8:
        low = _bfloat16_of_fp8(w.to(tl.uint8, bitcast=True))
        high = low
    elif PACKED and CODES == INT4:
        low, high = _bfloat16_of_int4(w)
    elif PACKED and CODES == _FP4:
        low, high = _bfloat16_of_fp4(w)
    else:
        low = floats(w & 15 if CODES >= INT4 else w, CODES) - MIDDLE
        high = floats(w >> 4 if CODES >= INT4 else w, CODES) - MIDDLE
    return low, high


@triton.jit
def _bfloat16_of_fp8(w):
    """e4m3 -> bfloat16, five instructions for two: the bits move to where bfloat16 has them, and its exponent, which is
    too small by 120 then, is put right by a product with 2 ** 120.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, bits, power, none;
        mov.b32 power, 0x7b807b80;
        mov.b32 none, 0x80008000;
        prmt.b32 low, $2, 0, 0x1404;
        prmt.b32 high, $2, 0, 0x3424;
        shr.b32 bits, low, 4;
        and.b32 bits, bits, 0x07f007f0;
        lop3.b32 low, low, 0x80008000, bits, 0xea;
        fma.rn.bf16x2 $0, low, power, none;
        shr.b32 bits, high, 4;
        and.b32 bits, bits, 0x07f007f0;
        lop3.b32 high, high, 0x80008000, bits, 0xea;
        fma.rn.bf16x2 $1, high, power, none;
        }""",
        "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _bfloat16_of_int4(w):
    """Nibbles 0 to 15 -> -8 to 7 in bfloat16, low ones and high ones, twelve instructions for eight: a nibble is put
    into the last bits of 128, and 136 is subtracted.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d, one, less;
        mov.b32 one, 0x3f803f80;
        mov.b32 less, 0xc308c308;
        prmt.b32 a, $4, 0, 0x4140;
        prmt.b32 b, $4, 0, 0x4342;
        shr.b32 c, a, 4;
        shr.b32 d, b, 4;
        lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 c, c, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 d, d, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $0, a, one, less;
        fma.rn.bf16x2 $1, b, one, less;
        fma.rn.bf16x2 $2, c, one, less;
        fma.rn.bf16x2 $3, d, one, less;
        }""",
        "=r,=r,=r,=r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _bfloat16_of_fp4(w):
    """e2m1 -> bfloat16, low nibbles and high ones: as `_bfloat16_of_fp8`, with 2 ** 126."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, bits, power, none;
        mov.b32 power, 0x7e807e80;
        mov.b32 none, 0x80008000;
        prmt.b32 a, $4, 0, 0x1404;
        prmt.b32 b, $4, 0, 0x3424;
        shr.b32 bits, a, 2;
        and.b32 bits, bits, 0x01c001c0;
        shl.b32 $0, a, 4;
        lop3.b32 $0, $0, 0x80008000, bits, 0xea;
        fma.rn.bf16x2 $0, $0, power, none;
        shr.b32 bits, a, 6;
        and.b32 bits, bits, 0x01c001c0;
        lop3.b32 a, a, 0x80008000, bits, 0xea;
        fma.rn.bf16x2 $2, a, power, none;
        shr.b32 bits, b, 2;
        and.b32 bits, bits, 0x01c001c0;
        shl.b32 $1, b, 4;
        lop3.b32 $1, $1, 0x80008000, bits, 0xea;
        fma.rn.bf16x2 $1, $1, power, none;
        shr.b32 bits, b, 6;
        and.b32 bits, bits, 0x01c001c0;
        lop3.b32 b, b, 0x80008000, bits, 0xea;
        fma.rn.bf16x2 $3, b, power, none;
        }""",
        "=&r,=&r,=&r,=&r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def scaled_numbers(
    w, row, there, begin, scale, zero,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    CODES: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr, MIDDLE: tl.constexpr,
    DTYPE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What a tile [ROWS, BLOCK] of bytes means, times the scales of its groups if there are any: as `load_tile`."""
    SHARED: tl.constexpr = GROUP if GROUPED and GROUP < BLOCK else BLOCK
    PARTS: tl.constexpr = BLOCK // SHARED
    NUM_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    low, high = numbers(w, CODES, MIDDLE, DTYPE, PACKED)
    if ZEROS or GROUPED:
        part = begin + tl.arange(0, PARTS) * SHARED
        index = (row // BLOCK_ROWS * NUM_GROUPS)[:, None] + (part // GROUP)[None, :]
        known = there & (part < K)[None, :]
        low, high = tl.reshape(low, (ROWS, PARTS, SHARED)), tl.reshape(high, (ROWS, PARTS, SHARED))
        # Four bits times a scale of fp8 are exact in bfloat16; other scales are not.
        EXACT: tl.constexpr = CODES == _FP4 and scale.dtype.element_ty == tl.float8e4nv
        INNER: tl.constexpr = DTYPE if EXACT else tl.float32
        low, high = low.to(INNER), high.to(INNER)
        if ZEROS:
            z = MIDDLE - tl.load(zero + index, mask=known, other=0).to(tl.float32)[:, :, None]
            low += z.to(INNER)
            high += z.to(INNER)
        if GROUPED:
            s = tl.load(scale + index, mask=known, other=0.0).to(tl.float32)[:, :, None]
            low *= s.to(INNER)
            high *= s.to(INNER)
        low, high = tl.reshape(low, (ROWS, BLOCK)), tl.reshape(high, (ROWS, BLOCK))
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def load_tile(
    at, row, there, begin, scale, zero,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    CODES: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr, MIDDLE: tl.constexpr,
):  # fmt: skip
    """A tile of the weight, BLOCK bytes of each row: as float32 [ROWS, BLOCK], those of the low nibbles or of the whole
    bytes, and of the high ones.
    """
    column = begin + tl.arange(0, BLOCK)
    w = tl.load(at + column[None, :], mask=there & (column < K)[None, :], other=0.0, eviction_policy="evict_first")
    return scaled_numbers(
        w, row, there, begin, scale, zero, K, ROWS, BLOCK, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS, MIDDLE,
        tl.float32, False,
    )  # fmt: skip
