"""Mixtral 8x7B and 8x22B: Mistral's attention, experts in every layer."""

from __future__ import annotations

from transformers import PreTrainedConfig

from paged_backend.models.config_file import ExpertsFile
from paged_backend.models.families.expert_layers import with_experts
from paged_backend.models.families.family import Family, dense_layers
from paged_backend.models.layer_spec import LayerSpec, MoeNames, MoeSpec
from paged_kernels.experts import Routing

NAMES = MoeNames(root="block_sparse_moe", gate="w1", up="w3", down="w2")


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    routing = Routing(config.num_experts_per_tok, "softmax", renormalised=True)
    moe = MoeSpec(config.num_local_experts, config.intermediate_size, routing, names=NAMES)
    windows = (config.sliding_window,) * config.num_hidden_layers
    return with_experts(dense_layers(config, windows), moe, [True] * config.num_hidden_layers)


MIXTRAL = Family("MixtralForCausalLM", "mixtral", layers, config=ExpertsFile, models="Mixtral")
