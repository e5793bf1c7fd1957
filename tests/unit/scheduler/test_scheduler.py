"""Scheduling at its borders: page edges, budgets, one page too few, preemption, limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from paged_backend.batch import Batch, StepResult
from paged_backend.engine.engine import Engine
from paged_backend.errors import ErrorKind
from paged_backend.messages import Finish, Submit
from paged_backend.request import SamplingParams
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from tests.simulated_runner import SimulatedRunner, solo
from tests.unit.scheduler.bench import VOCAB, Bench


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("prompt_len", [1, 3, 4, 5, 8, 59])
def test_a_sequence_gets_its_answer_whatever_its_length_is_to_the_page(prompt_len: int, steps_ahead: int) -> None:
    bench = Bench(steps_ahead=steps_ahead)
    bench.submit(1, list(range(prompt_len)), max_tokens=5)
    bench.run()
    assert bench.tokens[1] == solo(range(prompt_len), 5, (), VOCAB)
    assert bench.finishes[1].reason == "length"


class _WithTops(SimulatedRunner):
    def finished(self, keep: int) -> Iterator[tuple[Batch, StepResult]]:
        for batch, result in super().finished(keep):
            size = len(result.token_ids)
            top_ids = np.stack([result.token_ids, result.token_ids + 1, result.token_ids + 2], axis=1)
            tops = np.tile(np.array([-0.5, -1, -2], np.float32), (size, 1))
            yield batch, replace(result, logprobs=np.full(size, -0.5, np.float32), top_ids=top_ids, top_logprobs=tops)


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_token_in_flight_at_a_preemption_brings_its_top_logprobs(steps_ahead: int) -> None:
    scheduler = Scheduler(
        SchedulerLimits(page_size=2, num_pages=10, max_model_len=20, max_num_sequences=4, max_batched_tokens=64)
    )
    engine = Engine(scheduler, _WithTops(4, 10, 2, 20, 64, VOCAB), steps_ahead)
    for request_id in range(3):
        sampling = SamplingParams(max_tokens=14, temperature=0.0, logprobs=request_id + 1)
        engine.submit(Submit(request_id, np.array([request_id + 1] * 3, np.int32).tobytes(), sampling, (), "", 1e18))
    told: dict[int, list[dict[int, float]]] = {0: [], 1: [], 2: []}
    while not engine.idle:
        for output in engine.step():
            for entry, (request_id, token) in enumerate(
                zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True)
            ):
                tops = output.top_logprobs[entry]
                assert list(tops) == [token, token + 1, token + 2][: request_id + 1]
                told[request_id].append(tops)
    assert scheduler.num_preemptions
    assert [len(tops) for tops in told.values()] == [14, 14, 14]


def test_a_request_that_cannot_be_taken_in_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the engine: the next one would be asked the same."""
    bench = Bench()
    bench.submit(1, [1, 2], max_tokens=4)
    take = bench.scheduler._intake.take

    def fail(request: Submit, num_waiting: int) -> Any:
        if request.request_id == 2:
            raise ZeroDivisionError("a mistake of ours")
        return take(request, num_waiting)

    monkeypatch.setattr(bench.scheduler._intake, "take", fail)
    for request_id in (2, 3):
        bench.submit(request_id, [1, 2], max_tokens=4)
    bench.run()
    assert bench.finishes[2].error is ErrorKind.INTERNAL
    assert "ZeroDivisionError" in bench.finishes[2].message
    assert bench.tokens[1] == bench.tokens[3] == solo([1, 2], 4, (), VOCAB)


def test_a_long_prompt_is_computed_in_chunks_of_the_budget_while_others_decode() -> None:
    bench = Bench(max_batched_tokens=10, prefix_cache=False)
    bench.submit(1, [1, 2], max_tokens=12)
    bench.step()
    bench.submit(2, list(range(30)), max_tokens=2)
    bench.run()
    assert [batch.counts.tolist() for batch in bench.batches[1:5]] == [[1, 9], [1, 9], [1, 9], [1, 3]]
    assert bench.tokens[2] == solo(range(30), 2, (), VOCAB)


def test_a_budget_smaller_than_the_rows_limits_who_runs_and_nobody_starves() -> None:
    bench = Bench(max_batched_tokens=2, max_num_sequences=8)
    for request_id in range(6):
        bench.submit(request_id, [request_id, 1, 2], max_tokens=3)
    bench.run()
    assert max(batch.num_tokens for batch in bench.batches) <= 2
    assert all(bench.tokens[i] == solo([i, 1, 2], 3, (), VOCAB) for i in range(6))


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_one_page_too_few_preempts_the_youngest_and_both_answers_are_right(steps_ahead: int) -> None:
    bench = Bench(num_pages=5, max_model_len=20, steps_ahead=steps_ahead)
    bench.submit(1, [1, 2, 3], max_tokens=14)
    bench.submit(2, [4, 5, 6], max_tokens=14)
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    assert bench.tokens == {1: solo([1, 2, 3], 14, (), VOCAB), 2: solo([4, 5, 6], 14, (), VOCAB)}
    assert list(bench.finishes) == [1, 2]  # the older one was not held up


