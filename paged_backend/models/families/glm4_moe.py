"""GLM-4.5, 4.6 and their Air: half of each head is rotated, dense layers first, then experts in groups beside a shared
one.

A checkpoint's layer of multi-token prediction, behind the last of the decoder's, is left unread unless it is to guess
tokens (models/mtp.py).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from transformers import PreTrainedConfig

from paged_backend.models.config_file import Experts, ExpertsFile, MtpLayers, Positive
from paged_backend.models.families.expert_layers import with_experts
from paged_backend.models.families.family import Family, dense_layers
from paged_backend.models.layer_spec import LayerSpec, MoeNames, MoeSpec, MtpForm
from paged_kernels.experts import Routing

_MAX_SHARED = 64  # experts that every token goes through; the published ones have 1


class Glm4MoeFile(ExpertsFile):
    """The keys of its own."""

    n_routed_experts: Experts = 1
    n_shared_experts: Annotated[int, Field(ge=1, le=_MAX_SHARED)] = 1
    n_group: Experts = 1
    topk_group: Experts = 1
    routed_scaling_factor: Positive = 1.0
    first_k_dense_replace: Annotated[int, Field(ge=0)] = 1
    use_qk_norm: bool = False
    num_nextn_predict_layers: MtpLayers = None


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    windows = (None,) * config.num_hidden_layers
    dense = dense_layers(
        config, windows, qkv_bias=bool(config.attention_bias), qk_norm="head" if config.use_qk_norm else None
    )
    routing = Routing(
        config.num_experts_per_tok,
        "sigmoid",
        renormalised=bool(config.norm_topk_prob),
        num_groups=config.n_group,
        top_groups=config.topk_group,
        scale=float(config.routed_scaling_factor),
    )
    size = config.moe_intermediate_size
    names = MoeNames(shared="shared_experts")
    moe = MoeSpec(
        config.n_routed_experts, size, routing, correction=True, shared_size=size * config.n_shared_experts, names=names
    )
    return with_experts(
        dense, moe, [index >= config.first_k_dense_replace for index in range(config.num_hidden_layers)]
    )


GLM4_MOE = Family(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    layers,
    config=Glm4MoeFile,
    partial_rotary=True,
    mtp=MtpForm(),
    models="GLM-4.5, GLM-4.6, GLM-4.7",
)
