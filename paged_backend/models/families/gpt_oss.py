"""gpt-oss 20b and 120b: attention with sinks, every other layer with a window, experts with biases and a clamped gate,
in bfloat16 or mxfp4.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from paged_backend.models.config_file import ExpertsFile, Positive
from paged_backend.models.families.expert_layers import with_experts
from paged_backend.models.families.family import Family, dense_layers, windows_by_layer_type
from paged_backend.models.layer_spec import LayerSpec, MoeNames, MoeSpec
from paged_kernels.experts import Gate, Routing


class GptOssFile(ExpertsFile):
    """The keys of its own."""

    swiglu_limit: Positive = 7.0
    swiglu_alpha: Positive = 1.702


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    bias = bool(config.attention_bias)
    dense = dense_layers(config, windows_by_layer_type(config), qkv_bias=bias, out_bias=bias, sinks=True)
    # transformers before 5.24 keeps these two only if the file names them
    limit, alpha = getattr(config, "swiglu_limit", 7.0), getattr(config, "swiglu_alpha", 1.702)
    gate = Gate(limit=float(limit), alpha=float(alpha), interleaved=True)
    routing = Routing(config.num_experts_per_tok, "softmax_of_chosen")
    moe = MoeSpec(
        config.num_local_experts,
        config.intermediate_size,
        routing,
        gate,
        bias=True,
        names=MoeNames(router="router"),
        together=True,
    )
    return with_experts(dense, moe, [True] * config.num_hidden_layers)


GPT_OSS = Family("GptOssForCausalLM", "gpt_oss", layers, config=GptOssFile, models="gpt-oss 20b, 120b")
