"""A canary: one caller's keys and values lie in pages that another gets, and nothing of them reaches the other's
logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from tests.oracle import random_prompts, save_checkpoint

NUM_PAGES = 24
PAGE_SIZE = 16
CANARIES = random_prompts([1, 15, 16, 17, 40, 100])
SECRETS = random_prompts([120, 130, 110], seed=77)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "LlamaForCausalLM", tie_word_embeddings=True)


def load(folder: Path, tmp_path: Path, **options: object) -> Engine:
    given = {
        "model": str(folder),
        "device": "cpu",
        "speculation": "off",
        "num_pages": NUM_PAGES,
        "max_model_len": 256,
        "max_num_sequences": 4,
        "debug_checks": True,
        **options,
    }
    engine, *_ = load_engine(EngineConfig.parse(given), tmp_path)
    return engine


def kv_pages(engine: Engine) -> list[torch.Tensor]:
    layers = engine._runner._runner._kv_pages  # type: ignore[attr-defined]  # behind the runner of debug_checks
    return [layer.tensor for layer in layers]


def ask(
    engine: Engine, request_id: int, prompt: np.ndarray, salt: str = "", max_tokens: int = 20
) -> tuple[list[int], list[float], int]:
    """(tokens, logprobs of the 8 likeliest of each, tokens found in the cache)."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=8)
    engine.submit(Submit(request_id, prompt.tobytes(), sampling, (), salt, 1e18))
    tokens: list[int] = []
    tops: list[float] = []
    cached = 0
    while not engine.idle:
        for output in engine.step():
            tokens += output.token_ids.tolist()
            tops += [
                logprob for entry in range(len(output.token_ids)) for logprob in output.top_logprobs[entry].values()
            ]
            cached += sum(output.started.values())
    return tokens, tops, cached


@pytest.mark.one_in(3)
@pytest.mark.parametrize("poison", ["secrets", "huge", "nan"])
@pytest.mark.parametrize("prompt", CANARIES, ids=lambda prompt: f"{len(prompt)} tokens")
def test_what_a_page_held_before_changes_not_a_bit_of_anothers_logits(
    folder: Path, tmp_path: Path, prompt: np.ndarray, poison: str
) -> None:
    fresh = ask(load(folder, tmp_path), 1, prompt)
    used = load(folder, tmp_path)
    if poison == "secrets":
        for number, secret in enumerate(SECRETS):  # together they have held every page
            ask(used, number, secret, salt="theirs", max_tokens=60)
        assert all(bool((layer != 0).any(dim=-1).all()) for layer in kv_pages(used)), (
            "a page that held no secret proves nothing"
        )
    else:
        with torch.inference_mode():
            for layer in kv_pages(used):
                layer.fill_(float("nan") if poison == "nan" else 1e30)
    assert ask(used, 100, prompt, salt="mine") == fresh


def test_a_tenants_prompt_asked_by_another_finds_no_page_of_his(folder: Path, tmp_path: Path) -> None:
    engine = load(folder, tmp_path)
    secret = SECRETS[0]
    first = ask(engine, 1, secret, salt="theirs")
    second = ask(engine, 2, secret, salt="mine")
    again = ask(engine, 3, secret, salt="theirs")
    assert first[2] == second[2] == 0
    assert again[2] == len(secret) // PAGE_SIZE * PAGE_SIZE
    assert first[:2] == second[:2]


def test_a_page_that_another_tenant_reads_would_be_noticed(folder: Path, tmp_path: Path) -> None:
    """The canary sings: with a foreign key and value in its own pages, the logits do change."""
    engine = load(folder, tmp_path)
    fresh = ask(engine, 1, SECRETS[0])
    with torch.inference_mode():
        for layer in kv_pages(engine):
            layer.add_(0.5)
    found: Any = ask(engine, 2, SECRETS[0])
    assert found[2] > 0
    assert found[1] != fresh[1]
