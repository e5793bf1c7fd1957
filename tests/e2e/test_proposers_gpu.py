"""Models that make drafts, on CUDA: what only graphs of a device, and a host that runs ahead of it, can get wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from paged_backend.engine.engine import Engine
from tests.drafts_heard import Listener, sizes
from tests.e2e import test_eagle3, test_mtp
from tests.engine_answers import answers, load
from tests.oracle import random_prompts, save_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

NUM_DRAFTS = 3
TAPS = (1, 2, 3)
LENGTHS = [2, 15, 18, 40]
Guesses = Callable[[list[int], int], list[int]]  # behind a text, so many


def saved(kind: str, directory: Path) -> tuple[Path, str, Guesses | None]:
    """A target, what makes its drafts, and what those must be. The draft model is the target: they are right."""
    if kind == "mtp":
        (directory / "as a layer").mkdir()
        target = test_mtp.save_with_mtp(directory / "target", own_ends=True)
        return target, "", test_mtp.Definition(target, directory / "as a layer").guesses
    target = save_checkpoint(directory / "target", "Qwen3ForCausalLM", head_dim=32, num_hidden_layers=6)
    if kind == "eagle3":
        head = test_eagle3.save_head(directory / "head", len(TAPS), eagle_aux_hidden_state_layer_ids=list(TAPS))
        return target, str(head), test_eagle3.Definition(target, head, TAPS).guesses
    return target, str(target), None


def drafting(kind: str, target: Path, draft_model: str, directory: Path, **options: object) -> Engine:
    chosen = {"device": "cuda", "dtype": "float32", "speculation": kind, "num_speculative_tokens": NUM_DRAFTS}
    return load(target, directory, **(sizes() | chosen | {"draft_model": draft_model} | options))


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["captured", "launched"])
@pytest.mark.parametrize("kind", ["draft", "eagle3", "mtp"])
def test_drafts_are_those_of_the_definition_and_tokens_those_without_any(
    kind: str, cuda_graphs: bool, tmp_path: Path
) -> None:
    target, draft_model, guesses = saved(kind, tmp_path)
    prompts = random_prompts(LENGTHS)
    wanted = answers(
        load(target, tmp_path, dtype="float32", speculation="off", **sizes()), prompts, max_tokens=24, ignore_eos=True
    )
    # prompts in captured steps, or in chunks
    budget = 160 if cuda_graphs else 24
    engine = drafting(kind, target, draft_model, tmp_path, cuda_graphs=cuda_graphs, max_batched_tokens=budget)
    listener = Listener(engine)
    for _ in range(2):  # the second time out of the prefix cache
        assert answers(engine, prompts, max_tokens=24, ignore_eos=True) == wanted
    assert len(listener.heard) > 20
    if guesses is None:
        stats = engine.stats()
        assert stats.drafts_accepted > 0.9 * stats.drafts_proposed
        return
    for text, drafts in listener.heard:
        assert drafts == guesses(text, len(drafts)), f"behind {len(text)} tokens"


@pytest.mark.parametrize("kind", ["ngram", "draft", "eagle3", "mtp"])
def test_no_step_with_drafts_makes_the_host_wait(kind: str, tmp_path: Path) -> None:
    """Torch raises at whatever waits for the device by itself: .item(), copies to pageable memory, boolean indices."""
    target, draft_model, _ = saved("draft" if kind == "ngram" else kind, tmp_path)
    engine = drafting(kind, target, "" if kind == "ngram" else draft_model, tmp_path, prefix_cache=False)
    prompts = [np.concatenate([prompt, prompt]) for prompt in random_prompts(LENGTHS)]
    asked: dict[str, object] = {"max_tokens": 24, "ignore_eos": True, "seed": 3, "temperature": 0.3}
    expected = answers(engine, prompts, **asked)
    before = engine.stats().drafts_proposed
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert answers(engine, prompts, **asked) == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.stats().drafts_proposed > before > 0
