"""StarCoder2: LayerNorm and biases everywhere, a perceptron without a gate."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedConfig

from paged_backend.models.config_file import ConfigFile, Fraction
from paged_backend.models.families.family import Family, activation_of, dense_layers
from paged_backend.models.layer_spec import EndsSpec, LayerSpec, MlpSpec, NormSpec


class Starcoder2Config(ConfigFile):
    norm_epsilon: Fraction = 1e-5
    norm_type: Literal["layer_norm"] = "layer_norm"
    mlp_type: Literal["default"] = "default"
    use_bias: bool = True


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    windows, bias = (config.sliding_window,) * config.num_hidden_layers, bool(config.use_bias)
    mlp = MlpSpec(
        config.intermediate_size, bias, activation_of(config), gated=False, in_names=("c_fc",), out_name="c_proj"
    )
    return dense_layers(config, windows, mlp=mlp, layer={"norm": _norm(config)}, qkv_bias=bias, out_bias=bias)


def ends(config: PreTrainedConfig) -> EndsSpec:
    return EndsSpec(_norm(config))


def _norm(config: PreTrainedConfig) -> NormSpec:
    return NormSpec(config.norm_epsilon, centred=True, bias=True)


STARCODER2 = Family("Starcoder2ForCausalLM", "starcoder2", layers, ends, Starcoder2Config, models="StarCoder2")
