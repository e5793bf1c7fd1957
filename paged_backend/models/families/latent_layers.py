"""What the families with attention over latents have in common: the keys of their config.json, and their layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from transformers import PreTrainedConfig

from paged_backend.errors import EngineError
from paged_backend.models.config_file import Experts, ExpertsFile, MtpLayers, Positive, Size
from paged_backend.models.families.expert_layers import with_experts
from paged_backend.models.families.family import activation_of
from paged_backend.models.layer_spec import LatentSpec, LayerSpec, MlpSpec, MoeNames, MoeSpec, NormSpec
from paged_kernels.experts import Routing

_MAX_SHARED = 64  # experts that every token goes through; the published ones have 1 or 2


class LatentFile(ExpertsFile):
    """Keys of DeepSeek's, which others have, too. Biases, and experts in every other layer, are not computed."""

    kv_lora_rank: Size = 512
    q_lora_rank: Size | None = None
    qk_nope_head_dim: Size = 128
    qk_rope_head_dim: Size = 64
    v_head_dim: Size = 128
    rope_interleave: bool = True
    attention_bias: Literal[False] = False
    n_routed_experts: Experts = 1
    n_shared_experts: Annotated[int, Field(ge=1, le=_MAX_SHARED)] = 1
    n_group: Experts | None = None
    topk_group: Experts | None = None
    routed_scaling_factor: Positive = 1.0
    first_k_dense_replace: Annotated[int, Field(ge=0)] = 0
    moe_layer_freq: Literal[1] = 1
    num_nextn_predict_layers: MtpLayers = None


def layers_with_experts(config: PreTrainedConfig, routing: Routing, sparse: Sequence[bool]) -> tuple[LayerSpec, ...]:
    """Layers that have experts, beside shared ones, where `sparse` says so. Scores by sigmoid are corrected.

    Raises:
        EngineError: sizes of which kernels make no tiles, or as `with_experts`.
    """
    size = config.moe_intermediate_size
    moe = MoeSpec(
        config.n_routed_experts,
        size,
        routing,
        correction=routing.scores == "sigmoid",
        shared_size=size * config.n_shared_experts,
        names=MoeNames(shared="shared_experts"),
    )
    return with_experts(_dense_layers(config), moe, sparse)


def corrected_routing(config: PreTrainedConfig) -> Routing:
    """DeepSeek-V3's, which balances experts without a loss for it."""
    return Routing(
        config.num_experts_per_tok,
        "sigmoid",
        renormalised=bool(config.norm_topk_prob),
        num_groups=config.n_group,
        top_groups=config.topk_group,
        scale=float(config.routed_scaling_factor),
    )


def _dense_layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    _check_size("kv_lora_rank", config.kv_lora_rank, 512)
    _check_size("qk_rope_head_dim", config.qk_rope_head_dim, 64)
    attention = LatentSpec(
        num_heads=config.num_attention_heads,
        rank=config.kv_lora_rank,
        nope_dim=config.qk_nope_head_dim,
        rotary_dim=config.qk_rope_head_dim,
        value_dim=config.v_head_dim,
        scale=_scale(config),
        q_rank=config.q_lora_rank,
        interleaved=bool(getattr(config, "rope_interleave", True)),
    )
    mlp = MlpSpec(config.intermediate_size, activation=activation_of(config))
    return tuple(LayerSpec(attention, mlp, NormSpec(config.rms_norm_eps)) for _ in range(config.num_hidden_layers))


def _scale(config: PreTrainedConfig) -> float:
    """Of the scores. With yarn's mscale_all_dim it grows with the factor by which positions are stretched (YaRN, Peng
    et al., 2023, section 3.4), while cosines and sines have only what mscale differs by.
    """
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    parameters = config.rope_parameters or {}
    of_all = parameters.get("mscale_all_dim") or 0.0
    if parameters.get("rope_type", "default") == "default" or not of_all or parameters["factor"] <= 1:
        return float(scale)
    return float(scale * (0.1 * of_all * math.log(parameters["factor"]) + 1.0) ** 2)


def _check_size(key: str, size: int, most: int) -> None:
    if size < 16 or size > most or size & (size - 1):
        raise EngineError(f"{key}: {size} is not supported; supported: powers of two from 16 to {most}")
