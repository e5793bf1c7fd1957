"""Safetensors into packed parameters: every form of checkpoint, and every way in which one can be broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models import weights as weights_module
from paged_backend.models.architecture import Architecture, read_architecture
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.models.weights import Weights, allocate_weights, load_weights, randomise_weights, settle_weights
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.runner_driver import Driver, load_runner

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "checkpoint", "Qwen3ForCausalLM", head_dim=16, num_hidden_layers=2)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Weights, Architecture, str]:
    architecture, _ = settle_weights(read_architecture(folder), folder)
    weights = allocate_weights(architecture, dtype, CPU)
    return weights, architecture, load_weights(weights, folder, lambda sentence: None)


def edit(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replaces a tensor of the checkpoint; None takes it out."""
    tensors = load_file(folder / "model.safetensors")
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_parameters_are_packed_in_order(folder: Path) -> None:
    weights, _, _ = load(folder)
    tensors = load_file(folder / "model.safetensors")
    layer = "model.layers.1."
    qkv = [tensors[f"{layer}self_attn.{letter}_proj.weight"] for letter in "qkv"]
    assert torch.equal(weights.layers[1].attention.qkv.weight, torch.cat(qkv))
    assert torch.equal(
        weights.layers[1].mlp.gate_up.weight,
        torch.cat([tensors[f"{layer}mlp.{side}_proj.weight"] for side in ("gate", "up")]),
    )
    assert torch.equal(weights.head.weight, tensors["lm_head.weight"])
    assert weights.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_a_sharded_checkpoint_equals_a_single_file(folder: Path, tmp_path: Path) -> None:
    sharded = save_checkpoint(
        tmp_path / "sharded", "Qwen3ForCausalLM", shard_size="100KB", head_dim=16, num_hidden_layers=2
    )
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, parts = load(folder)[0], load(sharded)[0]
    assert torch.equal(whole.embedding, parts.embedding)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(whole.linears, parts.linears, strict=True))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_checkpoints_give_transformers_tokens_in_float32(stored: torch.dtype, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "LlamaForCausalLM", dtype=stored)
    prompts = random_prompts((3, 20))
    assert Driver(load_runner(tmp_path)).generate(prompts, 8) == Oracle(tmp_path).greedy(prompts, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_parameters_take_the_type_asked_for(folder: Path, dtype: torch.dtype) -> None:
    weights, _, _ = load(folder, dtype)
    assert weights.layers[0].mlp.down.weight.dtype == dtype
    assert torch.equal(
        weights.layers[0].mlp.down.weight,
        load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].to(dtype),
    )


def test_a_tied_head_is_the_embedding_and_takes_no_memory(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    weights, _, _ = load(tmp_path)
    assert weights.head.weight is weights.embedding
    edit(tmp_path, "lm_head.weight", weights.embedding.clone())
    weights, _, sentence = load(tmp_path)
    assert weights.head.weight is weights.embedding
    assert "ignored 1 tensors" in sentence
    assert "lm_head.weight" in sentence


def test_a_head_that_differs_is_used_although_config_json_ties_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    head = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].flip(0)
    edit(tmp_path, "lm_head.weight", head)
    heard: list[str] = []
    runner = load_runner(tmp_path, tell=heard.append)
    prompts = random_prompts((3, 20))
    assert Driver(runner).generate(prompts, 8) == Oracle(tmp_path).greedy(prompts, 8)
    assert [sentence for sentence in heard if sentence.startswith("warning: config.json ties lm_head.weight")]
    edit(tmp_path, "lm_head.weight", head[:, :-1].clone())
    with pytest.raises(EngineError, match=r"lm_head\.weight has shape"):
        load(tmp_path)


def test_a_tied_model_with_a_head_alone_takes_its_embedding_from_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    edit(tmp_path, "lm_head.weight", load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"])
    edit(tmp_path, "model.embed_tokens.weight", None)
    prompts = random_prompts((3, 20))
    assert Driver(load_runner(tmp_path)).generate(prompts, 8) == Oracle(tmp_path).greedy(prompts, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight", "model.layers.0.input_layernorm.weight"],
)
def test_numbers_that_are_not_finite_are_refused_by_the_tensors_name(folder: Path, name: str, value: float) -> None:
    tensor = load_file(folder / "model.safetensors")[name]
    tensor.view(-1)[-1] = value
    edit(folder, name, tensor)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with pytest.raises(EngineError, match=f"{name} holds numbers that are not finite .* in {str(dtype)[6:]}"):
            load(folder, dtype)


def test_numbers_that_a_narrower_type_cannot_hold_are_refused(folder: Path) -> None:
    edit(folder, "model.norm.weight", torch.full((64,), 1e6))
    load(folder, torch.bfloat16)
    with pytest.raises(EngineError, match=r"model\.norm\.weight holds .* in float16"):
        load(folder, torch.float16)


def test_a_config_for_which_the_files_are_too_small_is_refused_before_anything_is_allocated(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4000, "layer_types": None}))
    with pytest.raises(EngineError, match=r"tensor model\.layers\.2\.\S+ is missing, and 43977 more"):
        open_checkpoint(EngineConfig(model=str(folder)))
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 2**20, "num_attention_heads": 4}))
    with pytest.raises(EngineError, match=r"config\.json implies"):
        open_checkpoint(EngineConfig(model=str(folder)))


