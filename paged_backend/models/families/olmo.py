"""OLMo 2 and 3: norms behind the blocks instead of before them, and of all query heads and all key heads together; OLMo
3 has sliding windows.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from paged_backend.models.families.family import Family, dense_layers, windows_by_layer_type
from paged_backend.models.layer_spec import Branch, LayerSpec

POST_NORMS = {
    "attention_branch": Branch(None, "post_attention_layernorm"),
    "mlp_branch": Branch(None, "post_feedforward_layernorm"),
}


def _layers(
    config: PreTrainedConfig, windows: tuple[int | None, ...], ropes: tuple[str, ...] | None
) -> tuple[LayerSpec, ...]:
    bias = bool(config.attention_bias)
    return dense_layers(
        config, windows, ropes=ropes, layer=POST_NORMS, qkv_bias=bias, out_bias=bias, qk_norm="projection"
    )


def _olmo2(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    return _layers(config, (None,) * config.num_hidden_layers, None)


def _olmo3(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    return _layers(config, windows_by_layer_type(config), tuple(config.layer_types))


OLMO2 = Family("Olmo2ForCausalLM", "olmo2", _olmo2, models="OLMo 2")
OLMO3 = Family("Olmo3ForCausalLM", "olmo3", _olmo3, ropes_by_layer_type=True, models="OLMo 3")
