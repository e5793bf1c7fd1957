"""Qwen3: norms of queries and keys, sliding windows in some layers."""

from __future__ import annotations

from transformers import PreTrainedConfig

from paged_backend.models.families.family import Family, dense_layers, windows_by_layer_type
from paged_backend.models.layer_spec import LayerSpec


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    bias = bool(config.attention_bias)
    return dense_layers(config, windows_by_layer_type(config), qkv_bias=bias, out_bias=bias, qk_norm="head")


QWEN3 = Family("Qwen3ForCausalLM", "qwen3", layers, models="Qwen3")
