"""Through a real server: greedy tokens are those of transformers in float32, whatever the tunables are.

Every pair of (page size, budget, cache, pool, front ends) values meets somewhere in the cases; the full product runs
without a server in tests/e2e.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_backend.models.architecture import read_architecture
from paged_backend.models.kv_groups import group_layers
from paged_backend.server.launch import ServerSettings
from paged_backend.server.ports import Addresses
from tests.expert_models import MODELS, save_expert_model
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.published_configs import CONFIGS, save_published
from tests.server.calls import Answer, run_all, wait_for_metrics
from tests.server.served import served

pytestmark = pytest.mark.server

NUM_PROMPTS = 64
MAX_TOKENS = 20
LONG_ANSWERS, LONG = 10, 100  # so many prompts get so long an answer: sequences outgrow the pages they started with
MAX_MODEL_LEN = 768

CHECKPOINTS = {
    "llama, tied, llama3 rope": (
        "LlamaForCausalLM",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "mistral, window 64": ("MistralForCausalLM", {"sliding_window": 64}),
    "qwen2, MHA, linear rope": (
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "qwen3, head_dim 32, yarn": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
}


@dataclass(frozen=True)
class Case:
    checkpoint: str
    page_size: int
    budget: int
    prefix_cache: bool
    scarce: bool  # a pool so small that sequences are preempted
    front_ends: int


CASES = [  # the first of IN_CI's checkpoint runs in CI, the others with -m long
    Case("llama, tied, llama3 rope", 64, 32, True, True, 1),
    Case("llama, tied, llama3 rope", 16, 4096, True, False, 4),
    Case("llama, tied, llama3 rope", 1, 32, False, True, 1),
    Case("mistral, window 64", 1, 4096, True, True, 4),
    Case("mistral, window 64", 16, 32, False, False, 1),
    Case("mistral, window 64", 64, 4096, False, True, 1),
    Case("qwen2, MHA, linear rope", 16, 4096, False, True, 1),
    Case("qwen2, MHA, linear rope", 1, 32, True, False, 1),
    Case("qwen2, MHA, linear rope", 64, 4096, True, False, 4),
    Case("qwen3, head_dim 32, yarn", 16, 32, True, True, 4),
    Case("qwen3, head_dim 32, yarn", 1, 4096, False, False, 1),
    Case("qwen3, head_dim 32, yarn", 64, 32, False, False, 1),
]


# What a server adds is the same for all models: CI asks one. Each family and each setting are asked without a server,
# in tests/e2e and tests/unit/models; tests/server/test_engine_death.py has several front ends.
IN_CI = "llama, tied, llama3 rope"


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name == IN_CI else pytest.mark.long) for name in CHECKPOINTS],
)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[np.ndarray], list[list[int]]]:
    architecture, options = CHECKPOINTS[request.param]
    folder = save_checkpoint(tmp_path_factory.mktemp("checkpoint"), architecture, **options)
    lengths = [
        1,
        2,
        15,
        16,
        17,
        63,
        64,
        65,
        127,
        128,
        129,
        700,
        699,
        *np.random.default_rng(3).integers(1, 700, NUM_PROMPTS - 21).tolist(),
    ]
    prompts = random_prompts(lengths)
    prompts += [np.concatenate([prompts[11][:300], prompt[:9]]) for prompt in prompts[13:21]]  # common beginnings
    assert len(prompts) == NUM_PROMPTS
    oracle = Oracle(folder)
    return (
        request.param,
        folder,
        prompts,
        oracle.greedy(prompts[:LONG_ANSWERS], LONG) + oracle.greedy(prompts[LONG_ANSWERS:], MAX_TOKENS),
    )


@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.long) for number in (1, 2))])
def test_greedy_tokens_are_those_of_transformers(
    checkpoint: tuple[str, Path, list[np.ndarray], list[list[int]]], number: int
) -> None:
    name, folder, prompts, expected = checkpoint
    check_server([case for case in CASES if case.checkpoint == name][number], folder, prompts, expected)


# a family takes one after the other
TUNABLES = ((16, 4096, True, False, 4), (1, 32, False, True, 1), (64, 32, True, True, 1))


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_of_every_family_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Beyond sliding windows and original lengths; of longrope only beyond, since max_model_len decides for all
    sequences.
    """
    original = CONFIGS[name].get("original_max_position_embeddings", 1024)
    lengths = [700, 1, 15, 16, 17, 64, 65, 129, 333, 40, 41, 42]
    prompts = random_prompts([length for length in lengths if original > MAX_MODEL_LEN or length > original])
    prompts += [np.concatenate([prompts[0][:300], prompt[:9]]) for prompt in prompts[1:4]]  # common beginnings
    check_family(name, list(CONFIGS).index(name), save_published(tmp_path, name), prompts)


