"""DeepSeek-V2 and V3: attention over latents, dense perceptrons first, then experts in groups beside shared ones
(DeepSeek-V2, 2024; DeepSeek-V3, 2024).

A checkpoint's layer of multi-token prediction, behind the last of the decoder's, is left unread unless it is to guess
tokens (models/mtp.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from transformers import PreTrainedConfig

from paged_backend.models.families.family import Family
from paged_backend.models.families.latent_layers import (
    LatentFile,
    corrected_routing,
    layers_with_experts,
)
from paged_backend.models.layer_spec import LayerSpec, MtpForm
from paged_kernels.experts import Routing


class DeepseekV2File(LatentFile):
    rope_interleave: Literal[True] = True
    scoring_func: Literal["softmax"] = "softmax"
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    norm_topk_prob: Literal[False] = False


class DeepseekV3File(LatentFile):
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"


def v2_layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    routing = Routing(config.num_experts_per_tok, "softmax", scale=float(config.routed_scaling_factor))
    if config.topk_method == "group_limited_greedy":
        routing = replace(routing, num_groups=config.n_group or 1, top_groups=config.topk_group or 1, group_best=1)
    return layers_with_experts(config, routing, _after_dense(config))


def v3_layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    return layers_with_experts(config, corrected_routing(config), _after_dense(config))


def _after_dense(config: PreTrainedConfig) -> list[bool]:
    return [index >= config.first_k_dense_replace for index in range(config.num_hidden_layers)]


DEEPSEEK_V2 = Family(
    "DeepseekV2ForCausalLM",
    "deepseek_v2",
    v2_layers,
    config=DeepseekV2File,
    keeps_latents=True,
    models="DeepSeek-V2, V2.5, V2-Lite, Coder-V2",
)
DEEPSEEK_V3 = Family(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    v3_layers,
    config=DeepseekV3File,
    also_called=("kimi_k2",),
    keeps_latents=True,
    mtp=MtpForm(),
    models="DeepSeek-V3, V3.1, R1; Kimi K2",
)
