"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, experts beside a gated shared one, dense layers among them."""

from __future__ import annotations

from transformers import PreTrainedConfig

from paged_backend.models.config_file import ExpertsFile, Size
from paged_backend.models.families.expert_layers import sparse_by_step, with_experts
from paged_backend.models.families.family import Family, dense_layers, windows_by_layer_type
from paged_backend.models.layer_spec import LayerSpec, MoeSpec
from paged_kernels.experts import Routing


class Qwen2MoeFile(ExpertsFile):
    """The keys of its own."""

    shared_expert_intermediate_size: Size = 1
    qkv_bias: bool = True


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    dense = dense_layers(config, windows_by_layer_type(config), qkv_bias=bool(config.qkv_bias))
    routing = Routing(config.num_experts_per_tok, "softmax", renormalised=bool(config.norm_topk_prob))
    sizes = {"shared_size": config.shared_expert_intermediate_size, "shared_gate": True}
    return with_experts(
        dense, MoeSpec(config.num_experts, config.moe_intermediate_size, routing, **sizes), sparse_by_step(config)
    )


QWEN2_MOE = Family("Qwen2MoeForCausalLM", "qwen2_moe", layers, config=Qwen2MoeFile, models="Qwen1.5-MoE, Qwen2-MoE")
