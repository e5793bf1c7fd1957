"""Multi-token prediction through the real engine: its guesses are those of the definition, written down here over
transformers' layers, whatever happened to the sequence before; and no token depends on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers import AutoModelForCausalLM

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.runner.builder import RunnerBuilder
from paged_backend.units import spell_bytes
from tests.drafts_heard import Listener, sizes
from tests.engine_answers import answers, load
from tests.oracle import random_prompts, save_checkpoint

NUM_DRAFTS = 3
LENGTHS = [1, 15, 18, 40]  # none that the prefix cache has all but a token of
NUM_LAYERS = 2
OPTIONS: dict[str, Any] = {
    "num_hidden_layers": NUM_LAYERS,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
    "num_nextn_predict_layers": 1,
}

LATENTS: dict[str, Any] = {
    **{key: value for key, value in OPTIONS.items() if key not in ("head_dim", "use_qk_norm")},
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_group": 1,
    "topk_group": 1,
}

# the layer's modules in the order: of the token, of the state, of both, of what comes out
DEEPSEEK = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
MIMO = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")


def save_mimo(folder: Path) -> Path:
    """As MiMo-7B is published: a Qwen2 by another name, with the layer under names of its own."""
    save_with_mtp(folder, own_ends=False, architecture="Qwen2ForCausalLM", num_hidden_layers=NUM_LAYERS, head_dim=16)
    ours = dict(zip(DEEPSEEK, MIMO, strict=True))
    path, prefix = folder / "model.safetensors", f"model.layers.{NUM_LAYERS}."
    tensors = {}
    for name, tensor in load_file(path).items():
        module = name.removeprefix(prefix).removesuffix(".weight")
        renamed = name.replace(module, ours.get(module, module)).replace(prefix, "model.mtp_layers.0.")
        tensors[renamed if name.startswith(prefix) else name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    named = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "num_nextn_predict_layers": 1}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | named | {"attention_bias": True}))
    return folder


def save_with_mtp(folder: Path, own_ends: bool, architecture: str = "Glm4MoeForCausalLM", **options: Any) -> Path:
    """A checkpoint with a layer of multi-token prediction, as it is published: with copies of embedding and head, or
    without.
    """
    save_checkpoint(folder, architecture, **(options or OPTIONS))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(5)
    last, prefix = f"model.layers.{NUM_LAYERS - 1}.", f"model.layers.{NUM_LAYERS}."
    size = tensors["model.norm.weight"].shape[0]
    shapes = {prefix + name.removeprefix(last): t.shape for name, t in tensors.items() if name.startswith(last)}
    norms = ("enorm", "hnorm", "shared_head.norm")
    shapes |= {f"{prefix}{name}.weight": torch.Size([size]) for name in norms}
    shapes[f"{prefix}eh_proj.weight"] = torch.Size([size, 2 * size])
    for name, shape in shapes.items():
        if "norm" in name:
            tensors[name] = torch.rand(shape, generator=generator) + 0.5
        else:
            tensors[name] = 0.2 * torch.randn(shape, generator=generator)
    if own_ends:
        tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        # another than the model's, to be told apart from it
        tensors[f"{prefix}shared_head.head.weight"] = torch.randn(tensors["lm_head.weight"].shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


class Definition:
    """DeepSeek-V3's report, section 2.2, in float32, one sequence at a time, without any cache; further guesses read
    its normed state, as the first reads the model's. MiMo's joins the two in the other order, and reads both states
    before their norms.
    """

    def __init__(self, folder: Path, directory: Path) -> None:
        """directory: where the layer is written as one of transformers' own."""
        self._prefix = f"model.layers.{NUM_LAYERS}."
        self._mimo = "mimo" in (folder / "config.json").read_text()
        self._names = dict(zip(DEEPSEEK, MIMO if self._mimo else DEEPSEEK, strict=True))
        self._tensors = {
            name.replace("model.mtp_layers.0.", self._prefix): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        if self._mimo:
            config = json.loads((folder / "config.json").read_text())
            named = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
            folder = directory / "qwen2"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config | named))
            save_file(self._tensors, folder / "model.safetensors", metadata={"format": "pt"})
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        self._model = AutoModelForCausalLM.from_pretrained(folder, **options).eval().model
        # a decoder of one layer more has the layer among its own
        more: dict[str, Any] = {"num_hidden_layers": NUM_LAYERS + 1}
        if self._mimo:
            more["layer_types"] = ["full_attention"] * (NUM_LAYERS + 1)
        deeper = AutoModelForCausalLM.from_pretrained(folder, **more, **options).eval().model
        self._block = deeper.layers[NUM_LAYERS]
        self._eps = self._model.config.rms_norm_eps

    @torch.inference_mode()
    def guesses(self, text: list[int], count: int) -> list[int]:
        ids = torch.tensor(text)[None]
        before: list[Tensor] = []
        hook = self._model.norm.register_forward_pre_hook(lambda _, arguments: before.append(arguments[0]))
        after = self._model(ids).last_hidden_state
        hook.remove()
        states = list((before[0] if self._mimo else after)[0, :-1])
        following = list(text[1:])
        head = self._own("shared_head.head.weight", "lm_head.weight")
        for _ in range(count):
            state = self._states(torch.stack(states), torch.tensor(following))[-1]
            normed = self._norm(state, "shared_head.norm")
            following.append(int((normed @ head.T).argmax()))
            states.append(state if self._mimo else normed)
        return following[-count:]

    def _states(self, states: Tensor, following: Tensor) -> Tensor:
        """[T, hidden], [T] -> [T, hidden]"""
        embedded = self._own("embed_tokens.weight", "model.embed_tokens.weight")[following]
        both = [self._norm(embedded, "enorm"), self._norm(states, "hnorm")]
        joined = torch.cat(both[::-1] if self._mimo else both, dim=1)
        x = (joined @ self._tensors[f"{self._prefix}{self._names['eh_proj']}.weight"].T)[None]
        positions = torch.arange(len(states))[None]
        mask = torch.full((len(states), len(states)), -torch.inf).triu(1)[None, None]
        rope = self._model.rotary_emb(x, positions)
        answer = self._block(x, attention_mask=mask, position_ids=positions, position_embeddings=rope)
        return (answer[0] if isinstance(answer, tuple) else answer)[0]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._tensors[f"{self._prefix}{self._names[name]}.weight"]
        return rms_norm(x, weight.shape, weight, self._eps)

    def _own(self, name: str, others: str) -> Tensor:
        return self._tensors.get(self._prefix + name, self._tensors[others])


