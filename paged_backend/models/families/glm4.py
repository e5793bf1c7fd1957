"""GLM-4: half of each head rotated in neighbouring pairs, gate and up in one tensor; the models of 2025 have norms
behind their blocks, too.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from paged_backend.models.families.family import Family, activation_of, dense_layers
from paged_backend.models.layer_spec import Branch, LayerSpec, MlpSpec

_POST_NORMS = {
    "attention_branch": Branch("input_layernorm", "post_self_attn_layernorm"),
    "mlp_branch": Branch("post_attention_layernorm", "post_mlp_layernorm"),
}


def _layers(config: PreTrainedConfig, layer: dict[str, Any] | None) -> tuple[LayerSpec, ...]:
    windows = (None,) * config.num_hidden_layers
    mlp = MlpSpec(config.intermediate_size, activation=activation_of(config), in_names=("gate_up_proj",))
    return dense_layers(config, windows, mlp=mlp, layer=layer, qkv_bias=bool(config.attention_bias), interleaved=True)


GLM = Family(
    "GlmForCausalLM", "glm", lambda config: _layers(config, None), partial_rotary=True, models="GLM-4 9B of 2024"
)
GLM4 = Family(
    "Glm4ForCausalLM",
    "glm4",
    lambda config: _layers(config, _POST_NORMS),
    partial_rotary=True,
    models="GLM-4-0414, GLM-Z1",
)
