"""Quantised numbers as they are stored -> floats in registers: what the kernels that multiply by them share.

In bfloat16 four bytes become floats at once, by instructions on pairs: a product of few tokens has no time for more
than three instructions for each number of a weight of 4 bits, whose bytes come at 4.6 TB/s. Elsewhere each is converted
alone.

Sources: numbers put into the last bits of a float of known exponent: Kim et al., "Who Says Elephants Can't Run", 2022;
e4m3 and e2m1: OCP 8-bit floating point and microscaling formats, 2023.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.linear import Format

CODE_OF = {"plain": 0, "fp8": 1, "int8": 2, "int4": 3, "fp4": 4}
PLAIN, FP8, INT8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
INT4, FP4 = tl.constexpr(3), tl.constexpr(4)
FP4_REST = tl.constexpr(2.0**32)  # what `scaled_fp4` leaves to the sums
_FP4_SCALE = tl.constexpr(2.0**94)  # the rest of 2 ** 126
INT4_MIDDLE = tl.constexpr(8.0)  # what means 0 where no zero is given


def is_packed(x: torch.Tensor, format: Format) -> bool:
    """Whether four bytes become numbers at once: bfloat16 on a GPU, and a format of `packs`."""
    return x.is_cuda and x.dtype == torch.bfloat16 and packs(format)


def is_packed_alone(x: torch.Tensor, format: Format) -> bool:
    """The same of products without tensor cores: of two numbers in a byte. Those of fp8 are read in words there
    (`dot_of_fp8`), or converted one by one.
    """
    return format.nibbles and is_packed(x, format)


def packs(format: Format) -> bool:
    """Whether bytes of the format can become bfloat16 four at once: not those of int8, which have a bit more than its
    mantissa.
    """
    return format.codes in ("fp8", "int4", "fp4")


@triton.jit
def floats(codes, CODES: tl.constexpr):
    """What is stored in a byte, or in the lower half of one, without scale and zero: float32. int4: n below 128 is the
    end of 128 + n, whose exponent is known; e2m1 lies as float16 does, 2 ** 14 too small.
    """
    if CODES == INT4:
        found = ((codes.to(tl.uint32) << 16) | 0x43000000).to(tl.float32, bitcast=True) - 128.0
    elif CODES == FP4:
        bits = ((codes & 7).to(tl.uint16) << 9) | ((codes & 8).to(tl.uint16) << 12)
        found = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    elif CODES == INT8:
        # the conversion of bytes is slow: added to the last bits of 1.5 * 2 ** 23, which is subtracted
        found = (codes.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    else:
        found = codes.to(tl.float32)
    return found


@triton.jit
def numbers(w, CODES: tl.constexpr, PACKED: tl.constexpr, PURE: tl.constexpr = True):
    """Bytes as floats without scale and zero, int4 less INT4_MIDDLE: those of whole bytes or low nibbles, and of high
    ones. float32; PACKED: bfloat16, four bytes at once. Not PURE: where the bytes were loaded to; otherwise the
    compiler may move them first to where their floats are wanted, byte by byte.
    """
    if PACKED and CODES == FP8:
        low = _bfloat16_of_fp8(w.to(tl.uint8, bitcast=True), PURE)
        high = low
    elif PACKED and CODES == INT4:
        low, high = _bfloat16_of_int4(w, PURE)
    elif PACKED and CODES == FP4:
        low, high = _bits_of_fp4(w, PURE)
        exponent = tl.full((1, 1), 2.0**126, tl.bfloat16)
        low, high = low * exponent, high * exponent
    else:
        low = floats(w & 15 if CODES >= INT4 else w, CODES)
        high = floats(w >> 4 if CODES >= INT4 else w, CODES)
        if CODES == INT4:
            low, high = low - INT4_MIDDLE, high - INT4_MIDDLE
    return low, high


@triton.jit
def load_zeros(at, known, CODES: tl.constexpr):
    """What is to be subtracted from `numbers`: float32."""
    z = tl.load(at, mask=known, other=0).to(tl.float32)
    if CODES == INT4:
        z -= INT4_MIDDLE
    return z


@triton.jit
def corrected(found, s, z, SCALED: tl.constexpr, ZEROS: tl.constexpr, EXACT: tl.constexpr, DTYPE: tl.constexpr):
    """What `numbers` returns -> of DTYPE, less zeros z (load_zeros) if ZEROS, times scales s if SCALED; both float32.
    EXACT: the results are numbers of DTYPE, so that nothing is lost if it is what computes.
    """
    INNER: tl.constexpr = DTYPE if EXACT else tl.float32
    if ZEROS or SCALED:
        found = found.to(INNER)
    if ZEROS:
        found = (found - z.to(INNER)).to(INNER)
    if SCALED:
        found *= s.to(INNER)
    return found.to(DTYPE)


@triton.jit
def _bfloat16_of_fp8(w, PURE: tl.constexpr):
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
        "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=PURE, pack=4,
    )  # fmt: skip


@triton.jit
def fours(values):
    """[N] -> those at 4 k, 4 k + 1, 4 k + 2 and 4 k + 3: four [1, N / 4]."""
    even, odd = tl.split(tl.reshape(values, (1, values.shape[0] // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _fp8_of_word(w, PLACE: tl.constexpr):
    return ((w >> 8 * PLACE) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def dot_of_fp8(w, a, b, c, d, PACKED: tl.constexpr):
    """Words of four e4m3 times a to d, summed: float32. PACKED: two numbers are converted at once, which takes 2.5
    instructions each with the product; the compiler, given bytes, takes them apart first and needs 7.
    """
    if PACKED:
        found = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high, a, b, c, d;
            .reg .b32 two;
            .reg .f32 n, sum;
            mov.b32 {low, high}, $1;
            cvt.rn.f16x2.e4m3x2 two, low;
            mov.b32 {a, b}, two;
            cvt.rn.f16x2.e4m3x2 two, high;
            mov.b32 {c, d}, two;
            cvt.f32.f16 n, a;
            mul.f32 sum, n, $2;
            cvt.f32.f16 n, b;
            fma.rn.f32 sum, n, $3, sum;
            cvt.f32.f16 n, c;
            fma.rn.f32 sum, n, $4, sum;
            cvt.f32.f16 n, d;
            fma.rn.f32 $0, n, $5, sum;
            }""",
            "=f,r,f,f,f,f", [w, a, b, c, d], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        found = _fp8_of_word(w, 0) * a + _fp8_of_word(w, 1) * b + _fp8_of_word(w, 2) * c + _fp8_of_word(w, 3) * d
    return found


