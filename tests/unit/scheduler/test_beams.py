"""Beams on rows and pages, with a model that says what a test wants; and what may not be asked beside
use_beam_search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_backend.engine.checked_runner import CheckedRunner, TableBounds
from paged_backend.engine.engine import Engine
from paged_backend.errors import RequestError
from paged_backend.messages import Submit
from paged_backend.request import MAX_BEAM_WIDTH, SamplingParams, parse_sampling
from paged_backend.scheduler.beam_search import BeamSearch, Candidates
from paged_backend.scheduler.beams import Beams
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from tests import simulated_runner
from tests.simulated_runner import SimulatedRunner, solo_search

VOCAB = 97


def test_fewer_beams_for_a_while_and_then_more_find_what_a_search_alone_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two pages only one continuation is left, so the other beams' rows lie idle without a page; a token later
    there are three again.
    """
    usual = simulated_runner.continuations

    def continuations(tokens: Sequence[int], n: int, vocab_size: int) -> Candidates:
        found = usual(tokens, n, vocab_size)
        logprobs = -np.arange(n, dtype=np.float32) - 0.25 * (found.token_ids[0] % 4)
        if len(tokens) == 8:
            logprobs[1:] = -np.inf
            logprobs[0] = 0 if sum(int(token) for token in tokens[4:]) == lucky[0] else -np.inf
        return Candidates(found.token_ids, logprobs)

    monkeypatch.setattr(simulated_runner, "continuations", continuations)
    prompt, sampling = (
        [1, 2, 3, 4],
        SamplingParams(max_tokens=9, use_beam_search=True, beam_width=3, n=3, temperature=0.0),
    )
    lucky = [0]
    beams = BeamSearch(3, (), 9, 1.0, False)
    for length in range(4, 8):
        beams.advance([continuations([*prompt, *beam.token_ids.tolist()], VOCAB, VOCAB) for beam in beams.beams])
        assert len(beams.beams) == 3, length
    lucky[0] = int(beams.beams[1].token_ids.sum())
    expected = solo_search(prompt, sampling, 9, (), VOCAB)
    assert len(expected) == 3

    scheduler = Scheduler(
        SchedulerLimits(page_size=4, num_pages=16, max_model_len=32, max_num_sequences=4, max_batched_tokens=32)
    )
    engine = Engine(scheduler, SimulatedRunner(4, 16, 4, 32, 32, VOCAB), 0)
    engine.submit(Submit(0, np.array(prompt, np.int32).tobytes(), sampling, (), "", 1e18))
    found, idle = [], 0
    while not engine.idle:
        for output in engine.step():
            found += output.feature_outputs
        engine.check()
        idle += (
            scheduler.num_running == 3 and (scheduler._running.table.num_tokens > 0).sum() == 1 and engine.num_steps > 4
        )
    assert [np.frombuffer(one.token_ids, np.int32).tolist() for one in found[0].sequences] == expected
    assert idle == 1
    assert scheduler.num_preemptions == 1, "there was a page in reserve: the test misses its point"
    assert scheduler.pool.num_held == 0


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_search_that_finds_no_pages_keeps_the_budget_from_nobody_whose_end_would_bring_some(steps_ahead: int) -> None:
    """It lost its pages, began again, and has more to compute than a step has room for; a long prompt beside it has all
    its pages; the pool is full.
    """
    limits = SchedulerLimits(
        page_size=1, num_pages=80, max_model_len=76, max_num_sequences=3, max_batched_tokens=12, prefix_cache=False
    )
    scheduler = Scheduler(limits)
    engine = Engine(
        scheduler,
        CheckedRunner(SimulatedRunner(3, 80, 1, 76, 12, VOCAB), TableBounds(3, 80, 1, 76, 12), scheduler.check),
        steps_ahead,
    )
    search = {"max_tokens": 20, "use_beam_search": True, "beam_width": 2, "early_stopping": "never"}

    def answers(token: int) -> list[list[int]]:
        return solo_search([token] * 14, SamplingParams(temperature=0.0, ignore_eos=True, n=2, **search), 20, (), VOCAB)  # type: ignore[arg-type]

    token = next(token for token in range(6, VOCAB) if len(found := answers(token)) == 2 and min(map(len, found)) > 17)
    finished: dict[int, str] = {}

    def submit(request_id: int, prompt_len: int, **sampling: Any) -> None:
        params = SamplingParams(temperature=0.0, ignore_eos=True, **sampling)
        engine.submit(Submit(request_id, np.array([token] * prompt_len, np.int32).tobytes(), params, (), "", 1e18))

    def step_until(done: Callable[[], bool]) -> None:
        for _ in range(500):
            if done():
                return
            for output in engine.step():
                finished.update({finish.request_id: finish.reason for finish in output.finishes})
        raise AssertionError("the engine stands still")

    def status() -> str:
        sequence = scheduler._living.find(1)
        return "" if sequence is None else str(sequence.status.value)

    submit(1, 14, **search)
    beams = next(feature for feature in scheduler._features.every if isinstance(feature, Beams))
    step_until(lambda: any(len(group.search.beams[0].token_ids) >= 8 for group in beams._groups.values()))
    submit(2, 40, max_tokens=30, priority_level=-1)
    step_until(lambda: scheduler.num_preemptions > 0)
    engine.abort(2)
    step_until(lambda: status() != "waiting")
    submit(3, 62, max_tokens=2, priority_level=-1)
    step_until(lambda: engine.idle)
    assert finished == {1: "length", 3: "length"}


