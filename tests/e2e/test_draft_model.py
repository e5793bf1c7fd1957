"""A draft model through the real engine: its guesses are what transformers says that it would say, whatever happened to
the sequence before; and no token depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.errors import EngineError
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.runner.model_runner import ModelRunner
from tests.drafts_heard import Listener, sizes
from tests.engine_answers import answers, load
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.runner_driver import load_runner

NUM_DRAFTS = 3
LENGTHS = [1, 15, 16, 40]
SAMPLINGS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"seed": 3, "temperature": 0.7},
    "penalties": {"seed": 5, "repetition_penalty": 1.1, "frequency_penalty": 0.3, "top_p": 0.95},
}
# heads of another number and size than the target's
OTHER_HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("target"), "Qwen3ForCausalLM", head_dim=32)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("draft"), "LlamaForCausalLM", seed=7, **OTHER_HEADS)


def drafting(target: Path, draft_model: Path, directory: Path, **options: object) -> Engine:
    chosen = {"speculation": "draft", "draft_model": str(draft_model), "num_speculative_tokens": NUM_DRAFTS}
    return load(target, directory, **(sizes() | chosen | options))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("page_size", [1, 16])
def test_no_token_depends_on_a_draft_model(
    target: Path, small: Path, tmp_path: Path, page_size: int, sampling: dict[str, object]
) -> None:
    options = sizes(page_size=page_size, num_pages=1024 // page_size)
    asked = {"max_tokens": 24, "ignore_eos": True} | sampling
    prompts = random_prompts(LENGTHS)
    expected = answers(load(target, tmp_path, speculation="off", **options), prompts, **asked)
    engine = drafting(target, small, tmp_path, debug_checks=True, **options)
    assert answers(engine, prompts, **asked) == expected
    assert engine.stats().drafts_proposed > 0


@pytest.mark.parametrize(("page_size", "num_pages"), [(1, 120), (16, 64)], ids=["preempted", "cached"])
def test_its_guesses_are_what_transformers_would_say(
    target: Path, small: Path, tmp_path: Path, page_size: int, num_pages: int
) -> None:
    """Behind right guesses and wrong ones, prompts in chunks, pages from the prefix cache and preemptions."""
    engine = drafting(target, small, tmp_path, max_batched_tokens=24, page_size=page_size, num_pages=num_pages)
    listener = Listener(engine)
    prompts = random_prompts([5, 40, 33])
    prompts.append(np.concatenate([prompts[1], prompts[0]]))
    for engine._steps_ahead in (0, 1):  # as on a CPU, and as on a GPU
        answers(engine, prompts, max_tokens=24, ignore_eos=True)
    stats = engine.stats()
    assert stats.prefix_hits > 0 and (stats.num_preemptions > 0 or page_size > 1)
    assert len(listener.heard) > 30
    likely = Oracle(small).greedy([text for text, _ in listener.heard], NUM_DRAFTS)
    for (_, drafts), said in zip(listener.heard, likely, strict=True):
        assert drafts == said[: len(drafts)]


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "windows", "experts"])
def test_a_draft_model_that_is_the_model_is_always_right(name: str, tmp_path: Path) -> None:
    options: dict[str, object] = {"head_dim": 32} if name == "Qwen3ForCausalLM" else {}
    if name == "windows":  # of some layers, so that there are several KV groups
        layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
        options = {"head_dim": 32, "use_sliding_window": True, "sliding_window": 24, "layer_types": layer_types}
        name = "Qwen3ForCausalLM"
    if name == "experts":
        name = "MixtralForCausalLM"
    folder = save_checkpoint(tmp_path / "checkpoint", name, **options)
    engine = drafting(folder, folder, tmp_path, debug_checks=True)
    prompts = random_prompts(LENGTHS)
    for _ in range(2):  # the second time out of the prefix cache
        answers(engine, prompts, max_tokens=25, ignore_eos=True)
    stats = engine.stats()
    assert stats.drafts_accepted == stats.drafts_proposed > 100 and stats.prefix_hits > 0


def test_a_draft_model_of_a_model_with_windows_alone_forgets_as_it_does(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "target", "MistralForCausalLM", sliding_window=24)
    boundless = save_checkpoint(tmp_path / "draft", "MistralForCausalLM", sliding_window=None)
    engine = drafting(folder, boundless, tmp_path, debug_checks=True)
    answers(engine, random_prompts([5, 60]), max_tokens=60, ignore_eos=True)
    stats = engine.stats()
    assert stats.drafts_accepted == stats.drafts_proposed > 50


@torch.inference_mode()
def test_beams_copy_its_pages_too(target: Path, small: Path, tmp_path: Path) -> None:
    runner = load_runner(target, speculation="draft", draft_model=str(small), num_pages=8)
    for layers in (runner._kv_pages, proposer_of(runner)._kv_pages):
        layers[0].tensor[3] = 7
    copies = np.array([[3, 5]], np.int32)
    runner._rows._copy_pages(Tensor(copies).int())
    assert all((layers[0].tensor[5] == 7).all() for layers in (runner._kv_pages, proposer_of(runner)._kv_pages))


def proposer_of(runner: ModelRunner) -> object:
    assert runner._proposer is not None
    return runner._proposer


def test_its_memory_is_a_part_of_the_pool(target: Path, small: Path) -> None:
    sentences: list[str] = []
    load_runner(target, sentences.append, speculation="draft", draft_model=str(small), num_pages=8)
    (pool,) = [sentence for sentence in sentences if sentence.startswith("pool:")]
    # 8 pages of 16 float32 tokens, K and V: 3 layers of 2 heads of 32, and 1 layer of a head of 16
    assert "208 KiB, 16 KiB of it for the model that guesses" in pool
    assert any(sentence.startswith("draft model: LlamaForCausalLM, 1 layer") for sentence in sentences)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"speculation": "draft"}, r"draft_model: is empty; speculation=draft needs one"),
        ({"speculation": "off", "draft_model": "x"}, r"draft_model: is unused with speculation=off"),
        (
            {"speculation": "draft", "draft_model": "x", "tensor_parallel_size": 2},
            r"speculation: draft is for one GPU a replica, tensor_parallel_size must be 1, not 2",
        ),
    ],
    ids=["none", "unused", "ranks"],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        EngineConfig.parse(options)


def test_a_draft_model_of_another_vocabulary_is_refused_before_weights_are_read(target: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", "LlamaForCausalLM", vocab_size=200)
    for path, said in (
        (other, r"draft_model: vocab_size 200 is not the model's \(199\)"),
        (tmp_path / "nothing", r"draft_model: no folder"),
        (tmp_path, r"draft_model: .*config.json"),
    ):
        config = EngineConfig.parse({"model": str(target), "speculation": "draft", "draft_model": str(path)})
        with pytest.raises(EngineError, match=said):
            open_checkpoint(config)


def test_a_draft_model_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folders = [save_checkpoint(tmp_path / name, "LlamaForCausalLM") for name in ("one", "other")]
    for folder, words in zip(folders, (["a", "b"], ["b", "a"]), strict=True):
        save_words(folder, words)
    config = EngineConfig.parse({"model": str(folders[0]), "speculation": "draft", "draft_model": str(folders[1])})
    with pytest.raises(EngineError, match=r"draft_model: its tokenizer is not the model's: token 'a' has id 1 there"):
        open_checkpoint(config)
    save_words(folders[1], ["a", "b"])
    assert open_checkpoint(config).proposer is not None


@pytest.mark.parametrize("size", [150, 250])
def test_a_vocabulary_may_be_padded_to_another_size(target: Path, tmp_path: Path, size: int) -> None:
    """The model's random weights choose ids beyond the vocabulary, too, which the draft model has not, or more."""
    padded = save_checkpoint(tmp_path / "padded", "LlamaForCausalLM", seed=7, vocab_size=size, **OTHER_HEADS)
    folder = save_checkpoint(tmp_path / "target", "Qwen3ForCausalLM", head_dim=32)
    for path in (padded, folder):
        save_words(path, ["a", "b"])
    prompts = random_prompts(LENGTHS)
    expected = answers(load(folder, tmp_path, speculation="off", **sizes()), prompts, max_tokens=40, ignore_eos=True)
    assert max(max(answer) for answer in expected) > 150
    engine = drafting(folder, padded, tmp_path)
    listener = Listener(engine)
    assert answers(engine, prompts, max_tokens=40, ignore_eos=True) == expected
    draft_ids = [token for _, drafts in listener.heard for token in drafts]
    assert len(draft_ids) > 20 and max(draft_ids) < min(size, 199)


def save_words(folder: Path, words: Sequence[str]) -> None:
    from tokenizers import Tokenizer, models

    ids = {word: token_id for token_id, word in enumerate(words)}
    Tokenizer(models.WordLevel(ids, unk_token=words[0])).save(str(folder / "tokenizer.json"))
