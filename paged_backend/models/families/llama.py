"""Llama 2 and 3, and what has their shape."""

from __future__ import annotations

from transformers import PreTrainedConfig

from paged_backend.models.families.family import Family, activation_of, dense_layers
from paged_backend.models.layer_spec import LayerSpec, MlpSpec


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    windows = (None,) * config.num_hidden_layers
    bias = bool(config.attention_bias)
    mlp = MlpSpec(config.intermediate_size, bool(config.mlp_bias), activation_of(config))
    return dense_layers(config, windows, mlp=mlp, qkv_bias=bias, out_bias=bias)


LLAMA = Family("LlamaForCausalLM", "llama", layers, models="Llama 2, 3; Yi, Falcon 3 and others of their shape")
