"""Beam search through the engine: what happens to pages, and to searches that end early."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paged_backend.errors import ErrorKind
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from tests.adapter_oracle import AdapterOracle, save_adapter
from tests.beam_callers import Caller, load, same, save_searched, truth
from tests.oracle import Oracle, random_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_searched(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.mark.parametrize("preempted", [False, True])
def test_beams_have_the_adapter_of_their_request(folder: Path, oracle: Oracle, tmp_path: Path, preempted: bool) -> None:
    adapted = AdapterOracle(folder, save_adapter(tmp_path / "adapters" / "small", folder, seed=3))
    prompt = random_prompts([31])[0]
    expected = truth(adapted, prompt, 4, 4)
    assert expected != truth(oracle, prompt, 4, 4)
    engine = load(folder, tmp_path, page_size=4, lora_directory=str(tmp_path / "adapters"), max_loras=1)
    caller = Caller(engine)
    caller.ask(0, prompt, 4, 4)
    caller.ask(1, prompt, 4, 4, lora_name="small")
    scheduler = engine._scheduler
    other = next(sequence for sequence in scheduler.sequences if sequence.request_id == 1)
    while scheduler.num_tokens(other) < len(prompt) + 4:
        caller.step()
    if preempted:
        scheduler._living.preempt(other)
    caller.run()
    same(caller.answers(0), truth(oracle, prompt, 4, 4))
    same(caller.answers(1), expected)


def test_full_pages_are_shared_and_partial_ones_are_not(folder: Path, tmp_path: Path) -> None:
    engine = load(folder, tmp_path, page_size=4, num_pages=64)
    caller = Caller(engine)
    caller.ask(0, random_prompts([41])[0], 4, max_tokens=3, ignore_eos=True)
    caller.step()
    caller.step()
    pool = engine._scheduler.pool
    assert pool.num_held == 10 + 4  # ten full pages of the prompt once, and what each beam writes
    assert sorted(pool.count(page) for page in range(64) if pool.count(page))[-10:] == [4] * 10
    caller.run()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(("page_size", "num_pages"), [(1, 160), (4, 44)])
def test_preemption_changes_no_answer(
    folder: Path, oracle: Oracle, tmp_path: Path, page_size: int, num_pages: int, prefix_cache: bool
) -> None:
    prompts = random_prompts((33, 45, 30, 20))
    caller = Caller(
        load(
            folder,
            tmp_path,
            page_size=page_size,
            num_pages=num_pages,
            max_model_len=200,
            max_batched_tokens=96,
            prefix_cache=prefix_cache,
        )
    )
    caller.ask(0, prompts[0], 0, max_tokens=60, ignore_eos=True)
    for number in (1, 2, 3):
        caller.ask(number, prompts[number], 3, 3, ignore_eos=True, max_tokens=30)
    caller.run()
    for number in (1, 2, 3):
        expected = truth(oracle, prompts[number], 3, 3, (), 30)
        found = caller.found[number].sequences
        same(
            [
                (np.frombuffer(one.token_ids, np.int32).tolist(), float(np.frombuffer(one.logprobs, np.float32).mean()))
                for one in found
            ],
            expected,
        )
    assert caller.engine.stats().num_preemptions > 0


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_preemption_at_any_step_changes_no_answer(
    folder: Path, oracle: Oracle, tmp_path: Path, steps_ahead: int
) -> None:
    prompt = random_prompts([21])[0]
    expected = truth(oracle, prompt, 4, 4)
    engine = load(folder, tmp_path, page_size=4, max_batched_tokens=12, prefix_cache=False)
    engine._steps_ahead = steps_ahead
    for moment in range(1, 14):
        caller = Caller(engine)
        caller.ask(moment, prompt, 4, 4)
        for _ in range(moment):
            caller.step()
        if not engine.idle and engine._scheduler.num_running:
            engine._scheduler._living.preempt(engine._scheduler.sequences[0])
            engine.check()
        caller.run()
        same(caller.answers(moment), expected)


def test_without_preemption_a_search_starts_only_when_all_its_pages_are_there(
    folder: Path, oracle: Oracle, tmp_path: Path
) -> None:
    prompts = random_prompts((30, 33, 21))
    caller = Caller(load(folder, tmp_path, page_size=4, num_pages=36, max_model_len=100, preemption=False))
    for number, prompt in enumerate(prompts):
        caller.ask(number, prompt, 4, 4)
    caller.run()
    for number, prompt in enumerate(prompts):
        same(caller.answers(number), truth(oracle, prompt, 4, 4))
    assert caller.engine.stats().num_preemptions == 0


@pytest.mark.parametrize("spare", [0, -1], ids=["just enough", "one page too few"])
def test_a_search_needs_no_page_more_than_it_is_admitted_for(
    folder: Path, oracle: Oracle, tmp_path: Path, spare: int
) -> None:
    """Prompt of 21: five full pages, shared; 40 tokens are computed, ten pages each."""
    prompt = random_prompts([21])[0]
    caller = Caller(load(folder, tmp_path, page_size=4, num_pages=5 + 4 * 5 + spare, max_model_len=64))
    caller.ask(0, prompt, 4, 4, max_tokens=20, ignore_eos=True)
    caller.run()
    if spare < 0:
        assert caller.finishes[0].error is ErrorKind.INVALID
        assert caller.finishes[0].message == "beam_width: 4 beams of up to 41 tokens may need 25 pages; the pool has 24"
        return
    expected = truth(oracle, prompt, 4, 4, (), 20)
    found = caller.found[0].sequences
    same(
        [
            (np.frombuffer(one.token_ids, np.int32).tolist(), float(np.frombuffer(one.logprobs, np.float32).mean()))
            for one in found
        ],
        expected,
    )
    assert caller.engine.stats().num_preemptions == 0


def test_more_beams_than_may_run_are_refused_with_the_limit(folder: Path, tmp_path: Path) -> None:
    caller = Caller(load(folder, tmp_path, max_num_sequences=6))
    caller.ask(0, random_prompts([9])[0], 8)
    caller.run()
    assert (
        caller.finishes[0].message
        == "beam_width: 8 beams are more than may run at once: 6 (max_num_sequences, max_batched_tokens)"
    )


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_leaving_at_any_step_frees_everything(folder: Path, oracle: Oracle, tmp_path: Path, steps_ahead: int) -> None:
    """Of two searches one leaves: waiting, in the prompt, between forks; the other's answers stay right."""
    prompts = random_prompts((21, 30))
    expected = truth(oracle, prompts[1], 3, 3)
    engine = load(folder, tmp_path, page_size=4, max_batched_tokens=12)
    engine._steps_ahead = steps_ahead
    for moment in range(0, 12, 2 - steps_ahead):
        caller = Caller(engine)
        caller.ask(2 * moment, prompts[0], 4, 4)
        caller.ask(2 * moment + 1, prompts[1], 3, 3)
        for _ in range(moment):
            caller.step()
        engine.abort(2 * moment)
        engine.check()
        caller.run()
        assert 2 * moment not in caller.found or moment > 8
        same(caller.answers(2 * moment + 1), expected)


def test_a_deadline_ends_a_search(folder: Path, tmp_path: Path) -> None:
    engine = load(folder, tmp_path)
    now = [0.0]
    engine._scheduler._clock = engine._scheduler._deadlines._clock = lambda: now[0]
    caller = Caller(engine)
    params = SamplingParams(
        use_beam_search=True, beam_width=4, temperature=0.0, max_tokens=20, ignore_eos=True, request_deadline_seconds=5
    )
    engine.submit(Submit(0, random_prompts([9])[0].tobytes(), params, (), "", 0.0))
    for _ in range(4):
        caller.step()
    now[0] = 6.0
    caller.run()
    assert caller.finishes[0].error is ErrorKind.CANCELLED
    assert not caller.found