def test_a_preempted_sequence_resumes_from_its_cached_pages() -> None:
    with_cache, without = Bench(num_pages=8, max_model_len=32), Bench(num_pages=8, max_model_len=32, prefix_cache=False)
    for bench in (with_cache, without):
        bench.submit(1, [1] * 9, max_tokens=16)
        bench.submit(2, [2] * 9, max_tokens=16)
        bench.run()
        assert bench.scheduler.num_preemptions > 0
    assert with_cache.runner.num_tokens_computed < without.runner.num_tokens_computed


def test_without_preemption_a_sequence_starts_only_when_its_longest_answer_fits() -> None:
    bench = Bench(num_pages=5, max_model_len=20, preemption=False)
    bench.submit(1, [1, 2, 3], max_tokens=14)
    bench.submit(2, [4, 5, 6], max_tokens=14)
    bench.run()
    assert bench.scheduler.num_preemptions == 0
    assert max(batch.num_sequences for batch in bench.batches) == 1
    assert bench.tokens[2] == solo([4, 5, 6], 14, (), VOCAB)


def test_nobody_overtakes_the_first_in_the_queue_for_want_of_pages() -> None:
    bench = Bench(num_pages=4, max_model_len=16)
    bench.submit(1, [1] * 9, max_tokens=2)
    bench.step()
    bench.submit(2, [2] * 12, max_tokens=2)  # does not fit beside 1
    bench.submit(3, [3], max_tokens=2)  # would
    bench.run()
    first = next(batch for batch in bench.batches if 3 in batch.request_ids)
    assert 2 in first.request_ids or any(
        2 in batch.request_ids for batch in bench.batches[: bench.batches.index(first)]
    )


def test_the_last_prompt_token_is_computed_even_if_all_pages_are_cached() -> None:
    bench = Bench()
    prompt = list(range(8))  # two full pages
    bench.submit(1, prompt)
    bench.run()
    bench.submit(2, prompt)
    bench.run()
    assert bench.started == {1: 0, 2: 4}
    assert bench.tokens[2] == bench.tokens[1]


def test_prompts_share_pages_while_their_owner_still_runs() -> None:
    bench = Bench()
    bench.submit(1, list(range(9)), max_tokens=8)
    bench.step()
    bench.submit(2, [*range(8), 50], max_tokens=8)
    bench.step()
    assert bench.started[2] == 8
    assert bench.scheduler.pool.num_held == 4  # two shared, and one each
    bench.run()
    assert bench.tokens[2] == solo([*range(8), 50], 8, (), VOCAB)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_siblings_compute_their_prompt_once_and_share_its_pages(prefix_cache: bool, steps_ahead: int) -> None:
    """Admitted in one step: the others find the pages that the first computes in this very step. What lies past the
    last full page is each one's own.
    """
    bench = Bench(prefix_cache=prefix_cache, steps_ahead=steps_ahead, num_pages=32)
    prompt = list(range(18))
    for request_id in range(1, 6):
        bench.submit(request_id, prompt, family=7, max_tokens=5 + request_id)
    bench.step()
    assert bench.batches[0].counts.tolist() == [18, 2, 2, 2, 2]
    assert bench.scheduler.pool.num_held == 4 + 5
    bench.run()
    for request_id in range(1, 6):
        assert bench.tokens[request_id] == solo(prompt, 5 + request_id, (), VOCAB)


def test_without_a_prefix_cache_a_family_shares_with_nobody_else() -> None:
    bench = Bench(prefix_cache=False)
    for request_id, family in ((1, 5), (2, 5), (3, 6), (4, None)):
        bench.submit(request_id, list(range(9)), family=family)
    bench.step()
    assert bench.batches[0].counts.tolist() == [9, 1, 9, 9]
    bench.run()


def test_salted_prompts_share_nothing() -> None:
    bench = Bench()
    bench.submit(1, list(range(9)), salt="a")
    bench.run()
    bench.submit(2, list(range(9)), salt="b")
    bench.run()
    assert bench.started[2] == 0


def test_a_stop_token_ends_the_sequence_and_is_part_of_the_answer() -> None:
    answer = solo([1, 2], 8, (), VOCAB)
    bench = Bench()
    bench.submit(1, [1, 2], max_tokens=8, stop_token_ids=(answer[3],))
    bench.run()
    assert bench.tokens[1] == answer[: answer.index(answer[3]) + 1]
    assert bench.finishes[1].reason == "stop"


