"""Weights of 4- and 8-bit integers as compressed-tensors stores them: a number in a byte (int-quantized), or packed
into int32 (pack-quantized).

Source: compressed-tensors' compressors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from paged_backend.models.quantization.scheme import (
    Scheme,
    StoredKind,
    new_linear,
    scalar_shapes,
    spell_rounding,
    unpack_int32,
)
from paged_kernels.codes import pack_nibbles
from paged_kernels.linear import Format, Linear, Rounding


@dataclass(frozen=True)
class Int8(Scheme):
    """An int8 weight with one scale, or one a row."""

    per_tensor: bool
    rounding: Rounding | None

    @property
    def words(self) -> str:
        return f"int8 {'with one scale' if self.per_tensor else 'per channel'}{spell_rounding(self.rounding)}"

    def format(self, num_columns: int) -> Format:
        return Format("int8", (1, 0), self.rounding)

    def stored(self, num_rows: int, num_columns: int) -> dict[str, StoredKind]:
        found = {
            "weight": StoredKind(((num_rows, num_columns),), ("I8",)),
            "weight_scale": StoredKind(
                scalar_shapes() if self.per_tensor else ((num_rows, 1), (num_rows,)), is_scale=True
            ),
        }
        if self.rounding is not None and self.rounding.static:
            found["input_scale"] = StoredKind(scalar_shapes(), is_scale=True)
        return found

    def read(self, stored: Mapping[str, Tensor], num_rows: int, num_columns: int) -> Linear:
        linear = new_linear(self.format(num_columns), num_rows, num_columns, stored["weight"].device)
        assert linear.scale is not None
        linear.weight.copy_(stored["weight"])
        linear.scale.copy_(stored["weight_scale"].float().view(-1, 1))
        if linear.input_scale is not None:
            linear.input_scale.copy_(stored["input_scale"].view(1))
        return linear


def integer_format(num_bits: int, group_size: int, zeros: bool) -> Format:
    """Of unsigned integers with groups of group_size columns (0: whole rows); 8 bits have a zero in any case: they are
    stored unsigned.
    """
    return Format("int4" if num_bits == 4 else "int8", (1, group_size), zeros=zeros or num_bits == 8)


def unsigned_linear(numbers: Tensor, scale: Tensor, zero: Tensor | None, num_bits: int, group_size: int) -> Linear:
    """numbers: uint8 [rows, columns] below 2 ** num_bits; scale [rows, groups]; zero: uint8 as scale, None: the
    middle.
    """
    linear = new_linear(
        integer_format(num_bits, group_size, zero is not None), len(numbers), numbers.shape[1], numbers.device
    )
    assert linear.scale is not None
    linear.weight.copy_(pack_nibbles(numbers, linear.format.group(numbers.shape[1])) if num_bits == 4 else numbers)
    linear.scale.copy_(scale.float())
    if linear.zero is not None:
        if zero is None:
            linear.zero.fill_(2 ** (num_bits - 1))
        else:
            linear.zero.copy_(zero)
    return linear


@dataclass(frozen=True)
class Packed(Scheme):
    """Integers packed along rows, 8 or 4 in an int32, with scales of groups of columns or of rows. Weights alone:
    activations stay as they are.
    """

    num_bits: int
    group_size: int  # 0: a row
    symmetric: bool

    @property
    def words(self) -> str:
        whose = f"in groups of {self.group_size}" if self.group_size else "per channel"
        return f"int{self.num_bits} {whose}{'' if self.symmetric else ', asymmetric'}"

    def format(self, num_columns: int) -> Format:
        return integer_format(self.num_bits, self.group_size, not self.symmetric)

    def refusal(self, num_rows: int, num_columns: int) -> str:
        a_word = 32 // self.num_bits
        if num_columns % a_word:
            return f"its {num_columns} columns are no multiple of the {a_word} numbers in an int32"
        return super().refusal(num_rows, num_columns)

    def stored(self, num_rows: int, num_columns: int) -> dict[str, StoredKind]:
        a_word, groups = 32 // self.num_bits, num_columns // (self.group_size or num_columns)
        found = {
            "weight_packed": StoredKind(((num_rows, num_columns // a_word),), ("I32",)),
            "weight_scale": StoredKind(
                ((num_rows, groups), (num_rows,)) if groups == 1 else ((num_rows, groups),), is_scale=True
            ),
            "weight_shape": StoredKind(((2,),), ("I64", "I32"), optional=True),
        }
        if not self.symmetric:
            found["weight_zero_point"] = StoredKind(((-(-num_rows // a_word), groups),), ("I32",))
        return found

    def read(self, stored: Mapping[str, Tensor], num_rows: int, num_columns: int) -> Linear:
        if "weight_shape" in stored and stored["weight_shape"].tolist() != [num_rows, num_columns]:
            raise ValueError(
                f"weight_shape says {stored['weight_shape'].tolist()}, config.json implies {[num_rows, num_columns]}"
            )
        numbers = unpack_int32(stored["weight_packed"], self.num_bits)
        scale = stored["weight_scale"].view(num_rows, -1)
        zero = (
            None
            if self.symmetric
            else unpack_int32(stored["weight_zero_point"].T.contiguous(), self.num_bits)[:, :num_rows].T
        )
        return unsigned_linear(numbers, scale, zero, self.num_bits, self.group_size)
