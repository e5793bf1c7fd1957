"""Weights of 4-bit floats (e2m1): NVFP4, 16 columns a scale and a scale on top, and MXFP4, 32 columns a power of two.

Sources: OCP microscaling formats, 2023; NVIDIA's Model Optimizer and compressed-tensors for the names of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paged_backend.models.quantization.scheme import Scheme, StoredKind, new_linear, scalar_shapes
from paged_kernels.codes import pack_nibbles
from paged_kernels.e2m1 import MXFP4_GROUP
from paged_kernels.linear import Format, Linear

NVFP4_GROUP = 16


@dataclass(frozen=True)
class Nvfp4(Scheme):
    """Activations stay as they are: no product of 4-bit floats exists before Blackwell, and the checkpoint's input
    scales are for those.
    """

    packed_name: str = "weight"
    global_name: str = "weight_scale_2"
    divided: bool = False  # whether the scale on top divides, as compressed-tensors has it

    @property
    def words(self) -> str:
        return f"NVFP4 weights in groups of {NVFP4_GROUP}, activations as they are"

    def format(self, num_columns: int) -> Format:
        return Format("fp4", (1, NVFP4_GROUP), row_scales=True, scale_dtype=torch.float8_e4m3fn)

    def stored(self, num_rows: int, num_columns: int) -> dict[str, StoredKind]:
        return {
            self.packed_name: StoredKind(((num_rows, num_columns // 2),), ("U8",)),
            "weight_scale": StoredKind(
                ((num_rows, num_columns // NVFP4_GROUP),), ("F8_E4M3",), is_scale=True, may_be_zero=True
            ),
            self.global_name: StoredKind(scalar_shapes(), is_scale=True),
        }

    def read(self, stored: Mapping[str, Tensor], num_rows: int, num_columns: int) -> Linear:
        linear = new_linear(self.format(num_columns), num_rows, num_columns, stored[self.packed_name].device)
        assert linear.scale is not None and linear.row_scale is not None
        linear.weight.copy_(pack_nibbles(in_order(stored[self.packed_name]), NVFP4_GROUP))
        linear.scale.copy_(stored["weight_scale"])
        on_top = stored[self.global_name].float().view(1)
        linear.row_scale.copy_((1.0 / on_top if self.divided else on_top).expand(num_rows))
        return linear


@dataclass(frozen=True)
class Mxfp4(Scheme):
    """Scales are powers of two, stored as their exponents; in bfloat16 here, which holds them all."""

    @property
    def words(self) -> str:
        return f"MXFP4 weights in groups of {MXFP4_GROUP}, activations as they are"

    def format(self, num_columns: int) -> Format:
        return Format("fp4", (1, MXFP4_GROUP), scale_dtype=torch.bfloat16)

    def stored(self, num_rows: int, num_columns: int) -> dict[str, StoredKind]:
        return {
            "weight_packed": StoredKind(((num_rows, num_columns // 2),), ("U8",)),
            "weight_scale": StoredKind(((num_rows, num_columns // MXFP4_GROUP),), ("U8", "F8_E8M0")),
        }

    def read(self, stored: Mapping[str, Tensor], num_rows: int, num_columns: int) -> Linear:
        linear = new_linear(self.format(num_columns), num_rows, num_columns, stored["weight_packed"].device)
        assert linear.scale is not None
        exponents = stored["weight_scale"].view(torch.uint8)
        if bool((exponents == 255).any()):
            raise ValueError("weight_scale holds the exponent 255, which means NaN")
        linear.weight.copy_(pack_nibbles(in_order(stored["weight_packed"]), MXFP4_GROUP))
        linear.scale.copy_(torch.exp2(exponents.float() - 127))
        return linear


def in_order(packed: Tensor) -> Tensor:
    """uint8 [rows, n] -> [rows, 2 n]: the lower half of a byte comes first."""
    return torch.stack((packed & 15, packed >> 4), 2).flatten(1)
