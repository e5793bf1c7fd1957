"""Families with experts through the whole engine: whatever its pages, budget and cache are, the tokens are those of
transformers in float32.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_backend.models.architecture import read_architecture
from paged_backend.models.kv_groups import group_layers
from tests import engine_answers
from tests.bench.geometries import GEOMETRIES
from tests.oracle import Oracle, random_prompts, save_checkpoint

LENGTHS = [1, 2, 15, 17, 33, 64, 100, 300, 700]
MAX_TOKENS = 24
SHRUNK = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
}
SHRUNK |= {
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {},
    "qwen1.5-moe-a2.7b": {"shared_expert_intermediate_size": 40},
    "qwen3-30b-a3b": {},
    "glm-4.5-air": {},
    "minimax-m2": {"rotary_dim": 4},
    "gpt-oss-20b": {"layer_types": ["sliding_attention", "full_attention"]},
}
SETTINGS = {
    "tight pages of 16": {"page_size": 16, "num_pages": 56, "max_batched_tokens": 64},
    "pages of 1, small steps": {"page_size": 1, "num_pages": 1800, "max_batched_tokens": 32, "prefix_cache": False},
    "pages of 64, large steps": {"page_size": 64, "num_pages": 64, "max_batched_tokens": 4096},
}
# the others in all but the first take as long again, and break no other way
_IN_EVERY_SETTING = ("qwen3-30b-a3b", "gpt-oss-20b")
CASES = [
    pytest.param(
        name,
        settings,
        id=f"{name}, {words}",
        marks=[] if name in _IN_EVERY_SETTING or words.startswith("tight") else pytest.mark.long,
    )
    for name in MODELS
    for words, settings in SETTINGS.items()
]
Case = tuple[Path, list[np.ndarray], list[list[int]]]


def shrunk(name: str) -> dict[str, Any]:
    """The published config of a model with less width and depth, and nothing else changed."""
    published = {key: value for key, value in GEOMETRIES[name].items() if key not in ("architectures", "model_type")}
    own = {key: value for key, value in SHRUNK.items() if key in published or key.endswith("_token_id")}
    return {**published, **own, **MODELS[name], "initializer_range": 0.2}


load = partial(engine_answers.load, max_num_sequences=24, max_model_len=760)
answers = partial(engine_answers.answers, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name = request.param
    folder = save_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), GEOMETRIES[name]["architectures"][0], **shrunk(name)
    )
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
