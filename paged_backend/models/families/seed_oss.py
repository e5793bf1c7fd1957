"""Seed-OSS: Llama's shape, with biases on q, k and v and another flag for the output's."""

from __future__ import annotations

from transformers import PreTrainedConfig

from paged_backend.models.config_file import ConfigFile
from paged_backend.models.families.family import Family, activation_of, dense_layers
from paged_backend.models.layer_spec import LayerSpec, MlpSpec


class SeedOssConfig(ConfigFile):
    attention_bias: bool = True
    attention_out_bias: bool = False


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    mlp = MlpSpec(config.intermediate_size, bool(config.mlp_bias), activation_of(config))
    windows = (None,) * config.num_hidden_layers
    return dense_layers(
        config, windows, mlp=mlp, qkv_bias=bool(config.attention_bias), out_bias=bool(config.attention_out_bias)
    )


SEED_OSS = Family("SeedOssForCausalLM", "seed_oss", layers, config=SeedOssConfig, models="Seed-OSS")
