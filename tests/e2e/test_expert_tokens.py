"""Families with experts through the whole engine: whatever its pages, budget and cache are, the tokens are those of
transformers in float32.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paged_backend.messages import Submit
from paged_backend.models.architecture import read_architecture
from paged_backend.models.kv_groups import group_layers
from paged_backend.request import parse_sampling
from tests import engine_answers
from tests.expert_models import MODELS, save_expert_model
from tests.oracle import Oracle, random_prompts

LENGTHS = [1, 2, 15, 17, 33, 64, 100, 300, 700]
MAX_TOKENS = 24
SETTINGS = {
    "tight pages of 16": {"page_size": 16, "num_pages": 56, "max_batched_tokens": 64},
    "pages of 1, small steps": {"page_size": 1, "num_pages": 1800, "max_batched_tokens": 32, "prefix_cache": False},
    "pages of 64, large steps": {"page_size": 64, "num_pages": 64, "max_batched_tokens": 4096},
}
# In CI one that keeps keys and values, with windows, and one that keeps latents. The log-probabilities below are of
# every model.
_IN_CI = (("gpt-oss-20b", "tight pages of 16"), ("deepseek-v3", "pages of 1, small steps"))
CASES = [
    pytest.param(
        name,
        settings,
        id=f"{name}, {words}",
        marks=[] if (name, words) in _IN_CI else pytest.mark.long,
    )
    for name in MODELS
    for words, settings in SETTINGS.items()
]
Case = tuple[Path, list[np.ndarray], list[list[int]]]


load = partial(engine_answers.load, max_num_sequences=24, max_model_len=760)
answers = partial(engine_answers.answers, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = save_expert_model(tmp_path_factory.mktemp("checkpoint"), request.param)
    prompts = random_prompts(LENGTHS)
    prompts += [np.concatenate([prompts[-2][:130], prompt[:5]]) for prompt in prompts[2:4]]  # common beginnings
    return folder, prompts, Oracle(folder).greedy(prompts, MAX_TOKENS)


@pytest.mark.parametrize(("case", "settings"), CASES, indirect=["case"])
def test_greedy_tokens_are_those_of_transformers(case: Case, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder, prompts, expected = case
    windows = read_architecture(folder).sliding_windows
    engine = load(
        folder, tmp_path, **settings | {"num_pages": settings["num_pages"] * len(group_layers(windows, 760).groups)}
    )
    scheduler = engine._scheduler

    def preempt() -> None:
        """By force, where what windows leave behind may be enough for all."""
        running = scheduler._running.runners
        if any(windows) and settings["page_size"] == 16 and engine.num_steps % 9 == 0 and running:
            scheduler._living.preempt(running[-1])

    assert answers(engine, prompts, preempt) == expected
    assert answers(engine, prompts, preempt) == expected  # now with what the first round left in the cache
    assert (engine.stats().prefix_hits > 0) == settings.get("prefix_cache", True)
    assert (engine.stats().num_preemptions > 0) == (settings["page_size"] == 16)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Of the likeliest tokens, in steps that mix parts of prompts with single tokens."""
    folder = save_expert_model(tmp_path / "checkpoint", name)
    engine = load(folder, tmp_path, page_size=16, max_batched_tokens=64)
    prompts, params = random_prompts((1, 33, 150)), parse_sampling({"max_tokens": 6, "temperature": 0, "logprobs": 20})
    for request_id, prompt in enumerate(prompts):
        engine.submit(Submit(request_id, prompt.tobytes(), params, (), "", 1e18))
    tokens: list[list[int]] = [[] for _ in prompts]
    tops: list[list[dict[int, float]]] = [[] for _ in prompts]
    while not engine.idle:
        for output in engine.step():
            pairs = zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True)
            for entry, (request_id, token) in enumerate(pairs):
                tokens[request_id].append(token)
                tops[request_id].append(output.top_logprobs[entry])
    oracle = Oracle(folder)
    for prompt, answer, found in zip(prompts, tokens, tops, strict=True):
        assert len(answer) == 6
        truth = oracle.logits([*prompt.tolist(), *answer])[len(prompt) - 1 : -1].log_softmax(-1)
        for expected, top in zip(truth, found, strict=True):
            ids = list(top)
            assert len(ids) == 20
            torch.testing.assert_close(torch.tensor([top[i] for i in ids]), expected[ids], rtol=0, atol=1e-4)
