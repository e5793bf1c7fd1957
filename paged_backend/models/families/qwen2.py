"""Qwen2 and Qwen2.5: biases on q, k and v, sliding windows in some layers."""

from __future__ import annotations

from transformers import PreTrainedConfig

from paged_backend.models.families.family import Family, dense_layers, windows_by_layer_type
from paged_backend.models.layer_spec import LayerSpec


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    return dense_layers(config, windows_by_layer_type(config), qkv_bias=True)


QWEN2 = Family("Qwen2ForCausalLM", "qwen2", layers, models="Qwen2, Qwen2.5")
