"""MiMo-7B: Qwen2 under another name, which transformers does not know; its layer of multi-token prediction is left
unread.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from paged_backend.models.config_file import ConfigFile
from paged_backend.models.families.qwen2 import QWEN2


class MiMoFile(ConfigFile):
    attention_bias: Literal[True] = True  # of q, k and v


MIMO = replace(
    QWEN2, architecture="MiMoForCausalLM", model_type="mimo", config_type="qwen2", config=MiMoFile, models="MiMo 7B"
)