def test_eos_ends_a_sequence_unless_it_is_ignored() -> None:
    answer = solo([1, 2], 8, (), VOCAB)
    bench = Bench(eos_ids=(answer[2],))
    bench.submit(1, [1, 2], max_tokens=8)
    bench.submit(2, [1, 2], max_tokens=8, ignore_eos=True)
    bench.run()
    assert (bench.tokens[1], bench.tokens[2]) == (answer[:3], answer)


def test_the_model_length_ends_a_sequence() -> None:
    bench = Bench(max_model_len=10)
    bench.submit(1, [1, 2, 3, 4], max_tokens=100)
    bench.run()
    assert bench.tokens[1] == solo([1, 2, 3, 4], 6, (), VOCAB)
    assert bench.finishes[1].reason == "length"


def test_a_step_ahead_wastes_at_most_one_token_a_sequence_and_none_at_the_length_limit() -> None:
    ahead = Bench(steps_ahead=1)
    ahead.submit(1, [1, 2], max_tokens=6)
    ahead.run()
    assert ahead.runner.num_tokens_computed == 2 + 5  # the last token's K and V are never needed
    answer = solo([1, 2], 8, (), VOCAB)
    stopped = Bench(steps_ahead=1, eos_ids=(answer[2],))
    stopped.submit(1, [1, 2], max_tokens=8)
    stopped.run()
    assert stopped.tokens[1] == answer[:3]
    assert stopped.runner.num_tokens_computed == 2 + 2 + 1


@pytest.mark.parametrize("when", [0, 1, 2, 3])
def test_abort_frees_the_pages_at_every_stage(when: int) -> None:
    bench = Bench(max_batched_tokens=8, steps_ahead=1, prefix_cache=False)
    bench.submit(1, list(range(12)), max_tokens=20)
    bench.step(when)
    bench.engine.abort(1)
    bench.engine.check()
    assert bench.scheduler.pool.num_free == 16 and bench.engine.idle
    heard = len(bench.tokens[1])
    bench.submit(2, [9, 9], max_tokens=4)
    bench.run()
    assert len(bench.tokens[1]) == heard and 1 not in bench.finishes
    assert bench.tokens[2] == solo([9, 9], 4, (), VOCAB)


def test_aborting_what_is_over_is_harmless() -> None:
    bench = Bench()
    bench.submit(1, [1])
    bench.run()
    bench.engine.abort(1)
    bench.engine.abort(77)
    bench.engine.check()


def test_one_request_more_than_the_queue_holds_is_refused_with_the_numbers() -> None:
    bench = Bench(max_queue_size=2)
    for request_id in range(3):
        bench.submit(request_id, [1])
    bench.step()
    assert bench.finishes[2].error is ErrorKind.OVERLOADED
    assert "2 requests are waiting" in bench.finishes[2].message and "max_queue_size" in bench.finishes[2].message


@pytest.mark.parametrize("stranger", [VOCAB, -1, 2**31 - 1])
def test_an_id_without_an_embedding_is_refused_whoever_let_it_through(stranger: int) -> None:
    """On a device it would be the end of the engine, and of everybody's answers with it."""
    bench = Bench(vocab_size=VOCAB)
    bench.submit(1, [1, VOCAB - 1], max_tokens=4)
    bench.submit(2, [1, stranger], max_tokens=4)
    bench.run()
    assert bench.finishes[2].error is ErrorKind.INVALID
    assert str(stranger) in bench.finishes[2].message and f"0 to {VOCAB - 1}" in bench.finishes[2].message
    assert bench.finishes[1].reason == "length"


def test_a_request_that_waited_too_long_is_refused_and_one_that_lives_too_long_is_ended() -> None:
    bench = Bench(max_num_sequences=1, max_waiting_seconds=10, request_deadline_seconds=30)
    bench.submit(1, [1], max_tokens=60)
    bench.submit(2, [2])
    bench.step()
    bench.now = 11
    bench.step()
    assert bench.finishes[2].error is ErrorKind.OVERLOADED and "max_waiting_seconds" in bench.finishes[2].message
    bench.now = 31
    bench.step()
    assert bench.finishes[1].error is ErrorKind.CANCELLED and "request_deadline_seconds" in bench.finishes[1].message
    assert bench.engine.idle and bench.scheduler.pool.num_held == 0


