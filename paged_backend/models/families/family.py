"""What a family is, and what the dense ones have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from paged_backend.models.layer_spec import AttentionSpec, LayerSpec, MlpSpec


@dataclass(frozen=True)
class Family:
    """A published architecture."""

    architecture: str  # its name in config.json's `architectures`
    model_type: str  # its name in config.json's `model_type`
    layers: Callable[[PreTrainedConfig], tuple[LayerSpec, ...]]  # raises EngineError for what is not supported; the sentence names it


def dense_layers(config: PreTrainedConfig, windows: tuple[int | None, ...], *, mlp_bias: bool = False, **attention: Any) -> tuple[LayerSpec, ...]:
    """Layers that differ in their sliding windows only; `attention`: further fields of AttentionSpec."""
    mlp = MlpSpec(config.intermediate_size, mlp_bias)
    heads = (config.num_attention_heads, config.num_key_value_heads, head_dim_of(config))
    return tuple(LayerSpec(AttentionSpec(*heads, sliding_window=window, **attention), mlp) for window in windows)


def head_dim_of(config: PreTrainedConfig) -> int:
    """head_dim where the config has it, else the hidden size shared out among the heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def windows_by_layer_type(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """The window of the layers that `layer_types` calls sliding (transformers derives it from use_sliding_window and max_window_layers)."""
    return tuple(config.sliding_window if layer_type == "sliding_attention" else None for layer_type in config.layer_types)
