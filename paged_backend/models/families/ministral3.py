"""Ministral 3 and Mistral Small 3.x, as text and as the language part of Mistral3ForConditionalGeneration: Mistral with
queries that grow with position.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from paged_backend.models.families.family import IN_OTHER_PARTS, OTHER_PARTS, Family, dense_layers
from paged_backend.models.layer_spec import LayerSpec


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    return dense_layers(config, (config.sliding_window,) * config.num_hidden_layers)


MINISTRAL3 = Family("Ministral3ForCausalLM", "ministral3", layers, models="Ministral 3 without images")
MISTRAL3_WITH_IMAGES = replace(
    MINISTRAL3,
    architecture="Mistral3ForConditionalGeneration",
    models="Ministral 3, Mistral Small 3.1 and 3.2, as models of text",
    model_type="mistral3",
    text_model_types=("ministral3", "mistral"),
    renames=IN_OTHER_PARTS,
    unread=OTHER_PARTS,
)
