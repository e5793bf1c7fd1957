"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: q, k and v in one tensor, gate and up in another, longrope, a part of each head
rotated.
"""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedConfig

from paged_backend.models.config_file import ConfigFile
from paged_backend.models.families.family import Family, activation_of, dense_layers
from paged_backend.models.layer_spec import LayerSpec, MlpSpec


class Phi3Config(ConfigFile):
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    lm_head_bias: Literal[False] = False
    full_attn_mod: Literal[1] = 1  # of Phi-3-small's sparse attention
    interpolate_factor: Literal[1] = 1


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    windows = (config.sliding_window,) * config.num_hidden_layers
    mlp = MlpSpec(config.intermediate_size, activation=activation_of(config), in_names=("gate_up_proj",))
    return dense_layers(config, windows, mlp=mlp, qkv_names=("qkv_proj",))


PHI3 = Family(
    "Phi3ForCausalLM",
    "phi3",
    layers,
    config=Phi3Config,
    partial_rotary=True,
    models="Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
)
