"""Granite 3 and 4's dense models: Llama's shape, with multipliers of embeddings, scores, residuals and logits (muP,
Yang et al., 2022).
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from paged_backend.models.config_file import ConfigFile, Positive
from paged_backend.models.families.family import Family, activation_of, dense_layers
from paged_backend.models.layer_spec import Branch, EndsSpec, LayerSpec, MlpSpec, NormSpec


class GraniteConfig(ConfigFile):
    embedding_multiplier: Positive = 1.0
    attention_multiplier: Positive = 1.0
    residual_multiplier: Positive = 1.0
    logits_scaling: Positive = 1.0


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    bias, multiplier = bool(config.attention_bias), float(config.residual_multiplier)
    return dense_layers(
        config,
        (None,) * config.num_hidden_layers,
        mlp=MlpSpec(config.intermediate_size, bool(config.mlp_bias), activation_of(config)),
        layer={
            "attention_branch": Branch("input_layernorm", multiplier=multiplier),
            "mlp_branch": Branch("post_attention_layernorm", multiplier=multiplier),
        },
        qkv_bias=bias,
        out_bias=bias,
        query_scale=float(config.attention_multiplier),
    )


def ends(config: PreTrainedConfig) -> EndsSpec:
    return EndsSpec(NormSpec(config.rms_norm_eps), float(config.embedding_multiplier), 1 / config.logits_scaling)


GRANITE = Family("GraniteForCausalLM", "granite", layers, ends, GraniteConfig, models="Granite 3")
