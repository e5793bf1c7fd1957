"""Beam search in the whole engine, without a server: the answers are those of transformers' generate, whatever happens
to rows and pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paged_backend.errors import ErrorKind
from tests.beam_callers import EOS, LENGTHS, MAX_TOKENS, Caller, load, same, save_searched, truth
from tests.oracle import Oracle, random_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_searched(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_answers_are_those_of_transformers(
    folder: Path, oracle: Oracle, tmp_path: Path, length_penalty: float, early_stopping: Any
) -> None:
    """Widths 2, 4 and 8 beside each other and beside greedy requests."""
    prompts = random_prompts(LENGTHS)[::3]
    caller = Caller(load(folder, tmp_path, max_num_sequences=64))
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    asked = [(width, prompt) for width in (2, 4, 8) for prompt in prompts]
    for request_id, (width, prompt) in enumerate(asked):
        caller.ask(request_id, prompt, width, width, **options)
    for number, prompt in enumerate(prompts):
        caller.ask(100 + number, prompt, 0)
    caller.run()
    lengths = set()
    for request_id, (width, prompt) in enumerate(asked):
        same(caller.answers(request_id, length_penalty), truth(oracle, prompt, width, width, **options))
        lengths |= {len(tokens) for tokens, _ in caller.answers(request_id)}
        assert caller.finishes[request_id].reason in ("stop", "length")
    assert length_penalty > 1 or len(lengths) > 3, "EOS is never chosen: this tests little"
    assert [caller.tokens[100 + number] for number in range(len(prompts))] == oracle.greedy(prompts, MAX_TOKENS)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(("page_size", "budget"), [(1, 64), (4, 17), (64, 4096)])
def test_pages_chunks_and_cache_change_no_answer(
    folder: Path, oracle: Oracle, tmp_path: Path, page_size: int, budget: int, prefix_cache: bool
) -> None:
    prompts = random_prompts(LENGTHS)
    caller = Caller(
        load(
            folder,
            tmp_path,
            page_size=page_size,
            num_pages=2048 // page_size,
            max_batched_tokens=budget,
            prefix_cache=prefix_cache,
        )
    )
    for turn in range(2):
        for number, prompt in enumerate(prompts):
            caller.ask(10 * turn + number, prompt, 4, 2)
        caller.run()
        for number, prompt in enumerate(prompts):
            same(caller.answers(10 * turn + number), truth(oracle, prompt, 4, 2))
    assert (caller.started[13] > 0) == (prefix_cache and page_size < 48)


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_steps_launched_ahead_change_no_answer_and_others_go_on_meanwhile(
    folder: Path, oracle: Oracle, tmp_path: Path, steps_ahead: int
) -> None:
    prompts = random_prompts(LENGTHS)
    engine = load(folder, tmp_path)
    engine._steps_ahead = steps_ahead
    caller = Caller(engine)
    caller.ask(0, prompts[0], 4, 4)
    caller.ask(1, prompts[1], 0)
    caller.ask(2, prompts[2], 8, 3)
    caller.run()
    same(caller.answers(0), truth(oracle, prompts[0], 4, 4))
    same(caller.answers(2), truth(oracle, prompts[2], 8, 3))
    assert caller.tokens[1] == oracle.greedy(prompts, MAX_TOKENS)[1]


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, and transformers'
    "min_tokens": ({"min_tokens": 9}, {"min_new_tokens": 9}),
    "bad words": ({"words": ((156,), (29, 91))}, {"bad_words_ids": [[156], [29, 91]]}),  # some that it would say
    "no eos": ({"ignore_eos": True}, {"stop_ids": ()}),
    "more stop ids": ({"stop_token_ids": (3, 77, 140)}, {"stop_ids": (*EOS, 3, 77, 140)}),
    "one token": ({"max_tokens": 1}, {"max_tokens": 1}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_takes_tokens_away_or_ends_answers_does_it_for_beams(
    folder: Path, oracle: Oracle, tmp_path: Path, name: str
) -> None:
    mine, theirs = OPTIONS[name]
    prompts = random_prompts(LENGTHS)
    caller = Caller(load(folder, tmp_path))
    for number, prompt in enumerate(prompts):
        caller.ask(number, prompt, 4, 4, **mine)
    caller.run()
    for number, prompt in enumerate(prompts):
        expected = truth(oracle, prompt, 4, 4, **theirs)
        found = caller.found[number].sequences
        same(
            [
                (np.frombuffer(one.token_ids, np.int32).tolist(), float(np.frombuffer(one.logprobs, np.float32).mean()))
                for one in found
            ],
            expected,
        )


def test_beams_say_allowed_tokens_only(folder: Path, oracle: Oracle, tmp_path: Path) -> None:
    """Two tokens, and more beams than that: they become as many as there are answers."""
    prompt = random_prompts([16])[0]  # ends with a page
    allowed = [5, 90]
    caller = Caller(load(folder, tmp_path))
    caller.ask(0, prompt, 6, 6, allowed=allowed, max_tokens=5)
    caller.run()
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(5):
        scores = {
            (*tokens, token): total
            + float(torch.log_softmax(oracle.logits([*prompt.tolist(), *tokens])[-1], -1)[token])
            for tokens, total in scores.items()
            for token in allowed
        }
        scores = dict(sorted(scores.items(), key=lambda item: -item[1])[:6])
    same(caller.answers(0), [(list(tokens), total / 5) for tokens, total in scores.items()])


def test_answers_that_do_not_exist_are_an_error(folder: Path, tmp_path: Path) -> None:
    caller = Caller(load(folder, tmp_path))
    caller.ask(0, random_prompts([9])[0], 4, 3, allowed=[5], max_tokens=6)
    caller.ask(1, random_prompts([9])[0], 4, 1, allowed=[5], max_tokens=6)
    caller.run()
    assert caller.finishes[0].error is ErrorKind.INVALID
    assert caller.finishes[0].message == "n: 3 answers are asked for, and only 1 are possible with what is banned"
    assert caller.answers(1)[0][0] == [5] * 6


def test_prompt_logprobs_come_with_beams(folder: Path, oracle: Oracle, tmp_path: Path) -> None:
    prompt = random_prompts([40])[0]
    engine = load(folder, tmp_path, max_batched_tokens=16)
    caller = Caller(engine)
    caller.ask(3, prompt, 3, prompt_logprobs=0)
    told = [piece for _ in range(3) for output in engine.step() for piece in output.feature_outputs]
    caller.run()
    expected = torch.log_softmax(oracle.logits(prompt), -1)[torch.arange(39), torch.tensor(prompt[1:].astype(np.int64))]
    np.testing.assert_allclose(
        np.concatenate([np.frombuffer(piece.logprobs, np.float32) for piece in told]), expected.numpy(), atol=1e-4
    )
    assert {piece.request_id for piece in told} == {3}
    same(caller.answers(3), truth(oracle, prompt, 3, 1))