@pytest.mark.long
def test_greedy_tokens_of_a_model_with_experts_are_those_of_transformers(tmp_path: Path) -> None:
    """Of few prompts: every family's are asked below."""
    name = "qwen3-30b-a3b"
    folder, prompts = save_expert_model(tmp_path, name), random_prompts([700, 1, 16, 65])
    expected = Oracle(folder).greedy(prompts, MAX_TOKENS)
    check_server(Case(name, 16, 4096, True, False, 1), folder, prompts, expected, lead=1)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_of_every_family_with_experts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    prompts = random_prompts([700, 1, 15, 16, 17, 64, 65, 129, 333, 40, 41, 42])
    prompts += [np.concatenate([prompts[0][:300], prompt[:9]]) for prompt in prompts[1:4]]  # common beginnings
    check_family(name, list(MODELS).index(name), save_expert_model(tmp_path, name), prompts)


def check_family(name: str, number: int, folder: Path, prompts: Sequence[np.ndarray]) -> None:
    """number: which tunables it takes."""
    oracle = Oracle(folder)
    expected = (
        oracle.greedy(prompts[:1], 60) + oracle.greedy(prompts[1:6], LONG) + oracle.greedy(prompts[6:], MAX_TOKENS)
    )
    check_server(Case(name, *TUNABLES[number % len(TUNABLES)]), folder, prompts, expected, lead=6)


def check_server(
    case: Case, folder: Path, prompts: Sequence[np.ndarray], expected: list[list[int]], lead: int = LONG_ANSWERS
) -> None:
    """Asks a real server all prompts at once, but for the first `lead`, which come before the others."""
    pool_tokens = 832 if case.scarce else 65_536
    windows = read_architecture(folder).sliding_windows
    num_groups = len(group_layers(windows, MAX_MODEL_LEN).groups)
    options = {
        "page_size": case.page_size,
        "num_pages": num_groups * pool_tokens // case.page_size,
        "max_model_len": MAX_MODEL_LEN,
        "max_batched_tokens": case.budget,
        "prefix_cache": case.prefix_cache,
    }
    requests = [
        {"input_ids": prompt.tolist(), "max_tokens": len(answer), "temperature": 0.0}
        for prompt, answer in zip(prompts, expected, strict=True)
    ]
    with served(ServerSettings(model=str(folder), options=options, instances=case.front_ends)) as server:
        # alone they outgrow the scarce pool, whatever follows
        answers = run_all(server.addresses.grpc_url, requests, lead=lead)
        # what windows leave behind may be enough: e2e/test_kv_groups.py preempts such models
        if case.scarce and not any(windows):
            again = ask_until_preempted(server.addresses, requests[:lead])
            assert [answer.token_ids for answer in again] == expected[:lead] * (len(again) // lead)
    assert [answer.error for answer in answers] == [None] * len(prompts)
    assert [answer.token_ids for answer in answers] == expected
    assert {answer.num_finals for answer in answers} == {1}
    if not case.prefix_cache:
        assert not any(answer.num_cached_tokens for answer in answers)


def ask_until_preempted(addresses: Addresses, requests: Sequence[dict[str, Any]]) -> list[Answer]:
    """On a busy machine they may arrive so far apart that one has its answer before the next needs pages: then they are
    asked once more. Returns what was answered here.
    """
    again: list[Answer] = []
    for _ in range(5):
        if wait_for_metrics(addresses.metrics_url, lambda values: values["paged_preemptions_total"] > 0, seconds=5):
            return again
        again += run_all(addresses.grpc_url, requests)
    raise AssertionError(f"nobody was preempted, also after {len(again)} more requests")