@pytest.fixture(scope="module", params=["own ends", "the model's ends", "mimo", "latents"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    if request.param == "latents":
        return save_with_mtp(path, own_ends=False, architecture="DeepseekV3ForCausalLM", **LATENTS)
    return save_mimo(path) if request.param == "mimo" else save_with_mtp(path, request.param == "own ends")


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("page_size", "num_pages"), [(1, 120), (16, 64)], ids=["preempted", "cached"])
def test_its_guesses_are_those_of_the_definition(folder: Path, tmp_path: Path, page_size: int, num_pages: int) -> None:
    """Behind right guesses and wrong ones, prompts in chunks, pages from the prefix cache and preemptions."""
    options = sizes(max_batched_tokens=24, page_size=page_size, num_pages=num_pages, prefix_cache=page_size > 1)
    engine = load(folder, tmp_path, speculation="mtp", num_speculative_tokens=NUM_DRAFTS, **options)
    listener = Listener(engine)
    for engine._steps_ahead in (0, 1):  # as on a CPU, and as on a GPU
        answers(engine, random_prompts(LENGTHS), max_tokens=22, ignore_eos=True)
    stats = engine.stats()
    assert stats.num_preemptions > 0 or stats.prefix_hits > 0
    assert len(listener.heard) > 30 and {len(drafts) for _, drafts in listener.heard} >= {1, NUM_DRAFTS}
    definition = Definition(folder, tmp_path)
    for text, drafts in listener.heard:
        if len(text) > 1:
            assert drafts == definition.guesses(text, len(drafts))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.0}, {"seed": 3, "temperature": 0.7}, {"seed": 5, "frequency_penalty": 0.3, "top_p": 0.95}],
    ids=["greedy", "seeded", "penalties"],
)
def test_no_token_depends_on_it(folder: Path, tmp_path: Path, sampling: dict[str, object]) -> None:
    asked = {"max_tokens": 24, "ignore_eos": True} | sampling
    prompts = random_prompts(LENGTHS)
    expected = answers(load(folder, tmp_path, speculation="off", **sizes()), prompts, **asked)
    engine = load(folder, tmp_path, speculation="mtp", debug_checks=True, **sizes())
    assert answers(engine, prompts, **asked) == expected
    assert engine.stats().drafts_proposed > 0


