"""What config.json may ask for; everything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.architecture import read_architecture
from paged_backend.models.checkpoint import open_checkpoint

BASE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 7,
    "bos_token_id": 5,
    "dtype": "bfloat16",
}


def write(folder: Path, **options: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**BASE, **options}))
    return folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"architectures": None}, ["architecture none"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}}, ["rope_type", "longrope"]),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, ["rope_type", "su"]),
        ({"layer_types": ["full_attention", "linear_attention"]}, ["layer_types", "linear_attention"]),
        ({"layer_types": ["full_attention"]}, ["layer_types"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
        ({"head_dim": 15}, ["head_dim", "15"]),
        ({"vocab_size": "many"}, ["vocab_size"]),
        ({"model_type": "no_such_model"}, ["no_such_model"]),
        (
            {
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "layer_types": ["full_attention", "sliding_attention"],
            },
            ["layer_types", "MistralForCausalLM"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_is_not_supported_is_refused_by_name(options: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(EngineError) as refusal:
        read_architecture(write(tmp_path, **options))
    assert all(word in str(refusal.value) for word in words)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\xff"], ids=["empty", "cut", "list", "binary"])
def test_a_broken_config_is_refused_in_a_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(EngineError, match=r"config\.json"):
        read_architecture(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no config\.json"):
        open_checkpoint(EngineConfig(model=str(tmp_path)))


def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub() -> None:
    with pytest.raises(EngineError, match="no folder"):
        open_checkpoint(EngineConfig(model="/no/such/folder"))


def test_a_name_that_is_no_hub_id_is_refused() -> None:
    with pytest.raises(EngineError, match="neither a folder nor a hub id"):
        open_checkpoint(EngineConfig(model="a/b/c"))


def test_eos_ids_are_those_of_generation_config_and_config(tmp_path: Path) -> None:
    write(tmp_path)
    assert open_checkpoint(EngineConfig(model=str(tmp_path))).eos_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 8], "bos_token_id": 3}))
    checkpoint = open_checkpoint(EngineConfig(model=str(tmp_path)))
    assert checkpoint.eos_ids == (9, 8, 7)
    assert checkpoint.bos_id == 3


def test_windows_are_per_layer(tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}
    assert read_architecture(write(tmp_path, **window)).sliding_windows == (None, 32)
    assert read_architecture(write(tmp_path, **window, layer_types=["sliding_attention", "full_attention"])).sliding_windows == (32, None)
    assert read_architecture(write(tmp_path, **{**window, "use_sliding_window": False})).sliding_windows == (None, None)
