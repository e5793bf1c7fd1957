"""A matrix that activations are multiplied with, as a value that ops take whole: how its numbers are stored is a matter
of its `Format`.

codes.py turns stored numbers into float32 and back, and reference_layers.py multiplies with those; products.py chooses
a kernel that reads them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Codes = Literal["plain", "fp8", "int8", "int4", "fp4"]
Order = Literal["halves", "words", "quads"]
WORDS_BLOCK = 128  # columns of a weight in words that lie together


@dataclass(frozen=True)
class Rounding:
    """What activations are rounded to before a product of 8-bit numbers."""

    codes: Literal["fp8", "int8"]
    group: int = 0  # columns of a token that share a scale; 0: all of them
    static: bool = False  # the scale is Linear.input_scale, else the group's greatest magnitude decides
    power_of_two: bool = False  # scales are rounded up to one


@dataclass(frozen=True)
class Format:
    """How a weight's numbers are stored.

    plain: as floats of the activations' type. fp8: float8_e4m3fn. int8: int8, or uint8 with a zero. int4: unsigned, two
    in a byte. fp4: e2m1, two in a byte. Two in a byte, in halves: of the columns that share a scale the first half is
    in low nibbles, the second in high ones, so that a kernel reads either without shuffling. In words: experts of fp4;
    numbers and scales lie as tensor cores want them (words.py), columns are padded to whole blocks of 128. In quads:
    int4 with columns and groups that are multiples of 128; numbers of 128 columns lie as tensor cores want them
    (quads.py), and in memory those columns of all rows come before the next, of weights, scales and zeros alike.
    """

    codes: Codes = "plain"
    block: tuple[int, int] = (1, 0)  # rows and columns that share a scale; 0 columns: a whole row
    rounding: Rounding | None = None
    zeros: bool = False  # each scale has a zero of its own; without one it is 0, for int4 8
    row_scales: bool = False  # a scale of each row on top
    scale_dtype: torch.dtype = torch.float32
    order: Order = "halves"  # of two numbers in a byte

    def scale_shape(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Of the scales of a weight of that shape."""
        rows, columns = self.block
        return -(-num_rows // rows), -(-self.stored_columns(num_columns) // (columns or num_columns))

    def stored_columns(self, num_columns: int) -> int:
        """Columns that a weight of so many has in memory."""
        return -(-num_columns // WORDS_BLOCK) * WORDS_BLOCK if self.order == "words" else num_columns

    def group(self, num_columns: int) -> int:
        """Columns that share a scale."""
        return self.block[1] or num_columns

    @property
    def has_fp8(self) -> bool:
        """Whether numbers or scales of the weight are of float8_e4m3fn."""
        return self.codes == "fp8" or self.scale_dtype == torch.float8_e4m3fn

    @property
    def nibbles(self) -> bool:
        """Whether a byte of the weight holds two numbers."""
        return self.codes in ("int4", "fp4")


PLAIN = Format()


def in_quads(format: Format, num_columns: int) -> bool:
    """Whether a weight of that format and so many columns can lie in quads, which takes products of few tokens least
    time.
    """
    return format.codes == "int4" and format.group(num_columns) % WORDS_BLOCK == 0 == num_columns % WORDS_BLOCK


@dataclass(frozen=True, eq=False)
class Linear:
    """x -> x @ W.T + bias, W [out, in] = weight's numbers * scale * row_scale. Two are the same only if they are one
    object.
    """

    # [out, in], rows contiguous, of the type that format.codes says; two numbers in a byte: uint8 [out, in / 2],
    # in words [out, (in + num_padded) / 2], in words.py's order; in quads [out, in / 128, 64]
    weight: Tensor
    bias: Tensor | None = None  # [out], of the activations' type
    format: Format = PLAIN
    scale: Tensor | None = None  # format.scale_shape, format.scale_dtype
    zero: Tensor | None = None  # uint8, as scale: the number that means 0
    row_scale: Tensor | None = None  # float32 [out]
    input_scale: Tensor | None = None  # float32 [1]: of activations, if their rounding is static
    partial: bool = False  # the product is this rank's part of a sum over ranks (rank_ops.py)
    num_padded: int = 0  # columns that are stored behind those of the matrix, in words

    @property
    def num_rows(self) -> int:
        return len(self.weight)

    @property
    def num_columns(self) -> int:
        return self.weight[0].numel() * (2 if self.format.nibbles else 1) - self.num_padded

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it consists of."""
        return tuple(
            x
            for x in (self.weight, self.bias, self.scale, self.zero, self.row_scale, self.input_scale)
            if x is not None
        )

    def rows(self, begin: int, end: int) -> Linear:
        """A part of its rows, the same memory. begin is a multiple of the rows that share a scale.

        Raises ValueError for a linear in words, whose rows do not lie one after another.
        """
        self._check_divisible()
        block = self.format.block[0]
        assert begin % block == 0, f"row {begin} is inside a block of {block}"
        in_blocks = slice(begin // block, -(-end // block))
        return replace(
            self,
            weight=self.weight[begin:end],
            bias=None if self.bias is None else self.bias[begin:end],
            scale=None if self.scale is None else self.scale[in_blocks],
            zero=None if self.zero is None else self.zero[in_blocks],
            row_scale=None if self.row_scale is None else self.row_scale[begin:end],
        )

    def columns(self, begin: int, end: int) -> Linear:
        """A part of its columns, the same memory, without the bias. begin and end are multiples of the columns that
        share a scale, or there is one a row.

        Raises ValueError for others, and for a linear in words.
        """
        self._check_divisible()
        group = self.format.group(self.num_columns)
        if self.format.block[1] and (begin % group or (end % group and end != self.num_columns)):
            raise ValueError(f"columns {begin} to {end} are not whole groups of {group}")
        if self.format.nibbles and not self.format.block[1]:
            raise ValueError("columns of a weight with one scale a row and two numbers in a byte cannot be divided")
        together = WORDS_BLOCK if self.format.order == "quads" else 2 if self.format.nibbles else 1
        in_groups = slice(begin // group, -(-end // group)) if self.format.block[1] else slice(None)
        return replace(
            self,
            weight=self.weight[:, begin // together : end // together],
            bias=None,
            scale=None if self.scale is None else self.scale[:, in_groups],
            zero=None if self.zero is None else self.zero[:, in_groups],
        )

    def _check_divisible(self) -> None:
        if self.format.order == "words":
            raise ValueError("a linear in words cannot be divided")


def empty_linear(
    num_rows: int, num_columns: int, format: Format, dtype: torch.dtype, device: torch.device, *, bias: bool = False
) -> Linear:
    """An uninitialised linear. dtype: of activations, and so of a plain weight and of the bias.

    Raises ValueError for columns that the format's groups do not divide.
    """
    group = format.group(num_columns)
    if format.nibbles and (num_columns % group or group % 2):
        raise ValueError(f"{num_columns} columns are no multiple of {group} that share a scale")

    def empty(*shape: int, of: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device=device)

    weight_types = {
        "fp8": torch.float8_e4m3fn,
        "int8": torch.uint8 if format.zeros else torch.int8,
        "int4": torch.uint8,
        "fp4": torch.uint8,
    }

    def for_groups(of: torch.dtype) -> Tensor:
        rows, groups = format.scale_shape(num_rows, num_columns)
        return empty(groups, rows, of=of).T if format.order == "quads" else empty(rows, groups, of=of)

    scaled = format.codes != "plain"
    stored = format.stored_columns(num_columns)
    if format.order == "quads":
        weight = empty(stored // WORDS_BLOCK, num_rows, WORDS_BLOCK // 2, of=torch.uint8).transpose(0, 1)
    else:
        weight = empty(num_rows, stored // 2 if format.nibbles else stored, of=weight_types.get(format.codes, dtype))
    return Linear(
        weight=weight,
        bias=empty(num_rows, of=dtype) if bias else None,
        format=format,
        scale=for_groups(format.scale_dtype) if scaled else None,
        zero=for_groups(torch.uint8) if scaled and format.zeros else None,
        row_scale=empty(num_rows, of=torch.float32) if scaled and format.row_scales else None,
        input_scale=empty(1, of=torch.float32) if format.rounding is not None and format.rounding.static else None,
        num_padded=stored - num_columns,
    )
