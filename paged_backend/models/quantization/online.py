"""Weights that come as 16-bit floats and are rounded to fewer bits while they are read: the tunable `quantization`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from paged_backend.models.quantization.patterns import any_of
from paged_backend.models.quantization.quantization import Quantization, Rule
from paged_backend.models.quantization.scheme import Scheme, StoredKind, spell_rounding
from paged_kernels.codes import quantise
from paged_kernels.linear import Format, Linear, Rounding

INT4_GROUP = 128


@dataclass(frozen=True)
class OnlineFp8(Scheme):
    """A scale a row, chosen for its greatest magnitude; activations per token."""

    rounds: ClassVar[bool] = True

    @property
    def words(self) -> str:
        return f"fp8 per channel{spell_rounding(Rounding('fp8'))}, rounded while loading"

    def format(self, num_columns: int) -> Format:
        return Format("fp8", (1, 0), Rounding("fp8"))

    def stored(self, num_rows: int, num_columns: int) -> dict[str, StoredKind]:
        return {"weight": StoredKind(((num_rows, num_columns),))}

    def read(self, stored: Mapping[str, Tensor], num_rows: int, num_columns: int) -> Linear:
        if not bool(stored["weight"].isfinite().all()):
            raise ValueError("weight holds numbers that are not finite (NaN or infinity)")
        return quantise(stored["weight"], self.format(num_columns))


@dataclass(frozen=True)
class OnlineInt4(OnlineFp8):
    """Groups of 128 columns, or of the largest smaller power of two that divides them; round to nearest, symmetric."""

    @property
    def words(self) -> str:
        return f"int4 in groups of {INT4_GROUP}, rounded to nearest while loading, which costs quality"

    def format(self, num_columns: int) -> Format:
        group = INT4_GROUP
        while num_columns % group and group > 16:
            group //= 2
        return Format("int4", (1, group))


def read_online(name: Literal["fp8", "int4"]) -> Quantization:
    """The tunable's value -> a quantisation of everything but the head."""
    scheme = OnlineFp8() if name == "fp8" else OnlineInt4()
    return Quantization(
        f"quantization={name}", (Rule(any_of(["lm_head"]), None), Rule(lambda module: True, scheme)), online=True
    )
