"""Qwen3-30B-A3B, Qwen3-Coder and Qwen3-235B: Qwen3's attention, one sliding window for all layers, experts in most of
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from paged_backend.models.config_file import ExpertsFile
from paged_backend.models.families.expert_layers import sparse_by_step, with_experts
from paged_backend.models.families.family import Family, dense_layers
from paged_backend.models.layer_spec import LayerSpec, MoeSpec
from paged_kernels.experts import Routing


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    bias = bool(config.attention_bias)
    windows = (config.sliding_window,) * config.num_hidden_layers
    return sparse_layers(config, dense_layers(config, windows, qkv_bias=bias, out_bias=bias, qk_norm="head"))


def sparse_layers(config: PreTrainedConfig, dense: Sequence[LayerSpec], **options: Any) -> tuple[LayerSpec, ...]:
    """The layers with their experts. options: further fields of MoeSpec."""
    routing = Routing(config.num_experts_per_tok, "softmax", renormalised=bool(config.norm_topk_prob))
    moe = MoeSpec(config.num_experts, config.moe_intermediate_size, routing, **options)
    return with_experts(dense, moe, sparse_by_step(config))


QWEN3_MOE = Family("Qwen3MoeForCausalLM", "qwen3_moe", layers, config=ExpertsFile, models="Qwen3-MoE, Qwen3-Coder")
