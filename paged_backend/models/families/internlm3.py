"""InternLM3: Llama's shape under names of its own for the biases."""

from __future__ import annotations

from paged_backend.models.config_file import ConfigFile
from paged_backend.models.families import llama
from paged_backend.models.families.family import Family


class InternLm3Config(ConfigFile):
    qkv_bias: bool = False  # attention_bias to transformers
    bias: bool = False  # mlp_bias to transformers, and of the output of attention


INTERNLM3 = Family("InternLM3ForCausalLM", "internlm3", llama.layers, config=InternLm3Config, models="InternLM3")
