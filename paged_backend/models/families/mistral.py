"""Mistral 7B, Nemo and Small: Llama's shape, one sliding window for all layers."""

from __future__ import annotations

from transformers import PreTrainedConfig

from paged_backend.errors import EngineError
from paged_backend.models.families.family import Family, dense_layers
from paged_backend.models.layer_spec import LayerSpec


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        raise EngineError("layer_types: layers that differ in attention are not supported for MistralForCausalLM")
    return dense_layers(config, (config.sliding_window,) * config.num_hidden_layers)


MISTRAL = Family("MistralForCausalLM", "mistral", layers, models="Mistral 7B, Nemo, Small")
