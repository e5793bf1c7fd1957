"""MiniMax-M2: a part of each head is rotated, queries and keys are normed over all heads together, experts in every
layer.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from paged_backend.models.config_file import ExpertsFile, Size
from paged_backend.models.families.expert_layers import refuse_other_values, with_experts
from paged_backend.models.families.family import Family, dense_layers
from paged_backend.models.layer_spec import LayerSpec, MoeNames, MoeSpec
from paged_kernels.experts import Routing

_COMPUTED = {
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "shared_intermediate_size": 0,
}


class MiniMaxM2File(ExpertsFile):
    """The keys of its own."""

    rotary_dim: Size | None = None
    use_qk_norm: bool = True
    qk_norm_type: str = "per_layer"
    scoring_func: str = "sigmoid"
    use_routing_bias: bool = True
    shared_intermediate_size: int = 0


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    refuse_other_values(config, _COMPUTED)
    dense = dense_layers(config, (None,) * config.num_hidden_layers, qk_norm="projection")
    routing = Routing(config.num_experts_per_tok, "sigmoid", renormalised=True)
    names = MoeNames(root="block_sparse_moe", gate="w1", up="w3", down="w2", correction="e_score_correction_bias")
    moe = MoeSpec(config.num_local_experts, config.intermediate_size, routing, correction=True, names=names)
    return with_experts(dense, moe, [True] * config.num_hidden_layers)


MINIMAX_M2 = Family(
    "MiniMaxM2ForCausalLM", "minimax_m2", layers, config=MiniMaxM2File, partial_rotary=True, models="MiniMax-M2"
)