@triton.jit
def _bfloat16_of_int4(w, PURE: tl.constexpr):
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
        "=r,=r,=r,=r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=PURE, pack=4,
    )  # fmt: skip


@triton.jit
def _bits_of_fp4(w, PURE: tl.constexpr):
    """e2m1 -> bfloat16 with the bits in their places and no more, so that it is too small by 2 ** 126."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, bits;
        prmt.b32 a, $4, 0, 0x1404;
        prmt.b32 b, $4, 0, 0x3424;
        shr.b32 bits, a, 2;
        and.b32 bits, bits, 0x01c001c0;
        shl.b32 $0, a, 4;
        lop3.b32 $0, $0, 0x80008000, bits, 0xea;
        shr.b32 bits, a, 6;
        and.b32 bits, bits, 0x01c001c0;
        lop3.b32 $2, a, 0x80008000, bits, 0xea;
        shr.b32 bits, b, 2;
        and.b32 bits, bits, 0x01c001c0;
        shl.b32 $1, b, 4;
        lop3.b32 $1, $1, 0x80008000, bits, 0xea;
        shr.b32 bits, b, 6;
        and.b32 bits, bits, 0x01c001c0;
        lop3.b32 $3, b, 0x80008000, bits, 0xea;
        }""",
        "=&r,=&r,=&r,=&r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=PURE, pack=4,
    )  # fmt: skip


@triton.jit
def scaled_fp4(w, s, PACKED: tl.constexpr, PURE: tl.constexpr = True):
    """Bytes of e2m1 times their scales, low nibbles and high ones: bfloat16, FP4_REST too small, which the sums are to
    be multiplied by. One product puts the exponent right and scales.

    w: uint8; s: float32 of w's shape or one that is broadcast to it, of magnitude at most 2 ** 33. Exact for scales of
    up to five significant bits from 2 ** -93 on, as those of fp8 and powers of two are. PURE: as of `numbers`.
    """
    if PACKED:
        low, high = _bits_of_fp4(w, PURE)
        factor = (s * _FP4_SCALE).to(tl.bfloat16)
    else:  # as the interpreter can, which has no arithmetic in bfloat16
        low = (((w & 7).to(tl.uint32) << 22) | ((w & 8).to(tl.uint32) << 28)).to(tl.float32, bitcast=True)
        high = (((w & 0x70).to(tl.uint32) << 18) | ((w & 0x80).to(tl.uint32) << 24)).to(tl.float32, bitcast=True)
        factor = s * _FP4_SCALE
    return (low * factor).to(tl.bfloat16), (high * factor).to(tl.bfloat16)


@triton.jit
def scaled_numbers(
    w, row, there, begin, scale, zero,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    CODES: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr,
    DTYPE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What a tile [ROWS, BLOCK] of bytes means, times the scales of its groups if there are any: as `load_tile`."""
    SHARED: tl.constexpr = GROUP if GROUPED and GROUP < BLOCK else BLOCK
    PARTS: tl.constexpr = BLOCK // SHARED
    NUM_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    low, high = numbers(w, CODES, PACKED)
    s, z = 1.0, 0.0
    if ZEROS or GROUPED:
        part = begin + tl.arange(0, PARTS) * SHARED
        index = (row // BLOCK_ROWS * NUM_GROUPS)[:, None] + (part // GROUP)[None, :]
        known = there & (part < K)[None, :]
        low, high = tl.reshape(low, (ROWS, PARTS, SHARED)), tl.reshape(high, (ROWS, PARTS, SHARED))
        if ZEROS:
            z = load_zeros(zero + index, known, CODES)[:, :, None]
        if GROUPED:
            s = tl.load(scale + index, mask=known, other=0.0).to(tl.float32)[:, :, None]
    # Four bits times a scale of fp8 are exact in bfloat16; other scales are not.
    EXACT: tl.constexpr = CODES == FP4 and scale.dtype.element_ty == tl.float8e4nv
    low = tl.reshape(corrected(low, s, z, GROUPED, ZEROS, EXACT, DTYPE), (ROWS, BLOCK))
    high = tl.reshape(corrected(high, s, z, GROUPED, ZEROS, EXACT, DTYPE), (ROWS, BLOCK))
    return low, high


@triton.jit
def load_tile(
    at, row, there, begin, scale, zero,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    CODES: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """A tile of the weight, BLOCK bytes of each row: as float32 [ROWS, BLOCK], those of the low nibbles or of the whole
    bytes, and of the high ones.
    """
    column = begin + tl.arange(0, BLOCK)
    w = tl.load(at + column[None, :], mask=there & (column < K)[None, :], other=0.0, eviction_policy="evict_first")
    return scaled_numbers(
        w, row, there, begin, scale, zero, K, ROWS, BLOCK, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS,
        tl.float32, False,
    )  # fmt: skip
