"""GLM-4.7-Flash: DeepSeek-V3's layers under GLM's name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from transformers import PreTrainedConfig

from paged_backend.errors import EngineError
from paged_backend.models.families.deepseek import DeepseekV3File
from paged_backend.models.families.family import Family
from paged_backend.models.families.latent_layers import corrected_routing, layers_with_experts
from paged_backend.models.layer_spec import LayerSpec, MtpForm


class Glm4MoeLiteFile(DeepseekV3File):
    mlp_layer_types: Annotated[list[Literal["dense", "sparse"]], Field(max_length=4096)] | None = None
    first_k_dense_replace: Literal[1] = 1  # what mlp_layer_types are by default


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    kinds = config.mlp_layer_types
    if len(kinds) != config.num_hidden_layers:
        raise EngineError(f"mlp_layer_types: {len(kinds)} entries for {config.num_hidden_layers} layers")
    return layers_with_experts(config, corrected_routing(config), [kind == "sparse" for kind in kinds])


GLM4_MOE_LITE = Family(
    "Glm4MoeLiteForCausalLM",
    "glm4_moe_lite",
    layers,
    config=Glm4MoeLiteFile,
    keeps_latents=True,
    mtp=MtpForm(),
    models="GLM-4.7-Flash",
)