def test_the_file_of_what_runs_names_the_request_of_a_search_and_not_its_beams(tmp_path: Path) -> None:
    """Should the engine die, nobody else knows their ids."""
    scheduler = Scheduler(
        SchedulerLimits(page_size=4, num_pages=64, max_model_len=64, max_num_sequences=8, max_batched_tokens=64)
    )
    scheduler.share_running(tmp_path / "running")
    engine = Engine(scheduler, SimulatedRunner(8, 64, 4, 64, 64, VOCAB), 0)
    for request_id, sampling in (
        (7, SamplingParams(max_tokens=30, use_beam_search=True, beam_width=3, temperature=0.0)),
        (8, SamplingParams(max_tokens=30)),
    ):
        engine.submit(Submit(request_id, np.array([1, 2, 3], np.int32).tobytes(), sampling, (), "", 1e18))
    engine.step()
    engine.step()
    assert {number for number in np.fromfile(tmp_path / "running", np.int64).tolist() if number >= 0} == {7, 8}
    engine.abort(7)
    assert {number for number in np.fromfile(tmp_path / "running", np.int64).tolist() if number >= 0} == {8}


def test_a_beam_that_comes_late_has_no_more_pages_than_a_page_table_has_room_for() -> None:
    """Without preemption its reserve is for a whole answer; from the one beam that there was until now it gets a page,
    too.
    """
    scheduler = Scheduler(
        SchedulerLimits(2, 4, 4, max_num_sequences=2, max_batched_tokens=2, prefix_cache=False, preemption=False)
    )
    engine = Engine(
        scheduler, CheckedRunner(SimulatedRunner(2, 4, 2, 4, 2, VOCAB), TableBounds(2, 4, 2, 4, 2), scheduler.check), 0
    )
    sampling = SamplingParams(max_tokens=3, use_beam_search=True, beam_width=2, n=2, temperature=0.0)
    assert np.isfinite(simulated_runner.continuations([6], VOCAB, VOCAB).logprobs).sum() == 1, (
        "there are two beams at once: the test misses its point"
    )
    engine.submit(Submit(0, np.array([6], np.int32).tobytes(), sampling, (), "", 1e18))
    found = []
    while not engine.idle:
        for output in engine.step():
            found += output.feature_outputs
        engine.check()
    assert [np.frombuffer(one.token_ids, np.int32).tolist() for one in found[0].sequences] == solo_search(
        [6], sampling, 3, (), VOCAB
    )
    assert scheduler.pool.num_available == 4


def test_a_search_alone_with_one_beam_is_a_greedy_request() -> None:
    sampling = parse_sampling(
        {"use_beam_search": True, "beam_width": 1, "length_penalty": 2.0, "early_stopping": "never"}
    )
    assert sampling == SamplingParams(temperature=0.0)


def test_values_arrive_as_callers_write_them() -> None:
    sampling = parse_sampling(
        {
            "use_beam_search": "true",
            "beam_width": "4",
            "n": 2,
            "early_stopping": "never",
            "length_penalty": "0.5",
            "temperature": 0,
            "top_k": -1,
        }
    )
    assert (sampling.beam_width, sampling.early_stopping, sampling.length_penalty, sampling.temperature) == (
        4,
        "never",
        0.5,
        0.0,
    )
    for given, meant in ((True, True), (False, False), ("true", True)):
        assert (
            parse_sampling({"use_beam_search": True, "beam_width": 4, "early_stopping": given}).early_stopping is meant
        )
    # vLLM's defaults, spelled out
    assert parse_sampling({"length_penalty": 1.0, "early_stopping": False}) == SamplingParams()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": 0.7}, "use_beam_search and temperature: "),
    "top_p": ({"top_p": 0.9}, "use_beam_search and top_p: "),
    "min_p": ({"min_p": 0.1}, "use_beam_search and min_p: "),
    "penalty": ({"frequency_penalty": 1}, "use_beam_search and frequency_penalty: "),
    "bias": ({"logit_bias": {"3": 1}}, "use_beam_search and logit_bias: "),
    "best_of": ({"best_of": 4}, "use_beam_search and best_of: "),
    "stop": ({"stop": "."}, "use_beam_search and stop: "),
    "grammar": ({"guided_regex": "a+"}, "use_beam_search and guided_regex: "),
    "logprobs": ({"logprobs": 2}, "use_beam_search and logprobs: only the chosen tokens' are known; expected 0, got 2"),
    "n": ({"n": 5}, r"n: 5 is more than beam_width \(4\)"),
    "width": ({"beam_width": MAX_BEAM_WIDTH + 1}, "beam_width: expected int <= 16, got 17"),
    "no width": ({"beam_width": None}, "use_beam_search: beam_width is missing, 1 to 16"),
    "length_penalty": ({"length_penalty": "nan"}, "length_penalty: expected float >= -5.0, got 'nan'"),
    "early_stopping": ({"early_stopping": "always"}, "early_stopping: "),
    "no search": ({"use_beam_search": False}, "beam_width: only with use_beam_search"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_with_beams_is_refused_by_both_names(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        parse_sampling({"use_beam_search": True, "beam_width": 4, **options})
