"""AWQ's 4-bit weights in the layout "gemm": columns of the transposed weight are packed eight in an int32, the even
ones before the odd ones.

Sources: AWQ, Lin et al., 2023; AutoAWQ's WQLinear_GEMM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paged_backend.errors import EngineError
from paged_backend.models.quantization.integers import integer_format, unsigned_linear
from paged_backend.models.quantization.patterns import any_of, strings_of
from paged_backend.models.quantization.quantization import Quantization, Rule
from paged_backend.models.quantization.scheme import Scheme, StoredKind, unpack_int32
from paged_kernels.linear import Format, Linear

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the eight numbers in order, in an int32


@dataclass(frozen=True)
class Awq(Scheme):
    group_size: int  # 0: all columns

    @property
    def words(self) -> str:
        return f"AWQ int4 {f'in groups of {self.group_size}' if self.group_size else 'per channel'}, asymmetric"

    def format(self, num_columns: int) -> Format:
        return integer_format(4, self.group_size, True)

    def refusal(self, num_rows: int, num_columns: int) -> str:
        return f"its {num_rows} rows are no multiple of 8" if num_rows % 8 else super().refusal(num_rows, num_columns)

    def stored(self, num_rows: int, num_columns: int) -> dict[str, StoredKind]:
        groups = num_columns // (self.group_size or num_columns)
        return {
            "qweight": StoredKind(((num_columns, num_rows // 8),), ("I32",)),
            "qzeros": StoredKind(((groups, num_rows // 8),), ("I32",)),
            "scales": StoredKind(((groups, num_rows),), is_scale=True),
        }

    def read(self, stored: Mapping[str, Tensor], num_rows: int, num_columns: int) -> Linear:
        weight, zero = (_unpacked(stored[name]) for name in ("qweight", "qzeros"))
        return unsigned_linear(weight, stored["scales"].T, zero, 4, self.group_size)


def _unpacked(packed: Tensor) -> Tensor:
    """int32 [n, rows / 8] -> uint8 [rows, n]."""
    places = torch.tensor(_PLACES, device=packed.device)
    return unpack_int32(packed, 4).view(len(packed), -1, 8)[:, :, places].flatten(1).T.contiguous()


def read_awq(config: Mapping[str, Any]) -> Quantization:
    """quant_method "awq".

    Raises:
        EngineError: it asks for something that is not supported.
    """
    bits, group = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size", 128))
    version = str(config.get("version", "gemm")).lower()
    if bits != 4:
        raise EngineError(f"quantization_config: awq: bits: {str(bits)[:80]} is not supported; supported: 4")
    if version != "gemm":
        raise EngineError(f"quantization_config: awq: version: {version[:80]} is not supported; supported: gemm")
    if config.get("zero_point", True) is not True:
        raise EngineError("quantization_config: awq: zero_point: false is not supported; supported: true")
    if not isinstance(group, int) or (group != -1 and (group < 16 or group % 16)):
        raise EngineError(
            f"quantization_config: awq: group_size: {str(group)[:80]} is not supported; supported: -1 and "
            "multiples of 16"
        )
    skipped = strings_of(config.get("modules_to_not_convert"), "modules_to_not_convert")
    return Quantization(
        "awq", (Rule(any_of([*skipped, "lm_head"]), None), Rule(lambda module: True, Awq(max(group, 0))))
    )
