"""Requests that outlive an engine go on in the next one; those that may have killed it run one at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paged_backend.errors import ErrorKind
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from tests.simulated_runner import solo
from tests.unit.scheduler.bench import VOCAB, Bench


def test_a_request_that_an_engine_had_begun_is_not_refused_as_one_that_never_started() -> None:
    """Its caller has heard of it; the engine that goes on with it may be late."""
    bench = Bench(max_waiting_seconds=5.0)
    bench.tokens |= {1: [], 2: []}
    for request_id, resumed in ((1, True), (2, False)):
        sampling = SamplingParams(max_tokens=4, temperature=0.0)
        bench.now = 0.0
        bench.engine.submit(
            Submit(request_id, np.array([1, 2, 3], np.int32).tobytes(), sampling, (), "", 0.0, resumed=resumed)
        )
    bench.now = 6.0
    bench.run()
    assert bench.finishes[1].reason == "length"
    assert "not started after 5 s (max_waiting_seconds)" in bench.finishes[2].message


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 7, 12])
def test_a_request_goes_on_in_another_engine_where_it_stopped(steps: int) -> None:
    """The tokens it got are given as the end of the prompt, and count as answer: for its length, its penalties and its
    first-token message.
    """
    before, after, prompt = Bench(steps_ahead=1), Bench(), list(range(9))
    before.submit(1, prompt, max_tokens=11)
    before.step(steps)
    told = before.tokens[1]
    after.tokens[1] = []
    submit = Submit(
        1,
        np.array(prompt + told, np.int32).tobytes(),
        SamplingParams(max_tokens=11, temperature=0.0),
        (),
        "",
        0.0,
        num_answered=len(told),
    )
    if len(told) < 11:
        after.engine.submit(submit)
        after.step()
        assert after.batches[0].new_rows[0].prompt_len == 9
        after.run()
        assert after.finishes[1].reason == "length"
        assert (1 in after.started) == (not told)
    assert told + after.tokens[1] == solo(prompt, 11, (), VOCAB)


def test_a_file_says_at_any_moment_who_runs(tmp_path: Path) -> None:
    """For those who ask after the engine's death: whoever only waited had no part in it."""
    bench = Bench(max_num_sequences=2)
    bench.submit(7, [1, 2], max_tokens=3)
    bench.step()
    bench.scheduler.share_running(tmp_path / "running")

    def running() -> set[int]:
        return {int(number) for number in np.fromfile(tmp_path / "running", np.int64) if number >= 0}

    assert running() == {7}
    bench.submit(8, [1], max_tokens=30)
    bench.submit(9, [1], max_tokens=2)
    bench.step()
    assert running() == {7, 8}
    bench.run()
    assert running() == set()


def test_the_file_names_a_request_that_waits_while_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine dies of need not run: it may be taken in, or its grammar or adapter may be at fault."""
    bench, seen = Bench(), []
    bench.scheduler.share_running(tmp_path / "running")

    def note() -> bool:
        seen.append({number for number in np.fromfile(tmp_path / "running", np.int64).tolist() if number >= 0})
        return len(seen) > 2

    take = bench.scheduler._intake.take
    monkeypatch.setattr(bench.scheduler._intake, "take", lambda *given: (note(), take(*given))[1])
    feature = bench.scheduler._quarantine
    monkeypatch.setattr(feature, "enter", lambda sequence, request: True)
    monkeypatch.setattr(feature, "prepare", lambda sequence: note())
    monkeypatch.setattr(feature, "prepared", lambda sequence: len(seen) > 2)
    bench.submit(7, list(range(20)), max_tokens=5)
    for _ in range(3):
        bench.scheduler.schedule()
    assert seen[:3] == [{7}, {7}, {7}]
    bench.scheduler.abort(7)
    assert max(np.fromfile(tmp_path / "running", np.int64)) < 0


def test_a_suspect_is_not_kept_waiting_by_those_that_come_after_it() -> None:
    bench = Bench(max_num_sequences=1)
    bench.submit(1, [1], max_tokens=5)
    bench.step()
    bench.tokens[2] = []
    bench.engine.submit(
        Submit(
            2,
            np.array([2], np.int32).tobytes(),
            SamplingParams(max_tokens=4, temperature=0.0),
            (),
            "",
            0.0,
            suspect=True,
        )
    )
    for request_id in range(3, 9):
        bench.submit(request_id, [request_id])
    bench.run()
    assert list(bench.finishes)[:2] == [1, 2]


def test_suspects_run_one_at_a_time_in_their_turn_and_are_named_before_they_run() -> None:
    bench = Bench(num_pages=64)
    named: list[int | None] = []
    running_when_named: list[int] = []

    def tell(request_id: int | None) -> None:
        named.append(request_id)
        running_when_named.append(len(bench.batches))

    bench.scheduler.tell_of_suspects(tell)
    for request_id in range(1, 7):
        bench.tokens[request_id] = []
        sampling = SamplingParams(max_tokens=4 if request_id == 2 else 20, temperature=0.0)
        prompt = np.array([request_id] * 5, np.int32).tobytes()
        bench.engine.submit(Submit(request_id, prompt, sampling, (), "", 0.0, suspect=request_id % 2 == 0))
    bench.step()
    assert sorted(bench.batches[0].request_ids.tolist()) == [1, 2, 3, 5]
    assert named == [2]
    bench.run()
    assert named == [2, None, 4, None, 6, None]
    starts = [
        next(number for number, batch in enumerate(bench.batches) if request_id in batch.request_ids)
        for request_id in (2, 4, 6)
    ]
    assert [running_when_named[0], running_when_named[2], running_when_named[4]] == starts, (
        "named after its first step was launched"
    )
    assert starts[2] - starts[1] >= 3
    for request_id in range(1, 7):
        assert bench.tokens[request_id] == solo([request_id] * 5, 4 if request_id == 2 else 20, (), VOCAB)


def test_requests_that_a_dead_engine_had_let_in_are_not_refused_by_the_next_one() -> None:
    """All of them wait at once there, also those that ran; and some have lived for longer than a request may wait."""
    bench = Bench(max_queue_size=2, max_num_sequences=1, max_waiting_seconds=10)
    bench.now = 50.0
    for request_id in range(4):
        bench.tokens[request_id] = []
        told = solo([request_id], 2, (), VOCAB)
        prompt = np.array([request_id, *told], np.int32).tobytes()
        sampling = SamplingParams(max_tokens=4, temperature=0.0)
        bench.engine.submit(Submit(request_id, prompt, sampling, (), "", 0.0, num_answered=2, resumed=True))
    bench.submit(9, [1])
    bench.run()
    assert {request_id: finish.reason for request_id, finish in bench.finishes.items()} == {
        0: "length",
        1: "length",
        2: "length",
        3: "length",
        9: "",
    }
    assert bench.finishes[9].error is ErrorKind.OVERLOADED