def test_a_request_may_have_a_shorter_deadline_of_its_own_in_every_state_but_no_longer_one() -> None:
    bench = Bench(max_num_sequences=1, request_deadline_seconds=50)
    bench.submit(1, [1], max_tokens=60, request_deadline_seconds=90)  # the engine's own is shorter
    bench.submit(2, [2], max_tokens=60, request_deadline_seconds=7.5)  # waits
    bench.step(2)
    bench.now = 8
    bench.step()
    assert bench.finishes == {
        2: Finish(2, error=ErrorKind.CANCELLED, message="not finished after 7.5 s (request_deadline_seconds)")
    }
    bench.submit(3, [3], max_tokens=60, request_deadline_seconds=45)
    bench.engine.abort(1)
    bench.step(2)
    assert bench.tokens[3]  # runs
    bench.now = 54
    bench.step()
    assert bench.finishes[3].message == "not finished after 45 s (request_deadline_seconds)"


def test_the_lowest_priority_level_starts_first_and_the_highest_is_preempted_first() -> None:
    bench = Bench(num_pages=5, max_model_len=20, max_num_sequences=2)
    bench.submit(1, [1, 2, 3], max_tokens=14, priority_level=3)  # the oldest, and yet the one to make room
    bench.submit(2, [4, 5, 6], max_tokens=14, priority_level=-1)
    bench.submit(3, [7, 8], max_tokens=14, priority_level=9)
    bench.submit(4, [9, 8], max_tokens=14)
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    assert list(bench.finishes) == [2, 4, 1, 3]
    prompts = {1: [1, 2, 3], 2: [4, 5, 6], 3: [7, 8], 4: [9, 8]}
    assert bench.tokens == {request_id: solo(prompt, 14, (), VOCAB) for request_id, prompt in prompts.items()}


def test_a_request_that_skips_the_prefix_cache_finds_nothing_and_leaves_nothing() -> None:
    bench = Bench()
    prompt = list(range(10))
    bench.submit(1, prompt)
    bench.run()
    bench.submit(2, prompt, skip_prefix_cache=True)
    bench.submit(3, [9] * 10, skip_prefix_cache=True)
    bench.run()
    bench.submit(4, [9] * 10)
    bench.submit(5, prompt)
    bench.run()
    assert bench.started == {1: 0, 2: 0, 3: 0, 4: 0, 5: 8}
    bench.submit(6, [5] * 10, family=1, skip_prefix_cache=True)
    bench.submit(7, [5] * 10, family=1, skip_prefix_cache=True)
    bench.run()
    assert bench.started[7] == 8, "sequences of one request share their prompt even so"


def test_prompts_outside_the_model_are_refused_with_the_limit() -> None:
    bench = Bench(max_model_len=8)
    bench.submit(1, [1] * 8)
    bench.submit(2, [])
    bench.step()
    assert {i: finish.error for i, finish in bench.finishes.items()} == {1: ErrorKind.INVALID, 2: ErrorKind.INVALID}
    assert "1 to 7" in bench.finishes[1].message


def test_reservation_is_the_same_code_with_one_page_a_sequence() -> None:
    bench = Bench(page_size=20, max_model_len=20, num_pages=3)
    for request_id in range(5):
        bench.submit(request_id, [request_id + 1], max_tokens=10)
    bench.run()
    assert max(batch.num_sequences for batch in bench.batches) == 3
    assert bench.scheduler.num_preemptions == 0
    assert all(bench.tokens[i] == solo([i + 1], 10, (), VOCAB) for i in range(5))


def test_utilisation_counts_a_shared_page_once() -> None:
    bench = Bench()
    bench.submit(1, list(range(9)), max_tokens=8)
    bench.submit(2, list(range(9)), max_tokens=8)
    bench.step()
    assert bench.scheduler.live_tokens() <= bench.scheduler.pool.num_held * 4
    bench.run()
    assert bench.scheduler.live_tokens() == 0


def test_a_wanted_logprob_goes_to_the_sequence_that_asked() -> None:
    scheduler = Bench().scheduler
    for request_id, wanted in ((1, None), (2, 2)):
        sampling = SamplingParams(max_tokens=2, temperature=0.0, logprobs=wanted)
        scheduler.submit(Submit(request_id, np.array([1], np.int32).tobytes(), sampling, (), "", 0.0))
    batch = scheduler.schedule()
    assert batch is not None and batch.features == 96
    tops = np.array([[3, 4], [5, 6]], np.int32)
    result = StepResult(
        np.array([3, 5], np.int32),
        np.array([-1, -2], np.float32),
        np.array([7, 8], np.int32),
        tops,
        np.array([[-1, -3], [-2, -4]], np.float32),
    )
    output = scheduler.commit(batch, result)
    assert output.top_logprobs == {1: {5: -2.0, 6: -4.0}}
    assert output.ranks is not None and output.ranks.tolist() == [7, 8]
