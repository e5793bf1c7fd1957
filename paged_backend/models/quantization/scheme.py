"""What a scheme is: the tensors that a module is stored in, and what they mean in a format of kernels/linear.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paged_kernels.linear import Format, Linear, Rounding, empty_linear

FLOATS = ("F32", "F16", "BF16")  # safetensors' names of the types that can be loaded


@dataclass(frozen=True)
class StoredKind:
    """A tensor of a module, as a checkpoint must have it."""

    shapes: tuple[tuple[int, ...], ...]  # any of these
    kinds: tuple[str, ...] = FLOATS  # safetensors' names of its type, any of these
    optional: bool = False
    is_scale: bool = False  # holds positive finite numbers only
    may_be_zero: bool = False  # of a scale: of a group of zeros


@dataclass(frozen=True)
class Scheme(ABC):
    """A way to store a module's weight. Its methods take the rows and columns of the weight."""

    rounds: ClassVar[bool] = False  # the checkpoint has floats, which `read` rounds

    @property
    @abstractmethod
    def words(self) -> str:
        """For logs and errors, such as "fp8 per channel"."""

    @abstractmethod
    def format(self, num_columns: int) -> Format:
        """That `read` makes linears of."""

    def refusal(self, num_rows: int, num_columns: int) -> str:
        """Why no weight of that shape can be stored so; "" if one can."""
        group = self.format(num_columns).block[1]
        return (
            f"its {num_columns} columns are no multiple of the group of {group}"
            if group and num_columns % group
            else ""
        )

    @abstractmethod
    def stored(self, num_rows: int, num_columns: int) -> Mapping[str, StoredKind]:
        """The last part of a tensor's name, such as weight_scale -> what it must be."""

    @abstractmethod
    def read(self, stored: Mapping[str, Tensor], num_rows: int, num_columns: int) -> Linear:
        """The module's linear without its bias, from the tensors of `stored` that it has, on their device.

        Raises:
            ValueError: their numbers cannot be used; the sentence begins with the last part of a tensor's name.
        """


def new_linear(format: Format, num_rows: int, num_columns: int, device: torch.device) -> Linear:
    """An uninitialised one for `read` to fill."""
    return empty_linear(num_rows, num_columns, format, torch.float32, device)


def scalar_shapes() -> tuple[tuple[int, ...], ...]:
    """One number, as publishers store it."""
    return (), (1,), (1, 1)


def unpack_int32(packed: Tensor, num_bits: int) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, n * 32 / num_bits]: the lowest bits of a number come first."""
    shifts = torch.arange(0, 32, num_bits, dtype=torch.int32, device=packed.device)
    fields: Tensor = (packed[:, :, None] >> shifts) & (2**num_bits - 1)
    return fields.to(torch.uint8).flatten(1)


def spell_rounding(rounding: Rounding | None) -> str:
    if rounding is None:
        return ""
    whose = (
        "with fixed scales" if rounding.static else f"in groups of {rounding.group}" if rounding.group else "per token"
    )
    return f", activations rounded to {rounding.codes} {whose}"
