"""EAGLE-3 heads through the real engine: their guesses are those of the definition, written down here in plain torch
over transformers' states, whatever happened to the sequence before; and no token depends on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import AutoModelForCausalLM

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.checkpoint import open_checkpoint
from tests.drafts_heard import Listener, sizes
from tests.engine_answers import answers, load
from tests.oracle import random_prompts, save_checkpoint

NUM_DRAFTS = 3
LENGTHS = [1, 15, 18, 40]  # none that the prefix cache has all but a token of
VOCABULARY, DRAFT_VOCABULARY = 199, 60
NUM_LAYERS, TARGET_SIZE = 6, 64
HEADS, KV_HEADS, HEAD_DIM, EPS, THETA = 4, 1, 16, 1e-5, 10_000.0
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
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
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


class Definition:
    """The paper's section 3, in float32, one sequence at a time, without any cache."""

    def __init__(self, target: Path, head: Path, taps: tuple[int, ...]) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        tensors = load_file(head / "model.safetensors")
        self._tensors = {name.removeprefix("midlayer.").removeprefix("layers.0."): t for name, t in tensors.items()}
        self._normed_residual = json.loads((head / "config.json").read_text()).get("norm_before_residual", False)
        self._embedding = self._tensors.get("embed_tokens.weight", self._model.get_input_embeddings().weight)
        self._taps = taps

    @torch.inference_mode()
    def guesses(self, text: list[int], count: int) -> list[int]:
        layers = self._model(torch.tensor(text)[None], output_hidden_states=True).hidden_states
        read = [layers[after][0] if after < NUM_LAYERS else self._last(text) for after in self._taps]
        states = list(self._product(torch.cat(read, dim=1), "fc")[:-1])
        following = list(text[1:])
        for _ in range(count):
            state = self._layer(torch.stack(states), torch.tensor(following))[-1]
            guess = int(self._product(self._norm(state, "norm"), "lm_head").argmax())
            following.append(guess + int(self._tensors["d2t"][guess]) if "d2t" in self._tensors else guess)
            states.append(state)
        return following[-count:]

    def _last(self, text: list[int]) -> Tensor:
        """[T, hidden]: transformers gives the normed answer of the last layer."""
        found: list[Tensor] = []
        hook = self._model.model.norm.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0][0]))
        self._model(torch.tensor(text)[None])
        hook.remove()
        return found[0]

    def _layer(self, states: Tensor, following: Tensor) -> Tensor:
        """[T, hidden], [T] -> [T, hidden]"""
        normed = self._norm(states, "hidden_norm")
        x = torch.cat([self._norm(self._embedding[following], "input_layernorm"), normed], dim=1)
        q, k, v = (
            self._product(x, f"self_attn.{letter}_proj").view(len(x), -1, HEAD_DIM).transpose(0, 1) for letter in "qkv"
        )
        attended = scaled_dot_product_attention(
            _rotated(q), _rotated(k).expand(HEADS, -1, -1), v.expand(HEADS, -1, -1), is_causal=True
        )
        answer = self._product(attended.transpose(0, 1).reshape(len(x), -1), "self_attn.o_proj")
        y = (normed if self._normed_residual else states) + answer
        inner = self._norm(y, "post_attention_layernorm")
        gated = silu(self._product(inner, "mlp.gate_proj")) * self._product(inner, "mlp.up_proj")
        return y + self._product(gated, "mlp.down_proj")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._tensors[f"{name}.weight"]
        return rms_norm(x, weight.shape, weight, EPS)

    def _product(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self._tensors[f"{name}.weight"])


def _rotated(x: Tensor) -> Tensor:
    """[heads, T, D] with the rotary positions 0, 1, 2 … (Su et al., 2021), halves as pairs."""
    angles = torch.arange(x.shape[1])[:, None] * THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    return save_checkpoint(folder, "Qwen3ForCausalLM", head_dim=32, num_hidden_layers=NUM_LAYERS)


def head_of(form: str, folder: Path) -> tuple[Path, tuple[int, ...]]:
    options, taps = FORMS[form]
    return save_head(folder / "head", len(taps), "layers.0" if "layers.0" in form else "midlayer", **options), taps


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
    expected = answers(load(target, tmp_path, **sizes()), prompts, **asked)
    options = sizes(page_size=1, num_pages=120, speculation="eagle3", draft_model=str(head), debug_checks=True)
    engine = load(target, tmp_path, **options)
    assert answers(engine, prompts, **asked) == expected
    assert engine.stats().drafts_proposed > 0 and engine.stats().num_preemptions > 0


def test_auto_knows_a_head_from_a_model(target: Path, tmp_path: Path) -> None:
    head, _ = head_of("other layers", tmp_path)
    for folder, kind in ((head, "eagle3"), (target, "draft")):
        options = {"model": str(target), "speculation": "auto", "draft_model": str(folder)}
        found = open_checkpoint(EngineConfig.parse(options)).proposer
        assert found is not None and found.kind == kind


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
