"""The language parts of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: Qwen2 and Qwen3 whose positions have three axes, for
pictures. A text's positions are the same on all three, so that their rotations are the ordinary ones.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from transformers import PreTrainedConfig

from paged_backend.models.config_file import ExpertsFile
from paged_backend.models.families import qwen2, qwen3_moe
from paged_backend.models.families.family import IN_OTHER_PARTS, Family, dense_layers
from paged_backend.models.layer_spec import LayerSpec

_UNREAD = ("visual.", "model.visual.")


def _qwen3_layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    bias = bool(config.attention_bias)
    windows = (None,) * config.num_hidden_layers
    return dense_layers(config, windows, qkv_bias=bias, out_bias=bias, qk_norm="head")


def _qwen3_moe_layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    return qwen3_moe.sparse_layers(config, _qwen3_layers(config), either_way=True)


QWEN3_VL = Family(
    "Qwen3VLForConditionalGeneration",
    "qwen3_vl",
    _qwen3_layers,
    models="Qwen3-VL, as models of text",
    text_model_types=("qwen3_vl_text",),
    renames=IN_OTHER_PARTS,
    unread=_UNREAD,
    tied_head=False,
)
QWEN3_VL_MOE = replace(
    QWEN3_VL,
    architecture="Qwen3VLMoeForConditionalGeneration",
    model_type="qwen3_vl_moe",
    layers=_qwen3_moe_layers,
    config=ExpertsFile,
    models="Qwen3-VL with experts, as models of text",
    text_model_types=("qwen3_vl_moe_text",),
)
# as published, the language part has the names of a model of text
QWEN2_VL = Family(
    "Qwen2VLForConditionalGeneration",
    "qwen2_vl",
    qwen2.layers,
    models="Qwen2-VL, as models of text",
    text_model_types=("qwen2_vl_text",),
    renames=MappingProxyType({"model.language_model.": "model."}),
    unread=_UNREAD,
    tied_head=False,
    may_be_flat=True,
)
QWEN2_5_VL = replace(
    QWEN2_VL,
    architecture="Qwen2_5_VLForConditionalGeneration",
    model_type="qwen2_5_vl",
    models="Qwen2.5-VL, as models of text",
    text_model_types=("qwen2_5_vl_text",),
)
