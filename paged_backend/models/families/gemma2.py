"""Gemma 2: post-norms of 1 + w, capped scores and logits, sliding windows in every other layer."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedConfig

from paged_backend.models.config_file import Activation, ConfigFile, Positive, Size
from paged_backend.models.families.family import Family, activation_of, dense_layers, windows_by_layer_type
from paged_backend.models.layer_spec import Branch, EndsSpec, LayerSpec, MlpSpec, NormSpec


class Gemma2Config(ConfigFile):
    hidden_activation: Activation = "gelu_pytorch_tanh"  # hidden_act is not read
    query_pre_attn_scalar: Size = 256
    attn_logit_softcapping: Positive | None = 50.0
    final_logit_softcapping: Positive | None = 30.0
    use_bidirectional_attention: Literal[False] | None = None


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    bias = bool(config.attention_bias)
    return dense_layers(
        config,
        windows_by_layer_type(config),
        mlp=MlpSpec(config.intermediate_size, activation=activation_of(config, "hidden_activation")),
        layer={
            "norm": NormSpec(config.rms_norm_eps, plus_one=True),
            "attention_branch": Branch("input_layernorm", "post_attention_layernorm"),
            "mlp_branch": Branch("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        },
        qkv_bias=bias,
        out_bias=bias,
        query_scale=config.query_pre_attn_scalar**-0.5,
        soft_cap=config.attn_logit_softcapping,
    )


def ends(config: PreTrainedConfig) -> EndsSpec:
    norm = NormSpec(config.rms_norm_eps, plus_one=True)
    return EndsSpec(norm, embedding_multiplier=config.hidden_size**0.5, logit_soft_cap=config.final_logit_softcapping)


GEMMA2 = Family("Gemma2ForCausalLM", "gemma2", layers, ends, Gemma2Config, models="Gemma 2")