def test_random_weights_that_do_not_fit_are_refused_before_they_are_allocated(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 2**20, "intermediate_size": 2**20}))
    with pytest.raises(
        EngineError, match=r"the weights do not fit into the memory of the CPU: \S+ GiB in float32, \S+ GiB are free"
    ):
        load_runner(folder, load_format="dummy")


def test_quantised_tensors_are_called_that(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit(folder, name, None)
    edit(folder, "model.layers.0.mlp.down_proj.qweight", torch.zeros(8, 64, dtype=torch.int32))
    with pytest.raises(
        EngineError,
        match=r"down_proj\.weight is missing; there are quantised ones such as "
        r"model\.layers\.0\.mlp\.down_proj\.qweight",
    ):
        load(folder)


def test_tensors_without_use_are_ignored_and_named(folder: Path) -> None:
    edit(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in load(folder)[2]


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.v_proj.weight", "model.layers.0.self_attn.q_norm.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    edit(folder, name, None)
    with pytest.raises(EngineError, match=f"tensor {name} is missing"):
        load(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    edit(folder, "model.layers.0.mlp.up_proj.weight", torch.zeros(96, 63))
    with pytest.raises(
        EngineError,
        match=r"model\.layers\.0\.mlp\.up_proj\.weight has shape \[96, 63\], config\.json implies \[96, 64\]",
    ):
        load(folder)


def test_a_tensor_of_whole_numbers_is_refused(folder: Path) -> None:
    edit(folder, "model.norm.weight", torch.zeros(64, dtype=torch.int8))
    with pytest.raises(EngineError, match=r"model\.norm\.weight is of type I8"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -10], ids=lambda kept: f"{kept}-bytes")
def test_a_cut_file_is_refused_by_name(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(EngineError, match=r"model\.safetensors is broken"):
        load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EngineError, match="pickled"):
        load(folder)


def test_weights_in_gguf_are_refused_by_their_format(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")
    with pytest.raises(EngineError, match="GGUF"):
        load(folder)


def test_a_pointer_of_git_lfs_is_told_from_a_broken_file(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(EngineError, match=r"model\.safetensors is broken: it is a pointer of Git LFS"):
        load(folder)


def test_where_all_names_are_others_one_of_them_is_told(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = {f"base_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"is missing, and \d+ more; there are others, such as base_model\."):
        load(folder)


def test_an_adapter_in_the_place_of_a_model_is_told_what_it_is(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(EngineError, match="no config.json, so this is an adapter; its base model is served"):
        read_architecture(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(EngineError, match=r"no model\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "broken"),
        ("[]", "broken"),
        ('{"weight_map": 3}', "broken"),
        (
            '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}',
            "model-00001-of-00002.safetensors is named",
        ),
        ('{"weight_map": {"model.norm.weight": "../outside.safetensors"}}', "outside.safetensors is named"),
    ],
    ids=["cut", "list", "number", "missing-file", "file-outside"],
)
def test_a_broken_index_is_refused(folder: Path, content: str, words: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(EngineError, match=words):
        load(folder)


def test_progress_is_told_with_share_and_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "_PROGRESS_SECONDS", 0)
    heard: list[str] = []
    architecture = read_architecture(folder)
    load_weights(allocate_weights(architecture, torch.float32, CPU), folder, heard.append)
    assert heard[-1].startswith("loading weights 100 % (")
    assert heard[-1].endswith("GB)")


def test_random_weights_need_config_json_alone_and_repeat(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    prompts = random_prompts((3, 20))
    first, again = (Driver(load_runner(bare, load_format="dummy", seed=3)).generate(prompts, 8) for _ in range(2))
    other = Driver(load_runner(bare, load_format="dummy", seed=4)).generate(prompts, 8)
    assert first == again != other


def test_random_weights_have_the_range_of_the_config_and_norms_of_one(folder: Path) -> None:
    architecture = read_architecture(folder)
    weights = allocate_weights(architecture, torch.float32, CPU)
    randomise_weights(weights, architecture, 0)
    assert json.loads((folder / "config.json").read_text())["initializer_range"] == 0.2
    assert weights.layers[0].mlp.down.weight.std().item() == pytest.approx(0.2, rel=0.05)
    assert (weights.final_norm.weight == 1).all()
    assert weights.layers[0].attention.qk_norm is not None
    assert all((norm.weight == 1).all() for norm in weights.layers[0].attention.qk_norm)
