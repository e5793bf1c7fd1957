"""The whole engine, without a server: whatever its pages, budget and cache are, the tokens are those of transformers in
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import engine_answers
from tests.oracle import Oracle, RoundedCache, random_prompts, save_checkpoint

LENGTHS = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 200]
MAX_TOKENS = 12
LONG_ANSWER = 48  # several pages, so that sequences outgrow what they started with
CHECKPOINTS = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral sliding": ("MistralForCausalLM", {"sliding_window": 90}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 4}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
}

Checkpoint = tuple[Path, list[np.ndarray], list[list[int]]]  # its folder, prompts, transformers' answers


def cases(settings: Sequence[tuple[Any, ...]], *in_ci: tuple[Any, ...]) -> list[Any]:
    """llama is asked in every setting, the others, whose blocks differ but not what is done with pages, in some; all of
    them in all with -m long.
    """
    return [
        pytest.param(name, *setting, marks=() if name == "llama" or setting in in_ci else pytest.mark.long)
        for name in CHECKPOINTS
        for setting in settings
    ]


load = partial(engine_answers.load, max_num_sequences=24)
answers = partial(engine_answers.answers, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Each is made once, whichever test asks first."""

    @cache
    def make(name: str) -> Checkpoint:
        architecture, options = CHECKPOINTS[name]
        folder = save_checkpoint(tmp_path_factory.mktemp("checkpoint"), architecture, **options)
        prompts = random_prompts(LENGTHS)
        prompts += [np.concatenate([prompts[-1][:130], prompt[:5]]) for prompt in prompts[4:8]]  # common beginnings
        return folder, prompts, Oracle(folder).greedy(prompts, LONG_ANSWER)

    return make


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    ("name", "page_size", "budget", "prefix_cache"),
    cases([*product((1, 16, 64), (32, 4096), (True, False))], (1, 32, True), (16, 4096, False)),
)
def test_greedy_tokens_are_those_of_transformers(
    checkpoint: Callable[[str], Checkpoint],
    tmp_path: Path,
    name: str,
    page_size: int,
    budget: int,
    prefix_cache: bool,
) -> None:
    folder, prompts, expected = checkpoint(name)
    engine = load(
        folder,
        tmp_path,
        page_size=page_size,
        num_pages=4096 // page_size,
        max_batched_tokens=budget,
        prefix_cache=prefix_cache,
    )
    short = [answer[:MAX_TOKENS] for answer in expected]
    assert answers(engine, prompts) == short
    assert answers(engine, prompts) == short  # now with what the first round left in the cache
    assert (engine.stats().prefix_hits > 0) == prefix_cache


@pytest.mark.parametrize("name", cases([()]))
def test_keys_and_values_of_8_bits_give_the_tokens_of_a_model_whose_cache_is_rounded(
    checkpoint: Callable[[str], Checkpoint], tmp_path: Path, name: str
) -> None:
    folder, prompts, unrounded = checkpoint(name)
    expected = Oracle(folder, RoundedCache).greedy(prompts, LONG_ANSWER)
    assert expected != unrounded
    engine = load(folder, tmp_path, kv_dtype="fp8_e4m3", num_pages=40, max_model_len=300, max_batched_tokens=64)
    assert answers(engine, prompts, max_tokens=LONG_ANSWER) == expected
    assert engine.stats().num_preemptions > 0 and engine.stats().prefix_hits > 0


@pytest.mark.one_in(2)
@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(("name", "page_size"), cases([(1,), (16,), (64,)], (16,)))
def test_preemption_changes_no_token(
    checkpoint: Callable[[str], Checkpoint], tmp_path: Path, name: str, page_size: int, prefix_cache: bool
) -> None:
    folder, prompts, expected = checkpoint(name)
    num_pages = {1: 330, 16: 24, 64: 8}[page_size]
    options = {
        "page_size": page_size,
        "num_pages": num_pages,
        "max_model_len": 300,
        "max_batched_tokens": 64,
        "prefix_cache": prefix_cache,
    }
    engine = load(folder, tmp_path, **options)
    assert answers(engine, prompts, max_tokens=LONG_ANSWER) == expected
    assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("name", cases([()]))
def test_seeded_tokens_do_not_depend_on_company_pages_or_preemption(
    checkpoint: Callable[[str], Checkpoint], tmp_path: Path, name: str
) -> None:
    folder, prompts, _ = checkpoint(name)
    sampling = {"temperature": 0.9, "seed": 11, "top_p": 0.9, "repetition_penalty": 1.1, "max_tokens": 40}
    roomy = load(folder, tmp_path, num_pages=512)
    alone = [answers(roomy, [prompt], **sampling)[0] for prompt in prompts]
    tight = load(folder, tmp_path, num_pages=24, max_model_len=300, max_batched_tokens=48)
    assert answers(tight, prompts, **sampling) == alone
    assert tight.stats().num_preemptions > 0
