"""What config.json may ask for; everything else is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.architecture import read_architecture
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.models.config_file import ConfigFile
from paged_backend.models.generation_config import GenerationConfig, find_stop_ids
from paged_backend.models.rope import check_rope

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
        ({"architectures": None}, ["config.json: architectures is missing; supported: LlamaForCausalLM"]),
        ({"architectures": ["DeciLMForCausalLM"], "intermediate_size": None}, ["DeciLMForCausalLM"]),
        ({"hidden_act": "quick_gelu"}, ["hidden_act", "quick_gelu"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, ["rope_type", "proportional"]),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, ["rope_type", "su"]),
        ({"layer_types": ["full_attention", "linear_attention"]}, ["layer_types", "linear_attention"]),
        ({"layer_types": ["full_attention"]}, ["layer_types"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
        ({"head_dim": 15}, ["head_dim", "15"]),
        ({"v_head_dim": 8}, ["v_head_dim", "8", "keys and queries"]),
        ({"vocab_size": "many"}, ["vocab_size", '"many"']),
        ({"vocab_size": 4_000_000_000}, ["vocab_size", "4000000000"]),
        ({"vocab_size": True}, ["vocab_size", "true"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "1000000000"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers", "2.5"]),
        ({"hidden_size": 65, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}, ["hidden size (65)"]),
        ({"rms_norm_eps": math.nan}, ["rms_norm_eps", "NaN"]),
        ({"rope_theta": 1e400}, ["rope_theta", "Infinity"]),
        ({"rope_theta": None}, ["rope_theta", "null"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4.0"}}, ["rope_scaling.factor", '"4.0"']),
        ({"rope_scaling": {"rope_type": "linear"}}, ["'linear'", "factor"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "short_mscale": 1.2}}, ["rope_scaling.short_mscale"]),
        ({"rope_parameters": {"rope_theta": 1e4, "base": 1e6}}, ["rope_parameters.base", "unknown"]),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "base": 1e6}}},
            ["rope_parameters.full_attention.base", "unknown"],
        ),
        ({"rope_scaling": ["linear", 4.0]}, ["rope_scaling", "object"]),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}, "layer_types": ["full_attention"] * 2},
            ["different positions"],
        ),
        ({"architectures": "Qwen2ForCausalLM"}, ["architectures", "list"]),
        ({"architectures": ["LlamaForCausalLM"]}, ["model_type is qwen2", "LlamaForCausalLM"]),
        ({"quantization_config": "gptq"}, ["quantization_config", '"gptq"']),
        ({"eos_token_id": ["2"]}, ["eos_token_id", '"2"']),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings", '"false"']),
        ({"dtype": "bfloat17"}, ["dtype", "bfloat17"]),
        ({"dtype": {"text": "bfloat16"}}, ["dtype", "string"]),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, ["sliding_window", "0"]),
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


@pytest.mark.parametrize(
    "options",
    [
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}},
        # a head of two numbers has one angle
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "num_attention_heads": 32},
    ],
    ids=["yarn", "dynamic"],
)
def test_positions_that_are_no_numbers_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="rope_parameters"):
        open_checkpoint(EngineConfig(model=str(write(tmp_path, **options)), load_format="dummy"))


@pytest.mark.parametrize("key", ConfigFile.model_fields)
def test_every_key_may_be_of_a_wrong_type(key: str, tmp_path: Path) -> None:
    """Either it does not matter, or a sentence names the key."""
    for value in ("x", -7, 2.5, [], ["x"], {"x": [1]}, True, None, 10**400):
        refusal = ""
        try:
            for rope in read_architecture(write(tmp_path, **{key: value})).ropes.values():
                check_rope(rope)
        except EngineError as error:
            refusal = str(error)
        assert not refusal or key in refusal or "rope_parameters" in refusal or "architecture" in refusal, value


def test_keys_that_are_not_read_may_hold_anything(tmp_path: Path) -> None:
    write(
        tmp_path,
        use_cache="x",
        id2label="abc",
        num_labels="z",
        torch_dtype="float16",
        pad_token_id=-1,
        auto_map={"AutoModel": "m.M"},
    )
    assert read_architecture(tmp_path).vocab_size == 100


def test_swish_is_silu(tmp_path: Path) -> None:
    assert read_architecture(write(tmp_path, hidden_act="swish")) is not None


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_what_older_quantisers_wrote_is_read_from_their_own_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"bits": 4, "w_bit": 4, "group_size": 32}')
    quantization = read_architecture(write(tmp_path)).quantization
    assert quantization is not None
    assert "int4 in groups of 32" in quantization.words
    (tmp_path / name).write_text("{}")
    with pytest.raises(EngineError, match=rf"{name}: \w+: bits: None"):
        read_architecture(write(tmp_path))


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


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(EngineError, match="model.gguf is a file; a checkpoint is a folder"):
        open_checkpoint(EngineConfig(model=str(tmp_path / "model.gguf")))


def test_a_hub_that_cannot_be_reached_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("two sentences. Please try again.") from OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(EngineError) as raised:
        open_checkpoint(EngineConfig(model="a/b"))
    assert str(raised.value) == "model: a/b is no folder, and the hub cannot be reached (Name or service not known)"


def test_a_name_that_is_no_hub_id_is_refused() -> None:
    with pytest.raises(EngineError, match="neither a folder nor a hub id"):
        open_checkpoint(EngineConfig(model="a/b/c"))


def test_answers_end_at_generation_configs_ids_and_at_configs_only_without_them(tmp_path: Path) -> None:
    """As transformers' generate, which takes 7 alone when generation_config.json says 7 and config.json [7, 11, 13]."""
    write(tmp_path, eos_token_id=[7, 11, 13])
    options = EngineConfig(model=str(tmp_path), load_format="dummy")
    assert open_checkpoint(options).eos_ids == (7, 11, 13)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    assert open_checkpoint(options).eos_ids == (7, 11, 13)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "bos_token_id": 3}))
    assert open_checkpoint(options).eos_ids == (7,)
    assert open_checkpoint(options).bos_id == 3