def test_a_checkpoint_without_such_a_layer_is_refused(tmp_path: Path) -> None:
    config = EngineConfig.parse({"model": str(save_checkpoint(tmp_path, "LlamaForCausalLM")), "speculation": "mtp"})
    with pytest.raises(EngineError, match=r"speculation: mtp needs a layer of multi-token prediction"):
        open_checkpoint(config)


def test_auto_takes_what_the_checkpoint_brings(folder: Path, tmp_path: Path) -> None:
    def proposer(checkpoint: Path, **options: object) -> str | None:
        found = open_checkpoint(EngineConfig.parse({"model": str(checkpoint), "speculation": "auto", **options}))
        return None if found.proposer is None else found.proposer.kind

    plain = save_checkpoint(tmp_path / "plain", "Glm4MoeForCausalLM", **(OPTIONS | {"num_nextn_predict_layers": 0}))
    assert proposer(folder) == "mtp"
    assert proposer(folder, tensor_parallel_size=2) is None
    assert proposer(folder, draft_model=str(plain)) == "draft"
    assert proposer(plain) is None


def test_its_memory_is_known_before_weights_are_read(folder: Path) -> None:
    prefixes = f"model.layers.{NUM_LAYERS}.", "model.mtp_layers.0."
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    sizes_of = {name: tensor.nbytes for name, tensor in load_file(folder / "model.safetensors").items()}
    own = {name: size for name, size in sizes_of.items() if name.startswith(prefixes)}
    has_ends = any("embed_tokens" in name for name in own)
    expected = sum(own.values()) + (0 if has_ends else sum(sizes_of[name] for name in ends))
    config = EngineConfig(model=str(folder), speculation="mtp", device="cpu", dtype="float32", num_pages=8)
    sentences: list[str] = []
    builder = RunnerBuilder(config, sentences.append, open_checkpoint(config))
    assert builder._proposer is not None and builder._proposer.weight_bytes == expected
    builder.build()
    assert any(f"multi-token prediction: weights: {spell_bytes(expected)}," in sentence for sentence in sentences)


def test_a_layer_that_is_not_there_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    folder = save_with_mtp(tmp_path, own_ends=False)
    path = folder / "model.safetensors"
    whole = load_file(path)
    config = EngineConfig.parse({"model": str(folder), "speculation": "mtp"})
    for name in ("eh_proj.weight", "self_attn.q_proj.weight"):
        tensors = {key: tensor for key, tensor in whole.items() if key != f"model.layers.{NUM_LAYERS}.{name}"}
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(EngineError, match=f"mtp: checkpoint: tensor model.layers.{NUM_LAYERS}.{name} is missing"):
            open_checkpoint(config)


def test_it_can_be_measured_without_weights(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint", "Glm4MoeForCausalLM", **OPTIONS)
    engine = load(folder, tmp_path, speculation="mtp", load_format="dummy", **sizes())
    prompts = [np.arange(9, dtype=np.int32)]
    assert len(answers(engine, prompts, max_tokens=20, ignore_eos=True)[0]) == 20
    assert engine.stats().drafts_proposed > 0
