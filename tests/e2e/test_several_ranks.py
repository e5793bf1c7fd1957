"""The whole engine on several ranks, each a process with gloo between them: whatever is asked, the tokens are those of
transformers, and of one rank alone.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.errors import EngineError
from paged_backend.messages import Found, PromptLogprobs, Submit
from paged_backend.request import SamplingParams
from paged_backend.runner.parallel.rank_processes import RankProcesses
from tests.oracle import Oracle, random_prompts, save_checkpoint

LENGTHS = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 200]
MAX_TOKENS = 48  # several pages, so that sequences outgrow what they started with
# preempts
OPTIONS = {
    "device": "cpu",
    "speculation": "off",
    "num_pages": 24,
    "max_model_len": 300,
    "max_batched_tokens": 64,
    "max_num_sequences": 16,
    "debug_checks": True,
}
VARIETY: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.1, "seed": 7},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "seed": 2**64 - 1},
    {"temperature": 0.7, "min_p": 0.05, "seed": 1},
    {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.2, "seed": 3},
    {"temperature": 0.0, "min_tokens": 30, "stop_token_ids": (5, 6), "logit_bias": {17: 1.5}},
    {"temperature": 1.0, "seed": 11, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 0.0, "use_beam_search": True, "beam_width": 3},
]


@dataclass(frozen=True)
class Engines:
    folder: Path  # of their checkpoint
    several: Engine
    alone: Engine
    others: RankProcesses  # of `several`
    deaths: list[float]


SEVERAL = [
    pytest.param(("LlamaForCausalLM", 2), id="llama, 2 ranks"),
    # tests/unit/models/test_shard.py has 4 and 8 as threads
    pytest.param(("Qwen3ForCausalLM", 4), id="qwen3, 4 ranks", marks=pytest.mark.long),
]


@pytest.fixture(scope="module", params=SEVERAL)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    architecture, size = request.param
    folder = save_checkpoint(tmp_path_factory.mktemp("checkpoint"), architecture, tie_word_embeddings=size == 4)
    config = EngineConfig.parse({"model": str(folder), **OPTIONS})
    alone, *_ = load_engine(config, tmp_path_factory.mktemp("alone"))
    config = config.model_copy(update={"tensor_parallel_size": size})
    deaths: list[float] = []
    others = RankProcesses(config, on_death=lambda: deaths.append(time.monotonic()))
    several, *_ = load_engine(config, tmp_path_factory.mktemp("several"), others)
    yield Engines(folder, several, alone, others, deaths)
    others.close()
    torch.distributed.destroy_process_group()
    assert not deaths


def outputs(engine: Engine, prompts: list[np.ndarray], samplings: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens by request, and everything else that is told of them."""
    tokens: list[list[int]] = [[] for _ in prompts]
    told: dict[str, Any] = {"tokens": tokens, "logprobs": [[] for _ in prompts], "found": {}, "prompts": {}}
    for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        engine.submit(
            Submit(number, prompt.tobytes(), SamplingParams(**{"max_tokens": MAX_TOKENS, **sampling}), (), "", 1e18)
        )
    while not engine.idle:
        for output in engine.step():
            for entry, (number, token) in enumerate(
                zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True)
            ):
                tokens[number].append(token)
                if output.logprobs is not None:
                    told["logprobs"][number].append(round(float(output.logprobs[entry]), 3))
            for one in output.feature_outputs:
                if isinstance(one, Found):
                    told["found"][one.request_id] = [
                        np.frombuffer(sequence.token_ids, np.int32).tolist() for sequence in one.sequences
                    ]
                if isinstance(one, PromptLogprobs):
                    told["prompts"].setdefault(one.request_id, []).extend(np.frombuffer(one.ranks, np.int32).tolist())
        engine.check()
    return told


def test_greedy_tokens_are_those_of_transformers_with_preemption_and_cache(engines: Engines) -> None:
    folder, several = engines.folder, engines.several
    prompts = random_prompts(LENGTHS)
    expected = Oracle(folder).greedy(prompts, MAX_TOKENS)
    assert outputs(several, prompts, [{"temperature": 0.0}] * len(prompts))["tokens"] == expected
    for _ in range(2):  # now with what the first time left in the cache
        assert outputs(several, prompts[-1:], [{"temperature": 0.0}])["tokens"] == expected[-1:]
    assert several.stats().num_preemptions > 0 and several.stats().prefix_hits > 0


@pytest.mark.long
def test_whatever_is_asked_is_answered_as_by_one_rank(engines: Engines) -> None:
    prompts = random_prompts([20] * len(VARIETY) * 2, seed=3)
    expected, found = (outputs(engine, prompts, VARIETY * 2) for engine in (engines.alone, engines.several))
    for key in expected:
        assert found[key] == expected[key], key
    assert len(found["found"]) == 2 and len(found["prompts"]) == 2


def test_what_a_rank_cannot_do_is_said_by_all(tmp_path: Path) -> None:
    """Before any rank has read its weights."""
    folder = save_checkpoint(tmp_path / "checkpoint", "LlamaForCausalLM")
    config = EngineConfig.parse({"model": str(folder), **OPTIONS, "tensor_parallel_size": 3})
    with pytest.raises(
        EngineError, match=r"^tensor_parallel_size: 3 ranks cannot have equal parts of num_attention_heads \(4\)$"
    ):
        load_engine(config, tmp_path)


def test_the_death_of_a_rank_is_noticed(engines: Engines) -> None:
    """The last test of these engines. Whatever rank 0 waits for then: it is told on another thread, and ends its
    process (test_rank_deaths.py).
    """
    deaths = engines.deaths
    os.kill(engines.others.pids[-1], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not deaths and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(deaths) == 1
    deaths.clear()
