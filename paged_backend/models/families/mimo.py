"""MiMo-7B: Qwen2 under another name, which transformers does not know, with a layer of multi-token prediction."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from paged_backend.models.config_file import ConfigFile, MtpLayers
from paged_backend.models.families.qwen2 import QWEN2
from paged_backend.models.layer_spec import MtpForm


class MiMoFile(ConfigFile):
    attention_bias: Literal[True] = True  # of q, k and v
    num_nextn_predict_layers: MtpLayers = None


# states before their norms: MiMo's own fork of vLLM leaves the final norm to the head (its mimo.py)
_MTP = MtpForm(
    place="model.mtp_layers.0.",
    token_norm="token_layernorm",
    state_norm="hidden_layernorm",
    join="input_proj",
    final_norm="final_layernorm",
    state_first=True,
    reads_normed=False,
)
MIMO = replace(
    QWEN2,
    architecture="MiMoForCausalLM",
    model_type="mimo",
    config_type="qwen2",
    config=MiMoFile,
    models="MiMo 7B",
    mtp=_MTP,
)
