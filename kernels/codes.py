"""Numbers as they are stored in few bits: to float32 and back, in plain torch. The specification of what the quantised
kernels read.

Sources: OCP 8-bit floating point, 2023 (e4m3: no infinity, the greatest number is 448); OCP microscaling formats, 2023
    (e2m1).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from paged_kernels.linear import Format, Linear, Rounding, empty_linear

FP8_MAX = 448.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the three lower bits; the fourth is the sign
WORDS_GROUP = 32  # columns that four words hold
_LEAST_SCALE = 1e-12  # of a group of zeros
_GREATEST = {"fp8": FP8_MAX, "int8": 127.0, "int4": 7.0, "fp4": 6.0}  # magnitude that scales are chosen for

# least and greatest number, half the range
ACTIVATION_RANGES = {"fp8": (-FP8_MAX, FP8_MAX, FP8_MAX), "int8": (-128.0, 127.0, 127.5)}


def pack_nibbles(codes: Tensor, group: int) -> Tensor:
    """uint8 [rows, columns] below 16 -> uint8 [rows, columns / 2]: of each `group` columns the first half low, the
    second high.
    """
    low, high = codes.view(len(codes), -1, 2, group // 2).unbind(2)
    return (low | (high << 4)).reshape(len(codes), -1)


def unpack_nibbles(packed: Tensor, group: int) -> Tensor:
    """What `pack_nibbles` was given."""
    parts = packed.view(len(packed), -1, 1, group // 2)
    return torch.cat((parts & 15, parts >> 4), 2).reshape(len(packed), -1)


def pack_words(codes: Tensor) -> Tensor:
    """uint8 [rows, columns] below 16, of e2m1, columns a multiple of 32 -> uint8 [rows, columns / 2], words of 32 bits.

    Word j of the four that hold 32 columns has columns 16 h + 8 g + 2 j + e, for h, g and e of 0 and 1: what a thread
    of a quad has of a row of bfloat16 as the tensor cores' first operand (PTX ISA, "Matrix Fragments for mma.m16n8k16"
    and "wgmma.mma_async.m64nNk16"), so that no number has to change places. e chooses the half of the word, i = 2 h + g
    one of the four numbers in a half, sign s and e e m:

        bit of a half   15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
        number i         0  3  3  1  3  3  2  0  0  0  1  1  1  2  2  2
                         s  s  m  s  e  e  s  e  e  m  e  e  m  e  e  m

    One mask leaves number 0 of both halves where bfloat16 has sign, exponent and mantissa, of a value 2 ** -126 of its
    own; shifted by three and six bits it does so with 1 and 2. The idea is that of triton_kernels for Hopper.
    """
    parts = codes.view(len(codes), -1, 2, 2, 4, 2).int().flatten(2, 3)  # row, 32 columns, i, j, e
    sign, rest = parts & 8, parts & 7
    halves = sign[:, :, 0] << 12 | rest[:, :, 0] << 6 | sign[:, :, 1] << 9 | rest[:, :, 1] << 3
    halves |= sign[:, :, 2] << 6 | rest[:, :, 2]
    halves |= sign[:, :, 3] << 11 | (rest[:, :, 3] & 1) << 13 | (rest[:, :, 3] & 6) << 9
    words = halves[..., 0] | halves[..., 1] << 16
    return words.view(torch.uint8).view(len(codes), -1)


def unpack_words(packed: Tensor) -> Tensor:
    """What `pack_words` was given."""
    words = packed.contiguous().view(torch.int32).view(len(packed), -1, 4)
    halves = torch.stack((words, words >> 16), 3)  # row, 32 columns, j, e
    numbers = [
        (halves >> 12 & 8) | (halves >> 6 & 7),
        (halves >> 9 & 8) | (halves >> 3 & 7),
        (halves >> 6 & 8) | (halves & 7),
        (halves >> 11 & 8) | (halves >> 9 & 6) | (halves >> 13 & 1),
    ]
    return torch.stack(numbers, 2).to(torch.uint8).reshape(len(packed), -1)


def pack_codes(codes: Tensor, format: Format) -> Tensor:
    """uint8 [rows, columns] below 16 -> as a weight of `format`, int4 or fp4, has them: uint8 [rows, columns / 2]."""
    return pack_words(codes) if format.order == "words" else pack_nibbles(codes, format.group(codes.shape[1]))


def decode(linear: Linear) -> Tensor:
    """The numbers of a weight before any scale, float32 [out, in]."""
    codes = linear.format.codes
    if not linear.format.nibbles:
        return linear.weight.float()
    if linear.format.order == "words":
        numbers = unpack_words(linear.weight)
    else:
        numbers = unpack_nibbles(linear.weight, linear.format.group(linear.num_columns))
    if codes == "int4":
        return numbers.float()
    table = torch.tensor((*_E2M1, *(-x for x in _E2M1)), device=numbers.device)
    return table[numbers.int()]


def dequantise(linear: Linear) -> Tensor:
    """The matrix that a linear means, float32 [out, in]."""
    if linear.format.codes == "plain" or linear.scale is None:
        return linear.weight.float()
    numbers = decode(linear)
    if linear.zero is not None:
        numbers -= _spread(linear.zero.float(), linear)
    elif linear.format.codes == "int4":
        numbers -= 8
    numbers *= _spread(linear.scale.float(), linear)
    return numbers if linear.row_scale is None else numbers * linear.row_scale[:, None]


def _spread(scales: Tensor, linear: Linear) -> Tensor:
    """One for each number of the weight; a view where it can be."""
    rows, columns = linear.format.block
    wide = scales.repeat_interleave(rows, 0)[: linear.num_rows] if rows > 1 else scales
    return wide.repeat_interleave(columns, 1)[:, : linear.num_columns] if columns else wide


def quantise(weight: Tensor, format: Format) -> Linear:
    """A weight [out, in] rounded to the nearest numbers of `format`, whose scales are such that the greatest magnitude
    of each block just fits.

    Symmetric: zeros, if the format has them, are the middle. Without a bias.
    Raises ValueError as `empty_linear`.
    """
    wide = weight.float()
    linear = empty_linear(*weight.shape, format, weight.dtype, weight.device)
    if linear.scale is None:
        return replace(linear, weight=weight)
    scale = _amax(wide, format) / _GREATEST[format.codes]
    if linear.row_scale is not None:  # leaves scales of blocks at most FP8_MAX: they may be of 8 bits themselves
        linear.row_scale.copy_((scale.amax() / FP8_MAX).clamp(min=_LEAST_SCALE).expand(len(weight)))
        scale = scale / linear.row_scale[0]
    linear.scale.copy_(
        scale.clamp(min=2.0**-9 if format.scale_dtype == torch.float8_e4m3fn else _LEAST_SCALE).to(format.scale_dtype)
    )
    numbers = wide / (
        _spread(linear.scale.float(), linear) * (1.0 if linear.row_scale is None else linear.row_scale[:, None])
    )
    if linear.zero is not None:
        linear.zero.fill_(8 if format.codes == "int4" else 128)
    linear.weight.copy_(_encode(numbers, linear))
    return linear


def _amax(x: Tensor, format: Format) -> Tensor:
    """[out, in] -> the greatest magnitude of each block, format.scale_shape."""
    rows, columns = format.block[0], format.group(x.shape[1])
    padded = torch.nn.functional.pad(x.abs(), (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    return padded.view(len(padded) // rows, rows, -1, columns).amax((1, 3))


def _encode(numbers: Tensor, linear: Linear) -> Tensor:
    """float32 [out, in] -> as linear.weight stores them."""
    codes, zeros = linear.format.codes, linear.format.zeros
    if codes == "fp8":
        return numbers.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    if codes == "int8":
        whole = numbers.round().clamp(-127, 127)
        return (whole + 128).to(torch.uint8) if zeros else whole.to(torch.int8)
    if codes == "int4":
        nibbles = (numbers.round().clamp(-7, 7) + 8).to(torch.uint8)
    else:
        table = torch.tensor(_E2M1, device=numbers.device)
        middles = (table[1:] + table[:-1]) / 2
        nibbles = torch.bucketize(numbers.abs(), middles).to(torch.uint8) | (numbers < 0).to(torch.uint8) << 3
    return pack_codes(nibbles, linear.format)


def round_activations(x: Tensor, rounding: Rounding, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[T, in] -> numbers [T, in] of rounding.codes' type, and scales, float32 [T, groups]: x is about numbers * its
    group's scale.

    Dynamic scales map a group's greatest magnitude to half the range of the numbers, 448 or 127.5, as
    compressed-tensors has it.
    """
    wide = x.float()
    least, greatest, half = ACTIVATION_RANGES[rounding.codes]
    group = rounding.group or x.shape[1]
    padded = torch.nn.functional.pad(wide, (0, -x.shape[1] % group)).view(len(x), -1, group)
    if rounding.static:
        assert input_scale is not None, "static rounding without a scale"
        scale = input_scale.expand(len(x), padded.shape[1])
    else:
        scale = padded.abs().amax(2).clamp(min=_LEAST_SCALE) / half
        if rounding.power_of_two:
            scale = scale.log2().ceil().exp2()
    numbers = padded / scale[:, :, None]
    numbers = (
        numbers.clamp(least, greatest).to(torch.float8_e4m3fn)
        if rounding.codes == "fp8"
        else numbers.round().clamp(least, greatest).to(torch.int8)
    )
    return numbers.flatten(1)[:, : x.shape[1]], scale


def rounded(x: Tensor, linear: Linear) -> Tensor:
    """x as a product with `linear` sees it: rounded as its format says, back in float32."""
    rounding = linear.format.rounding
    if rounding is None:
        return x
    numbers, scale = round_activations(x, rounding, linear.input_scale)
    spread = scale.repeat_interleave(rounding.group, 1)[:, : x.shape[1]] if rounding.group else scale
    return numbers.float() * spread
