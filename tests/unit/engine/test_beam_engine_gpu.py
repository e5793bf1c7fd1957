"""Beam search, prompt_logprobs and allowed_token_ids on CUDA, where steps run ahead, are captured, and pages are copied
by a kernel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paged_backend.arrays import bits
from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Found, PromptLogprobs, Submit
from paged_backend.request import SamplingParams
from tests.beam_callers import save_searched
from tests.oracle import Oracle, random_prompts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_searched(tmp_path_factory.mktemp("checkpoint"))


def load(folder: Path, tmp_path: Path, device: str, **options: Any) -> Engine:
    given = {
        "model": str(folder),
        "device": device,
        "speculation": "off",
        "dtype": "float32",
        "num_pages": 512,
        "max_num_sequences": 48,
        "max_model_len": 200,
        **options,
    }
    engine, *_ = load_engine(EngineConfig.parse(given), tmp_path)
    return engine


def run(
    engine: Engine, submits: list[Submit]
) -> tuple[dict[int, list[tuple[list[int], np.ndarray]]], dict[int, list[int]], list[PromptLogprobs]]:
    """Answers of searches, tokens of the others, and what was told of prompts."""
    found, tokens, prompts = {}, {}, []
    for one in submits:
        engine.submit(one)
    while not engine.idle:
        for output in engine.step():
            for search in (one for one in output.feature_outputs if isinstance(one, Found)):
                found[search.request_id] = [
                    (np.frombuffer(one.token_ids, np.int32).tolist(), np.frombuffer(one.logprobs, np.float32))
                    for one in search.sequences
                ]
            for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                tokens.setdefault(request_id, []).append(token)
            prompts += [one for one in output.feature_outputs if isinstance(one, PromptLogprobs)]
        engine.check()
    assert engine._scheduler.pool.num_held == 0
    return found, tokens, prompts


@pytest.mark.parametrize("num_pages", [1024, 112], ids=["roomy", "preempted"])
def test_beams_beside_others_are_those_of_the_cpu(folder: Path, tmp_path: Path, num_pages: int) -> None:
    prompts = random_prompts((5, 16, 31, 48, 100))
    submits = []
    for number, prompt in enumerate(prompts):
        search = SamplingParams(
            use_beam_search=True,
            beam_width=2 + 2 * (number % 3),
            n=2,
            temperature=0.0,
            max_tokens=40,
            length_penalty=float(number % 3),
        )
        submits.append(Submit(number, prompt.tobytes(), search, (), "", 1e18))
        submits.append(
            Submit(
                100 + number,
                prompt.tobytes(),
                SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True),
                (),
                "",
                1e18,
            )
        )
    cuda = load(folder, tmp_path, "cuda", page_size=4, num_pages=num_pages)
    assert cuda._steps_ahead == 1
    found, tokens, _ = run(cuda, submits)
    expected, expected_tokens, _ = run(load(folder, tmp_path, "cpu"), submits)
    assert (cuda.stats().num_preemptions > 0) == (num_pages == 112)
    assert tokens == expected_tokens
    for number in range(len(prompts)):
        assert [ids for ids, _ in found[number]] == [ids for ids, _ in expected[number]]
        for (_, mine), (_, theirs) in zip(found[number], expected[number], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-3)


def test_the_logprobs_of_prompts_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    prompts = random_prompts((1, 2, 40, 150))
    params = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=3)
    engine = load(folder, tmp_path, "cuda", max_batched_tokens=64)
    _, tokens, told = run(
        engine, [Submit(number, prompt.tobytes(), params, (), "", 1e18) for number, prompt in enumerate(prompts)]
    )
    oracle = Oracle(folder)
    for number, prompt in enumerate(prompts):
        truth = torch.log_softmax(oracle.logits(prompt), -1)[:-1]
        pieces = [piece for piece in told if piece.request_id == number]
        own = np.concatenate(
            [np.empty(0, np.float32), *(np.frombuffer(piece.logprobs, np.float32) for piece in pieces)]
        )
        tops = np.concatenate(
            [np.empty(0, np.float32), *(np.frombuffer(piece.top_logprobs, np.float32) for piece in pieces)]
        )
        np.testing.assert_allclose(
            own, truth[torch.arange(len(truth)), torch.tensor(prompt[1:].astype(np.int64))].numpy(), atol=1e-3
        )
        np.testing.assert_allclose(tops.reshape(-1, 3), truth.topk(3).values.numpy(), atol=1e-3)
    assert [tokens[number] for number in range(4)] == oracle.greedy(prompts, 4)


def test_allowed_tokens_are_those_of_the_cpu(folder: Path, tmp_path: Path) -> None:
    allowed = bits(range(0, 199, 7), 199).tobytes()
    submits = [
        Submit(
            number,
            prompt.tobytes(),
            SamplingParams(temperature=number % 2, seed=number, max_tokens=30),
            (),
            "",
            1e18,
            allowed=allowed if number % 3 else b"",
        )
        for number, prompt in enumerate(random_prompts((5, 16, 31, 48, 100, 7)))
    ]
    (_, cuda, _), (_, cpu, _) = (run(load(folder, tmp_path, device), submits) for device in ("cuda", "cpu"))
    assert cuda == cpu
    assert all(token % 7 == 0 for number in (1, 2, 4, 5) for token in cuda[number])
