"""Folders of adapters: what is read, and what is refused with which reason. That good ones mean what PEFT means is
shown in tests/e2e/test_adapters.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from paged_backend.errors import RequestError
from paged_backend.models.adapter_files import Adapter, check_adapter, open_folder, read_adapter
from paged_backend.models.adapter_layout import AdapterLayout
from paged_backend.models.architecture import read_architecture
from tests.adapter_oracle import save_adapter
from tests.oracle import save_checkpoint

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"), "LlamaForCausalLM", num_hidden_layers=2)


@pytest.fixture(scope="module")
def saved(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter"), checkpoint, 0, rank=4)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    copy = tmp_path / "good"
    copy.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (copy / name).write_bytes((saved / name).read_bytes())
    return copy


def layout_of(checkpoint: Path) -> AdapterLayout:
    architecture = read_architecture(checkpoint)
    return AdapterLayout.of(architecture.layers, architecture.hidden_size)


def read(folder: Path, checkpoint: Path, max_rank: int = 8, dtype: torch.dtype = torch.float32) -> Adapter:
    return read_adapter(folder, layout_of(checkpoint), max_rank, dtype, pinned=False)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, drop: tuple[str, ...] = (), **added: torch.Tensor) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in drop}
    save_file(tensors | added, path)


def refusal(folder: Path, checkpoint: Path, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        read(folder, checkpoint, **options)
    assert str(folder.parent) not in str(caught.value), "a path is told"
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_dora": True}, "use_dora is not supported"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; supported: none"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target module 'lm_head' is not supported; supported: q_proj"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is not supported"),
        ({"something_of_the_future": {"x": 1}}, "something_of_the_future is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; supported: LORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the model's own weights"),
        ({"r": 16, "lora_alpha": 32}, "has rank 16, this server takes 1 to 8 (max_lora_rank)"),
        ({"r": 2}, "for this model and rank 2"),
        ({"r": 0}, "has rank 0"),
        ({"r": "many"}, "expected numbers r and lora_alpha"),
        ({"rank_pattern": {"(": 3}}, "expected numbers r and lora_alpha, and patterns of them"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_asks_for_something_else_is_refused_by_name(
    folder: Path, checkpoint: Path, fields: dict[str, Any], reason: str
) -> None:
    change_config(folder, **fields)
    assert reason in refusal(folder, checkpoint)
    with pytest.raises(RequestError):
        check_adapter(folder, layout_of(checkpoint), 8)


@pytest.mark.parametrize(
    ("drop", "added", "reason"),
    [
        (
            (),
            {Q.format("A"): torch.zeros(4, 32)},
            "lora_A of model.layers.0.self_attn.q_proj has shape [4, 32], expected [4, 64]",
        ),
        (
            (),
            {Q.format("B"): torch.zeros(64, 4, dtype=torch.int8)},
            "lora_B of model.layers.0.self_attn.q_proj is of type I8",
        ),
        ((Q.format("B"),), {}, "model.layers.0.self_attn.q_proj has no lora_B"),
        (
            (Q.format("A"), Q.format("B")),
            {},
            "model.layers.0.self_attn.q_proj is a target of adapter_config.json, but has no tensors",
        ),
        (
            (),
            {Q.format("B").replace("layers.0", "layers.7"): torch.zeros(64, 4)},
            "model.layers.7.self_attn.q_proj.lora_B.weight is not supported",
        ),
        (
            (),
            {"base_model.model.lm_head.weight": torch.zeros(199, 64)},
            "base_model.model.lm_head.weight is not supported",
        ),
        ((), {Q.format("A"): torch.full((4, 64), float("nan"))}, "numbers that are not finite in float32"),
    ],
    ids=["shape", "type", "no B", "no tensors of a target", "layer", "other tensor", "nan"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    folder: Path, checkpoint: Path, drop: tuple[str, ...], added: dict[str, torch.Tensor], reason: str
) -> None:
    change_tensors(folder, drop, **added)
    assert reason in refusal(folder, checkpoint)


def test_what_overflows_the_servers_type_is_refused(folder: Path, checkpoint: Path) -> None:
    change_tensors(folder, **{Q.format("A"): torch.full((4, 64), 1e6)})
    assert "not finite in float16" in refusal(folder, checkpoint, dtype=torch.float16)
    assert read(folder, checkpoint, dtype=torch.bfloat16).packed.isfinite().all()


def test_broken_and_missing_files_are_refused(folder: Path, checkpoint: Path) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    assert "adapter_model.safetensors is broken" in refusal(folder, checkpoint)
    weights.unlink()
    assert refusal(folder, checkpoint) == "adapter_model.safetensors is missing"
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    assert "pickled" in refusal(folder, checkpoint)
    weights.write_bytes(content)
    config.write_text("[]")
    assert "expected a JSON object" in refusal(folder, checkpoint)
    config.write_text("{" * 5)
    assert "adapter_config.json is broken" in refusal(folder, checkpoint)
    config.write_text(" " * (2**20 + 1))
    assert "longer than 1048576 bytes" in refusal(folder, checkpoint)
    config.unlink()
    assert refusal(folder, checkpoint) == "adapter_config.json is missing"


def test_a_version_changes_with_the_files_alone(folder: Path, checkpoint: Path) -> None:
    first = read(folder, checkpoint)
    assert read(folder, checkpoint).version == first.version
    change_tensors(folder, **{Q.format("A"): torch.ones(4, 64)})
    assert read(folder, checkpoint).version != first.version


def test_names_may_lack_pefts_prefix(folder: Path, checkpoint: Path) -> None:
    ours = read(folder, checkpoint)
    path = folder / "adapter_model.safetensors"
    save_file({name.removeprefix("base_model.model."): tensor for name, tensor in load_file(path).items()}, path)
    assert torch.equal(read(folder, checkpoint).packed, ours.packed)


def test_only_folders_within_the_servers_are_found(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub" / "deep").mkdir(parents=True)
    os.symlink(folder, root / "outside")
    os.symlink(root / "sub", root / "inside")
    (root / "file").write_text("x")
    os.symlink(folder / "adapter_model.safetensors", root / "sub" / "adapter_model.safetensors")
    for name in ("outside", "nobody", "..", ".", "../good", "sub/deep", "file", "x" * 300, str(folder)):
        with pytest.raises(RequestError, match="^this server has no such adapter$"):
            open_folder(root, name)
    with pytest.raises(RequestError, match="adapter_model.safetensors is a link out of the adapters' folder"):
        open_folder(root, "sub")
    (root / "sub" / "adapter_model.safetensors").unlink()
    assert open_folder(root, "inside") == open_folder(root, "sub") == (root / "sub").resolve()
