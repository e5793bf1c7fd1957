"""float8_e4m3fn weights: with one scale, one a row, or one a block of 128 × 128; and the quant_method "fp8" of
DeepSeek's, Qwen's and others' releases.

Sources: DeepSeek-V3 technical report, 2024, section 3.3 (blocks); transformers' FineGrainedFP8Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from paged_backend.errors import EngineError
from paged_backend.models.quantization.patterns import any_of, strings_of
from paged_backend.models.quantization.quantization import Quantization, Rule
from paged_backend.models.quantization.scheme import (
    FLOATS,
    Scheme,
    StoredKind,
    new_linear,
    scalar_shapes,
    spell_rounding,
)
from paged_kernels.linear import Format, Linear, Rounding

BLOCK = 128


@dataclass(frozen=True)
class Float8(Scheme):
    """The fp8 weight `weight` and its scales, which numbers are multiplied with."""

    strategy: Literal["tensor", "channel", "block"]
    rounding: Rounding | None
    scale_name: str = "weight_scale"

    @property
    def words(self) -> str:
        whose = {"tensor": "with one scale", "channel": "per channel", "block": f"in blocks of {BLOCK} x {BLOCK}"}[
            self.strategy
        ]
        return f"fp8 {whose}{spell_rounding(self.rounding)}"

    def refusal(self, num_rows: int, num_columns: int) -> str:
        return ""

    def format(self, num_columns: int) -> Format:
        return Format("fp8", (BLOCK, BLOCK) if self.strategy == "block" else (1, 0), self.rounding)

    def stored(self, num_rows: int, num_columns: int) -> dict[str, StoredKind]:
        shapes = {
            "tensor": scalar_shapes(),
            "channel": ((num_rows, 1), (num_rows,)),
            "block": ((-(-num_rows // BLOCK), -(-num_columns // BLOCK)),),
        }[self.strategy]
        found = {
            "weight": StoredKind(((num_rows, num_columns),), ("F8_E4M3",)),
            self.scale_name: StoredKind(shapes, (*FLOATS, "F8_E8M0"), is_scale=True),
        }
        if self.rounding is not None and self.rounding.static:
            found["input_scale"] = StoredKind(scalar_shapes(), is_scale=True)
        return found

    def read(self, stored: Mapping[str, Tensor], num_rows: int, num_columns: int) -> Linear:
        weight = stored["weight"]
        linear = new_linear(self.format(num_columns), num_rows, num_columns, weight.device)
        assert linear.scale is not None
        linear.weight.copy_(weight)
        scale = stored[self.scale_name].float()
        linear.scale.copy_(scale if self.strategy == "block" else scale.view(-1, 1))
        if linear.input_scale is not None:
            linear.input_scale.copy_(stored["input_scale"].view(1))
        return linear


def read_fp8(config: Mapping[str, Any]) -> Quantization:
    """quant_method "fp8".

    Raises:
        EngineError: it asks for something that is not supported.
    """
    size, activations, scale_format = (
        config.get("weight_block_size"),
        config.get("activation_scheme", "dynamic"),
        config.get("scale_fmt"),
    )
    if config.get("quant_algo"):
        raise EngineError(
            f"quantization_config: fp8 beside modelopt's quant_algo {str(config['quant_algo'])[:80]} is not supported"
        )
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise EngineError(f"quantization_config: fmt: {str(config['fmt'])[:80]} is not supported; supported: e4m3")
    if size not in (None, [BLOCK, BLOCK]):
        raise EngineError(
            f"quantization_config: weight_block_size: {str(size)[:80]} is not supported; supported: [{BLOCK}, "
            f"{BLOCK}], null"
        )
    if activations not in ("dynamic", "static") or (size is not None and activations != "dynamic"):
        raise EngineError(
            f"quantization_config: activation_scheme: {str(activations)[:80]} is not supported; supported: "
            "dynamic, static without blocks"
        )
    if scale_format not in (None, "float", "ue8m0"):
        raise EngineError(
            f"quantization_config: scale_fmt: {str(scale_format)[:80]} is not supported; supported: float, ue8m0"
        )
    if size is None:
        scheme = Float8("tensor", Rounding("fp8", static=activations == "static"))
    else:
        scheme = Float8("block", Rounding("fp8", BLOCK, power_of_two=scale_format == "ue8m0"), "weight_scale_inv")
    skipped = strings_of(config.get("modules_to_not_convert") or config.get("ignored_layers"), "modules_to_not_convert")
    return Quantization("fp8", (Rule(any_of([*skipped, "lm_head"]), None), Rule(lambda module: True, scheme)))


def has_nan(weight: Tensor) -> bool:
    """Of a float8_e4m3fn tensor: all its lower bits are set."""
    return bool(((weight.view(torch.uint8) & 0x7F) == 0x7F).any())