def test_the_tokenizers_own_eos_ends_answers_too(tmp_path: Path) -> None:
    architecture = read_architecture(write(tmp_path))
    generation = GenerationConfig(eos_token_id=[9, 8, 100, -1])  # 100 is beyond the vocabulary
    assert find_stop_ids(architecture, generation, 5) == {
        9: "generation_config.json",
        8: "generation_config.json",
        5: "the tokenizer's eos",
    }
    assert find_stop_ids(architecture, generation, 8)[8] == "generation_config.json, the tokenizer's eos"
    assert find_stop_ids(architecture, GenerationConfig(), None) == {7: "config.json"}


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": 1e400}'])
def test_a_broken_generation_config_is_refused(content: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(EngineError, match=r"generation_config\.json"):
        open_checkpoint(EngineConfig(model=str(tmp_path), load_format="dummy"))


def test_of_a_hub_repository_only_what_is_read_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Mistral's repositories hold the weights twice: in consolidated.safetensors beside Hugging Face's shards."""
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options)
        return str(write(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tekken.json",
        "chat_template.jinja",
    ]
    others = [
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "original/consolidated.00.pth",
        "original/params.json",
        "a.bin",
        "README.md",
    ]
    with pytest.raises(EngineError, match=r"no model\.safetensors"):
        open_checkpoint(EngineConfig(model="mistralai/some-model"))
    assert (
        list(
            filter_repo_objects(
                files + others, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
            )
        )
        == files
    )


def test_windows_are_per_layer(tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}
    assert read_architecture(write(tmp_path, **window)).sliding_windows == (None, 32)
    assert read_architecture(
        write(tmp_path, **window, layer_types=["sliding_attention", "full_attention"])
    ).sliding_windows == (32, None)
    assert read_architecture(write(tmp_path, **{**window, "use_sliding_window": False})).sliding_windows == (None, None)
