"""SmolLM3: Llama's shape, with no positions in every fourth layer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from transformers import PreTrainedConfig

from paged_backend.errors import EngineError
from paged_backend.models.config_file import ConfigFile, Size
from paged_backend.models.families.family import Family, activation_of, dense_layers, windows_by_layer_type
from paged_backend.models.layer_spec import ALL_LAYERS, LayerSpec, MlpSpec


class SmolLm3Config(ConfigFile):
    no_rope_layers: list[Annotated[int, Field(ge=0, le=1)]] | None = None
    no_rope_layer_interval: Size = 4


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    if len(config.no_rope_layers) < config.num_hidden_layers:
        raise EngineError(f"no_rope_layers: {len(config.no_rope_layers)} entries for {config.num_hidden_layers} layers")
    windows = windows_by_layer_type(config) if config.use_sliding_window else (None,) * config.num_hidden_layers
    mlp = MlpSpec(config.intermediate_size, bool(config.mlp_bias), activation_of(config))
    # 0 means none, whatever the key's name says
    ropes = tuple(ALL_LAYERS if has_rope else None for has_rope in config.no_rope_layers)
    bias = bool(config.attention_bias)
    return dense_layers(config, windows, mlp=mlp, ropes=ropes, qkv_bias=bias, out_bias=bias)


SMOLLM3 = Family("SmolLM3ForCausalLM", "smollm3", layers, config=SmolLm3Config, models="SmolLM3")
