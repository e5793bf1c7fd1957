"""Random adapters as PEFT saves them, and what PEFT on transformers says with each: the truth that the engine's tokens
and logits are compared with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig

from tests.oracle import Oracle, kind_of

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_adapter(
    folder: Path,
    checkpoint: Path,
    seed: int,
    rank: int = 4,
    targets: tuple[str, ...] = ALL,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Path:
    """Writes an adapter of the checkpoint with PEFT's save_pretrained. B is random too: PEFT starts it at 0, which
    would hide that it is forgotten.
    """
    base = kind_of(AutoConfig.from_pretrained(checkpoint)).from_pretrained(checkpoint, dtype=torch.float32)
    config = LoraConfig(r=rank, target_modules=list(targets), task_type="CAUSAL_LM", **options)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = 0.5 if "lora_A" in name else 0.1
            parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).to(dtype)
    model.save_pretrained(folder)
    return folder


class AdapterOracle(Oracle):
    """A checkpoint with one adapter, in float32."""

    def __init__(self, checkpoint: Path, adapter: Path) -> None:
        self._adapter = adapter
        super().__init__(checkpoint)

    def _load(self) -> Any:
        return PeftModel.from_pretrained(super()._load(), self._adapter).eval()
