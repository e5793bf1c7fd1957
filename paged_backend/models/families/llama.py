"""Llama 2 and 3, and what has their shape."""

from __future__ import annotations

from transformers import PreTrainedConfig

from paged_backend.models.families.family import Family, dense_layers
from paged_backend.models.layer_spec import LayerSpec


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    windows = (None,) * config.num_hidden_layers
    bias = bool(config.attention_bias)
    return dense_layers(config, windows, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.mlp_bias))


LLAMA = Family("LlamaForCausalLM", "llama", layers)
