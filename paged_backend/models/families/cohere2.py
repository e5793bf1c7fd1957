"""Command R7B, Command A (Cohere 2): blocks side by side under one LayerNorm, neighbouring pairs rotated, no positions
in layers without a window.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from transformers import PreTrainedConfig

from paged_backend.models.config_file import ConfigFile, Fraction, Positive, Size
from paged_backend.models.families.family import Family, dense_layers, windows_by_layer_type
from paged_backend.models.layer_spec import ALL_LAYERS, Branch, EndsSpec, LayerSpec, NormSpec


class Cohere2Config(ConfigFile):
    layer_norm_eps: Fraction = 1e-5
    logit_scale: Positive = 0.0625
    sliding_window_pattern: Size | None = None
    use_qk_norm: Literal[False] = False  # of Cohere's first family
    use_parallel_block: Literal[True] = True
    use_gated_activation: Literal[True] = True
    order_of_interleaved_layers: Literal["local_attn_first"] = "local_attn_first"
    position_embedding_type: Literal["rope_gptj"] = "rope_gptj"
    rotary_pct: Annotated[float, Field(ge=1, le=1)] = 1.0


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    windows, bias = windows_by_layer_type(config), bool(config.attention_bias)
    return dense_layers(
        config,
        windows,
        ropes=tuple(ALL_LAYERS if window else None for window in windows),
        layer={"norm": NormSpec(config.layer_norm_eps, centred=True), "mlp_branch": Branch(None), "parallel": True},
        qkv_bias=bias,
        out_bias=bias,
        interleaved=True,
    )


def ends(config: PreTrainedConfig) -> EndsSpec:
    return EndsSpec(NormSpec(config.layer_norm_eps, centred=True), logit_multiplier=config.logit_scale)


COHERE2 = Family("Cohere2ForCausalLM", "cohere2", layers, ends, Cohere2Config, models="Command R7B, Command A")
