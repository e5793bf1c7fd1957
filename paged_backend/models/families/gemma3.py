"""Gemma 3, as text and as the language part of Gemma3ForConditionalGeneration: Gemma 2 with norms of queries and keys,
and positions by type of layer.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from paged_backend.models.config_file import Positive, Size
from paged_backend.models.families import gemma2
from paged_backend.models.families.family import IN_OTHER_PARTS, OTHER_PARTS, Family
from paged_backend.models.layer_spec import AttentionSpec, LayerSpec


class Gemma3Config(gemma2.Gemma2Config):
    attn_logit_softcapping: None = None
    final_logit_softcapping: None = None
    rope_local_base_freq: Positive | None = None
    sliding_window_pattern: Size | None = None


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    found = []
    for layer, layer_type in zip(gemma2.layers(config), config.layer_types, strict=True):
        assert isinstance(layer.attention, AttentionSpec)
        found.append(replace(layer, attention=replace(layer.attention, qk_norm="head", rope=layer_type)))
    return tuple(found)


GEMMA3 = Family(
    "Gemma3ForCausalLM",
    "gemma3_text",
    layers,
    gemma2.ends,
    Gemma3Config,
    ropes_by_layer_type=True,
    models="Gemma 3 1B, 270M",
)
GEMMA3_WITH_IMAGES = replace(
    GEMMA3,
    architecture="Gemma3ForConditionalGeneration",
    models="Gemma 3 4B, 12B, 27B, as models of text",
    model_type="gemma3",
    text_model_types=("gemma3_text",),
    renames=IN_OTHER_PARTS,
    unread=OTHER_PARTS,
)
