"""The table of positions against transformers' own rotary embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from paged_backend.models import rope as rope_module
from paged_backend.models.architecture import Rope, read_architecture
from paged_backend.models.layer_spec import ALL_LAYERS
from paged_backend.models.rope import rope_table

THETA = {"rope_theta": 500_000.0}
TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", **THETA},
    "linear": {"rope_type": "linear", "factor": 4.0, **THETA},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, **THETA},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, **THETA},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        **THETA,
    },
}


def rope_of(folder: Path, name: str, length: int = 128) -> Rope:
    config = AutoConfig.for_model(
        "llama",
        rope_parameters=dict(TYPES[name]),
        max_position_embeddings=length,
        hidden_size=64,
        num_attention_heads=4,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return read_architecture(folder).ropes[ALL_LAYERS]


def oracle(rope: Rope, length: int) -> Tensor:
    cos, sin = LlamaRotaryEmbedding(rope.config)(torch.zeros(1), torch.arange(length)[None])
    half = rope.rotary_dim // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=1)


@pytest.mark.parametrize("name", TYPES)
def test_table_equals_transformers_up_to_the_original_length(name: str, tmp_path: Path) -> None:
    rope = rope_of(tmp_path, name)
    assert torch.equal(rope_table(rope, 128, torch.device("cpu")), oracle(rope, 128))


def test_dynamic_scaling_gives_each_position_the_frequencies_of_a_sequence_that_ends_there(tmp_path: Path) -> None:
    rope = rope_of(tmp_path, "dynamic")
    table = rope_table(rope, 512, torch.device("cpu"))
    for position in (127, 128, 129, 300, 511):
        frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](rope.config, torch.device("cpu"), seq_len=position + 1)
        expected = torch.cat(((position * frequencies).cos(), (position * frequencies).sin()))
        assert torch.allclose(table[position], expected, atol=1e-4)  # float32 angles of up to 511 radians


def test_table_in_chunks_equals_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = rope_of(tmp_path, "dynamic")
    whole = rope_table(rope, 400, torch.device("cpu"))
    monkeypatch.setattr(rope_module, "_CHUNK", 33)
    assert torch.equal(rope_table(rope, 400, torch.device("cpu")), whole)


@pytest.mark.parametrize(
    ("name", "max_len"), [("default", 128), ("linear", 512), ("dynamic", 512), ("yarn", 256), ("llama3", 128)]
)
def test_longest_length_follows_the_scaling(name: str, max_len: int, tmp_path: Path) -> None:
    assert rope_of(tmp_path, name).max_len == max_len
