"""Numbers as they are stored in few bits: to float32 and back, in plain torch. The specification of what the quantised
kernels read.

Sources: OCP 8-bit floating point, 2023 (e4m3: no infinity, the greatest number is 448). e2m1: e2m1.py.
    Words: words.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from paged_kernels.e2m1 import MAGNITUDES, codes_of_e2m1, numbers_of_e2m1
from paged_kernels.linear import Format, Linear, Rounding, empty_linear
from paged_kernels.quads import pack_quads, unpack_quads
from paged_kernels.words import fill_words, group_scales, unpack_words

FP8_MAX = 448.0
_LEAST_SCALE = 1e-12  # of a group of zeros
_GREATEST = {"fp8": FP8_MAX, "int8": 127.0, "int4": 7.0, "fp4": MAGNITUDES[-1]}  # magnitude that scales are chosen for

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


def store_nibbles(numbers: Tensor, format: Format) -> Tensor:
    """uint8 [rows, columns] below 16 -> Linear.weight of a format that is not in words."""
    if format.order == "quads":
        return pack_quads(numbers)
    return pack_nibbles(numbers, format.group(numbers.shape[1]))


def stored_nibbles(linear: Linear) -> Tensor:
    """Of a linear with two numbers in a byte, uint8 [out, in] below 16, columns in order."""
    if linear.format.order == "words":
        return unpack_words(linear.weight, linear.num_columns)
    if linear.format.order == "quads":
        return unpack_quads(linear.weight)
    return unpack_nibbles(linear.weight, linear.format.group(linear.num_columns))


def decode(linear: Linear) -> Tensor:
    """The numbers of a weight before any scale, float32 [out, in]."""
    if not linear.format.nibbles:
        return linear.weight.float()
    numbers = stored_nibbles(linear)
    return numbers.float() if linear.format.codes == "int4" else numbers_of_e2m1(numbers)


def dequantise(linear: Linear) -> Tensor:
    """The matrix that a linear means, float32 [out, in]."""
    if linear.format.codes == "plain" or linear.scale is None:
        return linear.weight.float()
    numbers = decode(linear)
    if linear.zero is not None:
        numbers -= _spread(linear.zero.float(), linear)
    elif linear.format.codes == "int4":
        numbers -= 8
    scale = group_scales(linear.scale) if linear.format.order == "words" else linear.scale.float()
    numbers *= _spread(scale, linear)
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
    if format.order == "words":
        exponents = scale.clamp(min=2.0**-126).log2().ceil()
        codes = codes_of_e2m1(wide / _spread(exponents.exp2(), linear))
        fill_words(linear, codes, (exponents + 127).to(torch.uint8))
        return linear
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
    """float32 [out, in] -> as linear.weight stores them, which is not in words."""
    codes, zeros = linear.format.codes, linear.format.zeros
    if codes == "fp8":
        return numbers.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    if codes == "int8":
        whole = numbers.round().clamp(-127, 127)
        return (whole + 128).to(torch.uint8) if zeros else whole.to(torch.int8)
    if codes == "int4":
        nibbles = (numbers.round().clamp(-7, 7) + 8).to(torch.uint8)
    else:
        nibbles = codes_of_e2m1(numbers)
    return store_nibbles(nibbles, linear.format)


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
