"""EAGLE-3 heads through the real engine: their guesses are those of the definition (tests/eagle3_definition.py),
whatever happened to the sequence before; and no token depends on them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.scheduler.step_costs import DraftCosts
from tests.drafts_heard import Listener, sizes
from tests.eagle3_definition import Definition
from tests.engine_answers import answers, load
from tests.oracle import random_prompts, save_checkpoint

NUM_DRAFTS = 3
LENGTHS = [1, 15, 18, 40]  # none that the prefix cache has all but a token of
VOCABULARY, DRAFT_VOCABULARY = 199, 60
NUM_LAYERS, TARGET_SIZE = 6, 64
HEADS, KV_HEADS, HEAD_DIM = 4, 1, 16
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": TARGET_SIZE,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "vocab_size": VOCABULARY,
    "draft_vocab_size": DRAFT_VOCABULARY,
    "torch_dtype": "float32",
}
# what differs between published heads -> after which layers they read
FORMS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "as published": ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}}, (2, 3, 4)),
    "other layers": ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 5]}}, (1, 3, 6)),
    "own embedding of another size": (
        {"hidden_size": 48, "target_hidden_size": 64, "eagle_aux_hidden_state_layer_ids": [2, 3, 5]},
        (2, 3, 5),
    ),
    "whole vocabulary, normed residual, layers.0": (
        {"draft_vocab_size": VOCABULARY, "norm_before_residual": True, "eagle_aux_hidden_state_layer_ids": [1, 4]},
        (1, 4),
    ),
}


def save_head(folder: Path, num_taps: int, layer: str = "midlayer", **options: Any) -> Path:
    """A random head, in the names and shapes that EAGLE-3 heads are published in."""
    config = CONFIG | options
    size, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["draft_vocab_size"]
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "fc.weight": (size, num_taps * TARGET_SIZE),
        "norm.weight": (size,),
        "lm_head.weight": (vocabulary, size),
        f"{layer}.input_layernorm.weight": (size,),
        f"{layer}.hidden_norm.weight": (size,),
        f"{layer}.post_attention_layernorm.weight": (size,),
        f"{layer}.self_attn.q_proj.weight": (q, 2 * size),
        f"{layer}.self_attn.k_proj.weight": (kv, 2 * size),
        f"{layer}.self_attn.v_proj.weight": (kv, 2 * size),
        f"{layer}.self_attn.o_proj.weight": (size, q),
        f"{layer}.mlp.gate_proj.weight": (inner, size),
        f"{layer}.mlp.up_proj.weight": (inner, size),
        f"{layer}.mlp.down_proj.weight": (size, inner),
    }
    if size != TARGET_SIZE:
        shapes["embed_tokens.weight"] = (VOCABULARY, size)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.rand(shape, generator=generator) + 0.5
        if "norm" in name
        else 0.2 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    if vocabulary != VOCABULARY:
        ids = torch.randperm(VOCABULARY, generator=generator)[:vocabulary].sort().values
        tensors["d2t"] = ids - torch.arange(vocabulary)
        tensors["t2d"] = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, ids, True)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    return save_checkpoint(folder, "Qwen3ForCausalLM", head_dim=32, num_hidden_layers=NUM_LAYERS)


def head_of(form: str, folder: Path) -> tuple[Path, tuple[int, ...]]:
    options, taps = FORMS[form]
    return save_head(folder / "head", len(taps), "layers.0" if "layers.0" in form else "midlayer", **options), taps


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", FORMS)
def test_its_guesses_are_those_of_the_definition(target: Path, tmp_path: Path, form: str) -> None:
    """Behind right guesses and wrong ones, prompts in chunks and pages from the prefix cache."""
    head, taps = head_of(form, tmp_path)
    options = sizes(max_batched_tokens=24, speculation="eagle3", draft_model=str(head))
    engine = load(target, tmp_path, num_speculative_tokens=NUM_DRAFTS, **options)
    listener = Listener(engine)
    for engine._steps_ahead in (0, 1):  # as on a CPU, and as on a GPU
        answers(engine, random_prompts(LENGTHS), max_tokens=22, ignore_eos=True)
    assert engine.stats().prefix_hits > 0
    assert len(listener.heard) > 30 and {len(drafts) for _, drafts in listener.heard} >= {1, NUM_DRAFTS}
    definition = Definition(target, head, taps)
    for text, drafts in listener.heard:
        if len(text) > 1:
            assert drafts == definition.guesses(text, len(drafts))


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"seed": 3, "temperature": 0.7}], ids=["greedy", "seeded"])
def test_no_token_depends_on_it(target: Path, tmp_path: Path, sampling: dict[str, object]) -> None:
    head, _ = head_of("other layers", tmp_path)
    asked = {"max_tokens": 24, "ignore_eos": True} | sampling
    prompts = random_prompts(LENGTHS)
    expected = answers(load(target, tmp_path, speculation="off", **sizes()), prompts, **asked)
    options = sizes(page_size=1, num_pages=120, speculation="eagle3", draft_model=str(head), debug_checks=True)
    engine = load(target, tmp_path, **options)
    assert answers(engine, prompts, **asked) == expected
    assert engine.stats().drafts_proposed > 0 and engine.stats().num_preemptions > 0


def test_no_token_depends_on_steps_that_it_does_not_read(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto finds, in turns, that its guesses pay and that they do not."""
    head, _ = head_of("other layers", tmp_path)
    asked: dict[str, object] = {"max_tokens": 60, "ignore_eos": True, "temperature": 0.0}
    prompts = random_prompts(LENGTHS)
    expected = answers(load(target, tmp_path, speculation="off", **sizes()), prompts, **asked)
    looks: list[list[int]] = []

    def most_drafts(_: DraftCosts, wanted: list[int], shares: list[float]) -> int:
        looks.append(wanted)
        return 3 * (len(looks) // 5 % 2)

    monkeypatch.setattr(DraftCosts, "most_drafts", most_drafts)
    engine = load(target, tmp_path, speculation="auto", draft_model=str(head), **sizes())
    proposer, read = engine._runner._proposer, []  # type: ignore[attr-defined]
    observe = proposer.observe
    proposer.observe = lambda step: (read.append(step), observe(step))
    assert answers(engine, prompts, **asked) == expected
    assert engine.stats().drafts_proposed > 0
    assert 10 < len(read) < engine.num_steps - 10


def test_auto_knows_a_head_from_a_model(target: Path, tmp_path: Path) -> None:
    head, _ = head_of("other layers", tmp_path)
    for folder, kind in ((head, "eagle3"), (target, "draft")):
        options = {"model": str(target), "speculation": "auto", "draft_model": str(folder)}
        found = open_checkpoint(EngineConfig.parse(options)).proposer
        assert found is not None and found.kind == kind


def test_a_head_in_the_models_folder_needs_no_name(target: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(target, tmp_path / "checkpoint")
    options = {"model": str(checkpoint), "speculation": "eagle3"}
    with pytest.raises(EngineError, match=r"draft_model: is empty, and the model's folder has no draft_head"):
        open_checkpoint(EngineConfig.parse(options))
    head = save_head(checkpoint / "draft_head", 3, eagle_aux_hidden_state_layer_ids=[2, 3, 5])
    for speculation, found in (("eagle3", head), ("auto", head), ("ngram", None), ("off", None)):
        proposer = open_checkpoint(EngineConfig.parse(options | {"speculation": speculation})).proposer
        assert (None if proposer is None else (proposer.kind, proposer.folder)) == (found and ("eagle3", found))
    named = save_head(tmp_path / "named", 3, eagle_aux_hidden_state_layer_ids=[2, 3, 5])
    proposer = open_checkpoint(EngineConfig.parse(options | {"draft_model": str(named)})).proposer
    assert proposer is not None and proposer.folder == named
    save_head(head, 3, eagle_aux_hidden_state_layer_ids=[2, 3, 7])
    for speculation in ("eagle3", "auto"):
        with pytest.raises(EngineError, match=r"^draft_head: the head reads what \[2, 3, 7\] of the"):
            open_checkpoint(EngineConfig.parse(options | {"speculation": speculation}))
    ranks = EngineConfig.parse(options | {"speculation": "auto", "tensor_parallel_size": 2})
    assert open_checkpoint(ranks).proposer is None


def test_by_default_it_reads_a_low_a_middle_and_a_high_layer(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "target", "LlamaForCausalLM", num_hidden_layers=12)
    options = {"speculation": "eagle3", "draft_model": str(save_head(tmp_path / "head", 3))}
    proposer = open_checkpoint(EngineConfig.parse({"model": str(folder), **options})).proposer
    assert proposer is not None and proposer.eagle is not None
    assert proposer.eagle.taps == (2, 6, 9)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another vocabulary": ({"vocab_size": 200}, r"vocab_size 200 is not the model's \(199\)"),
    "another model": ({"target_hidden_size": 80}, r"for a model of hidden_size 80, not 64"),
    "no head": ({"architectures": ["LlamaForCausalLM"]}, r"LlamaForCausalLM is no head of EAGLE-3"),
    "layers that are not there": ({"eagle_aux_hidden_state_layer_ids": [1, 2, 7]}, r"reads what \[1, 2, 7\] of the"),
    "a norm before fc": ({"norm_before_fc": True}, r"norm_before_fc: expected False"),
    "two layers": ({"num_hidden_layers": 2}, r"num_hidden_layers: expected 1"),
    "positions that are no numbers": (
        {
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0},
            "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        },
        r"rope_parameters: ",
    ),
    "another width": ({"intermediate_size": 96, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}, r"tensor .*has shape"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_head_that_cannot_be_computed_is_refused_before_weights_are_read(
    target: Path, tmp_path: Path, wrong: str
) -> None:
    options, said = WRONG[wrong]
    head = save_head(tmp_path / "head", 3)
    (head / "config.json").write_text(json.dumps(CONFIG | options))
    config = EngineConfig.parse({"model": str(target), "speculation": "eagle3", "draft_model": str(head)})
    with pytest.raises(EngineError, match=f"draft_model: .*{said}"):
        open_checkpoint(config)


def test_ids_beyond_the_vocabulary_are_refused(target: Path, tmp_path: Path) -> None:
    head, _ = head_of("other layers", tmp_path)
    tensors = load_file(head / "model.safetensors")
    tensors["d2t"][-1] = VOCABULARY
    save_file(tensors, head / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"d2t leads out of the vocabulary of 199 tokens"):
        load(target, tmp_path, speculation="eagle3", draft_model=str(head), **sizes())
