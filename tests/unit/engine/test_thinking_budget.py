"""max_thinking_tokens: the end of thinking is forced exactly where it must be, what follows is what the model says to
that, and nobody else notices.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.errors import RequestError
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams, parse_sampling
from tests.oracle import Oracle, random_prompts, save_checkpoint

LENGTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "LlamaForCausalLM", num_hidden_layers=2)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


def load(folder: Path, tmp_path: Path, steps_ahead: int = 0, **options: object) -> Engine:
    engine, *_ = load_engine(
        EngineConfig.parse(
            {
                "model": str(folder),
                "device": "cpu",
                "speculation": "off",
                "num_pages": 64,
                "max_num_sequences": 8,
                **options,
            }
        ),
        tmp_path,
    )
    engine._steps_ahead = steps_ahead
    return engine


def submit(engine: Engine, request_id: int, token_ids: np.ndarray, num_answered: int = 0, **sampling: object) -> None:
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": LENGTH, "ignore_eos": True} | sampling))  # type: ignore[arg-type]
    engine.submit(Submit(request_id, token_ids.tobytes(), params, (), "", 1e18, num_answered=num_answered))


def drain(
    engine: Engine, heard: dict[int, list[int]], scores: dict[int, list[float]] | None = None
) -> dict[int, list[int]]:
    while not engine.idle:
        for output in engine.step():
            for entry, (request_id, token) in enumerate(
                zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True)
            ):
                heard.setdefault(request_id, []).append(token)
                if scores is not None and output.logprobs is not None:
                    scores.setdefault(request_id, []).append(float(output.logprobs[entry]))
        engine.check()
    return heard


def unsaid(*answers: list[int]) -> int:
    """A token that none of them has."""
    return next(token_id for token_id in range(199) if not any(token_id in answer for answer in answers))


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_the_token_is_forced_there_and_nowhere_else(
    folder: Path, oracle: Oracle, tmp_path: Path, steps_ahead: int
) -> None:
    prompts = random_prompts((5, 17, 33))
    plain = oracle.greedy(prompts, LENGTH)
    end = unsaid(*plain)
    engine = load(folder, tmp_path, steps_ahead)
    for budget in (0, 1, 5, LENGTH - 1, LENGTH, 100):
        for request_id, prompt in enumerate(prompts):
            keys = {} if request_id == 1 else {"max_thinking_tokens": budget, "end_thinking_token_id": end}
            submit(engine, request_id, prompt, **keys)
        heard = drain(engine, {})
        assert heard[1] == plain[1], "nobody else notices"
        for request_id in (0, 2):
            forced = [*plain[request_id][:budget], end][:LENGTH] if budget < LENGTH else plain[request_id]
            rest = (
                oracle.greedy([[*prompts[request_id].tolist(), *forced]], LENGTH - len(forced))[0]
                if len(forced) < LENGTH
                else []
            )
            assert heard[request_id] == forced + rest


def test_thoughts_that_are_over_or_never_began_are_left_alone(folder: Path, oracle: Oracle, tmp_path: Path) -> None:
    prompt = random_prompts((20,))[0]
    (plain,) = oracle.greedy([prompt], LENGTH)
    engine = load(folder, tmp_path, 1)
    submit(engine, 0, prompt, max_thinking_tokens=6, end_thinking_token_id=plain[3])
    submit(engine, 1, prompt, max_thinking_tokens=6, end_thinking_token_id=plain[6])
    submit(
        engine,
        2,
        prompt,
        max_thinking_tokens=6,
        end_thinking_token_id=unsaid(plain),
        start_thinking_token_ids=[unsaid(plain)],
    )
    submit(
        engine,
        3,
        prompt,
        max_thinking_tokens=6,
        end_thinking_token_id=unsaid(plain),
        start_thinking_token_ids=plain[:1],
    )
    runs = {4: plain[1:4], 5: [plain[1], unsaid(plain)], 6: plain[4:6], 7: plain[4:7], 8: [*plain, *plain][:16]}
    for request_id, run in runs.items():
        keys = {"end_thinking_token_id": unsaid(plain), "start_thinking_token_ids": run}
        submit(engine, request_id, prompt, max_thinking_tokens=6, **keys)
    heard = drain(engine, {})
    expected = [True, True, True, False, False, True, False, True, True]
    assert [heard[request_id] == plain for request_id in range(9)] == expected
    for request_id in (3, 4, 6):
        assert heard[request_id][:7] == [*plain[:6], unsaid(plain)]


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_sampled_tokens_after_it_are_those_of_their_seed_and_scores_are_told(
    folder: Path, tmp_path: Path, steps_ahead: int
) -> None:
    prompt, sampling = random_prompts((9,))[0], {"temperature": 1.0, "seed": 3, "logprobs": 0}
    engine = load(folder, tmp_path, steps_ahead)
    submit(engine, 0, prompt, **sampling)
    plain = drain(engine, {})[0]
    end, scores = unsaid(plain), {}
    submit(engine, 1, prompt, max_thinking_tokens=4, end_thinking_token_id=end, **sampling)
    forced = drain(engine, {}, scores)[1]
    submit(engine, 2, np.concatenate([prompt, np.array([*plain[:4], end], np.int32)]), num_answered=5, **sampling)
    assert forced == [*plain[:4], end, *drain(engine, {})[2]]
    assert scores[1][4] == 0.0 and all(score < 0 for place, score in enumerate(scores[1]) if place != 4)


@pytest.mark.parametrize("landed", [False, True], ids=["in flight", "landed"])
def test_a_preemption_around_it_changes_nothing(folder: Path, oracle: Oracle, tmp_path: Path, landed: bool) -> None:
    prompt = random_prompts((20,))[0]
    (plain,) = oracle.greedy([prompt], LENGTH)
    end = unsaid(plain)
    expected = [*plain[:5], end, *oracle.greedy([[*prompt.tolist(), *plain[:5], end]], LENGTH - 6)[0]]
    engine = load(folder, tmp_path, 1)
    submit(engine, 0, prompt, max_thinking_tokens=5, end_thinking_token_id=end)
    heard: dict[int, list[int]] = {}
    (feature,) = engine._scheduler._features.active
    while not feature._unsettled:
        for output in engine.step():
            heard.setdefault(0, []).extend(output.token_ids.tolist())
    if landed:
        for output in engine.step():
            heard[0] += output.token_ids.tolist()
    (sequence,) = engine._scheduler.sequences
    engine._scheduler._living.preempt(sequence)
    assert sequence.awaits_token is not landed
    assert drain(engine, heard)[0] == expected


def test_a_request_that_goes_on_in_another_engine_is_forced_there(folder: Path, oracle: Oracle, tmp_path: Path) -> None:
    prompt = random_prompts((20,))[0]
    (plain,) = oracle.greedy([prompt], LENGTH)
    end = unsaid(plain)
    engine = load(folder, tmp_path)
    submit(
        engine,
        0,
        np.concatenate([prompt, np.array(plain[:3], np.int32)]),
        num_answered=3,
        max_thinking_tokens=5,
        end_thinking_token_id=end,
    )
    assert drain(engine, {})[0][:3] == [*plain[3:5], end]


def test_a_budget_needs_the_token_that_ends_thinking() -> None:
    assert parse_sampling({"max_thinking_tokens": "3", "end_thinking_token_id": 7}).max_thinking_tokens == 3
    with pytest.raises(RequestError, match="max_thinking_tokens: end_thinking_token_id is missing"):
        parse_sampling({"max_thinking_tokens": 3})
    with pytest.raises(RequestError, match="max_thinking_tokens: expected int >= 0"):
        parse_sampling({"max_thinking_tokens": -1, "end_thinking_token_id": 7})
    with pytest.raises(RequestError, match="use_beam_search and max_thinking_tokens"):
        parse_sampling({"max_thinking_tokens": 3, "end_thinking_token_id": 7, "use_beam_search": True, "beam_width": 2})
