"""GPTQ's 4- and 8-bit weights: rows of the transposed weight are packed in int32.

Sources: GPTQ, Frantar et al., 2022; AutoGPTQ's and GPTQModel's layouts ("gptq" keeps zeros less one, "gptq_v2" as they
    are).
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


@dataclass(frozen=True)
class Gptq(Scheme):
    num_bits: int
    group_size: int  # 0: all columns
    zeros_less_one: bool

    @property
    def words(self) -> str:
        return f"GPTQ int{self.num_bits} {f'in groups of {self.group_size}' if self.group_size else 'per channel'}"

    def format(self, num_columns: int) -> Format:
        return integer_format(self.num_bits, self.group_size, True)

    def refusal(self, num_rows: int, num_columns: int) -> str:
        a_word = 32 // self.num_bits
        if num_rows % a_word or num_columns % a_word:
            return f"its {num_rows} rows or {num_columns} columns are no multiple of {a_word}"
        return super().refusal(num_rows, num_columns)

    def stored(self, num_rows: int, num_columns: int) -> dict[str, StoredKind]:
        a_word, groups = 32 // self.num_bits, num_columns // (self.group_size or num_columns)
        return {
            "qweight": StoredKind(((num_columns // a_word, num_rows),), ("I32",)),
            "qzeros": StoredKind(((groups, num_rows // a_word),), ("I32",)),
            "scales": StoredKind(((groups, num_rows),), is_scale=True),
            "g_idx": StoredKind(((num_columns,),), ("I32", "I64"), optional=True),
        }

    def read(self, stored: Mapping[str, Tensor], num_rows: int, num_columns: int) -> Linear:
        if "g_idx" in stored:
            groups = torch.arange(num_columns, device=stored["g_idx"].device) // (self.group_size or num_columns)
            if not torch.equal(stored["g_idx"].long(), groups):
                raise ValueError(
                    "g_idx has columns in the order of their activations (desc_act), which is not supported"
                )
        weight = unpack_int32(stored["qweight"].T.contiguous(), self.num_bits)
        zero = unpack_int32(stored["qzeros"], self.num_bits).T
        if self.zeros_less_one:
            zero = (zero + 1) & (2**self.num_bits - 1)
        return unsigned_linear(weight, stored["scales"].T, zero, self.num_bits, self.group_size)


def read_gptq(config: Mapping[str, Any]) -> Quantization:
    """quant_method "gptq".

    Raises:
        EngineError: it asks for something that is not supported.
    """
    bits, group, layout = config.get("bits"), config.get("group_size", 128), config.get("checkpoint_format", "gptq")
    if bits not in (4, 8):
        raise EngineError(f"quantization_config: gptq: bits: {str(bits)[:80]} is not supported; supported: 4, 8")
    if config.get("desc_act") and group != -1:
        raise EngineError(
            "quantization_config: gptq: desc_act: true is not supported: its columns are in the order of their "
            "activations"
        )
    if layout not in ("gptq", "gptq_v2"):
        raise EngineError(
            f"quantization_config: gptq: checkpoint_format: {str(layout)[:80]} is not supported; supported: "
            "gptq, gptq_v2"
        )
    if not isinstance(group, int) or (group != -1 and (group < 16 or group % 16)):
        raise EngineError(
            f"quantization_config: gptq: group_size: {str(group)[:80]} is not supported; supported: -1 and "
            "multiples of 16"
        )
    scheme = Gptq(bits, max(group, 0), layout == "gptq")
    skipped = [
        *strings_of(config.get("modules_to_not_convert"), "modules_to_not_convert"),
        *_skipped(config.get("dynamic")),
    ]
    if not config.get("lm_head"):
        skipped.append("lm_head")
    return Quantization("gptq", (Rule(any_of(skipped), None), Rule(lambda module: True, scheme)))


def _skipped(dynamic: Any) -> list[str]:
    """GPTQModel's exceptions: expressions after "-:" are left as they are, others have options of their own."""
    if not dynamic:
        return []
    own = next((name for name in dynamic if not name.startswith("-:")), None)
    if own is not None:
        raise EngineError(
            f"quantization_config: gptq: dynamic: options of its own for {own[:80]} are not supported; "
            "supported: -: (left as it is)"
        )
    return [f"re:{name[2:]}" for name in dynamic]
