"""Steps that bring several tokens of a sequence, with made-up drafts: nothing but the number of steps may change."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from types import FrameType

import numpy as np
import pytest

from paged_backend.batch import MOST_DRAFTING, Batch, Drafts, StepOutput, StepResult
from paged_backend.engine.checked_runner import BrokenStepError, CheckedRunner, TableBounds
from paged_backend.engine.engine import Engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.repetition import Repetition
from paged_backend.scheduler.scheduler import Scheduler
from tests import simulated_runner
from tests.simulated_runner import Proposer, SimulatedRunner, TimedRunner, next_token, solo

VOCAB = 97
QUALITIES = pytest.mark.parametrize("quality", [0.0, 0.6, 1.0], ids=["wrong", "partly right", "right"])
AHEAD = pytest.mark.parametrize("steps_ahead", [0, 1, 2], ids=lambda n: f"{n} steps ahead")


class Bench:
    """An engine whose steps have drafts, and what its callers have heard."""

    def __init__(self, quality: float, steps_ahead: int = 0, num_drafts: int = 4, **limits: object) -> None:
        defaults = {
            "page_size": 4,
            "num_pages": 64,
            "max_model_len": 64,
            "max_num_sequences": 8,
            "max_batched_tokens": 64,
        }
        self.limits = SchedulerLimits(**(defaults | limits), num_drafts=num_drafts)  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.limits, clock=lambda: 0.0)
        sizes = self.limits.num_pages, self.limits.page_size, self.limits.max_model_len, self.limits.max_batched_tokens
        windows, num_rows = self.limits.windows, self.limits.max_num_sequences
        self.runner = SimulatedRunner(num_rows, *sizes, VOCAB, windows, Proposer(quality, VOCAB, windows))
        bounds = TableBounds(num_rows, *sizes, windows)
        self.batches: list[Batch] = []
        launch = self.runner.launch
        self.runner.launch = lambda batch: (self.batches.append(batch), launch(batch))[1]  # type: ignore[method-assign]
        self.engine = Engine(
            self.scheduler, CheckedRunner(self.runner, bounds, self.scheduler.check), steps_ahead=steps_ahead
        )
        self.tokens: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}
        self.started: dict[int, int] = {}

    def submit(self, request_id: int, prompt: list[int], **sampling: object) -> None:
        params = SamplingParams(**({"max_tokens": 20, "temperature": 0.0} | sampling))  # type: ignore[arg-type]
        self.tokens[request_id] = []
        self.engine.submit(Submit(request_id, np.array(prompt, np.int32).tobytes(), params, (), "", 0.0))

    def step(self) -> list[StepOutput]:
        outputs = self.engine.step()
        for output in outputs:
            for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                assert request_id not in self.reasons, "a token behind the end"
                self.tokens[request_id].append(token)
            self.started |= output.started
            self.reasons |= {finish.request_id: finish.reason for finish in output.finishes}
        self.engine.check()
        return outputs

    def run(self) -> None:
        for _ in range(3000):
            if self.engine.idle:
                return
            self.step()
        raise AssertionError("the engine does not come to rest")


@pytest.mark.one_in(3)
@QUALITIES
@AHEAD
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("max_tokens", [1, 2, 5, 40])
def test_answers_are_what_they_are_without_drafts(
    quality: float, steps_ahead: int, page_size: int, max_tokens: int
) -> None:
    bench = Bench(quality, steps_ahead, page_size=page_size, num_pages=512 // page_size)
    prompts = {1: [3], 2: list(range(10)), 3: list(range(10, 26))}
    for request_id, prompt in prompts.items():
        bench.submit(request_id, prompt, max_tokens=max_tokens)
    bench.run()
    assert bench.tokens == {request_id: solo(prompt, max_tokens, (), VOCAB) for request_id, prompt in prompts.items()}
    assert set(bench.reasons.values()) == {"length"}
    assert bench.scheduler.pool.num_held == 0


@AHEAD
def test_right_drafts_save_steps_and_wrong_ones_cost_none(steps_ahead: int) -> None:
    steps = {}
    for quality, num_drafts in ((1.0, 0), (1.0, 4), (0.0, 4)):
        bench = Bench(quality, steps_ahead, num_drafts)
        bench.submit(1, [1, 2, 3], max_tokens=50)
        bench.run()
        steps[quality, num_drafts] = bench.engine.num_steps
    assert steps[1.0, 4] <= steps[1.0, 0] / 3
    assert steps[0.0, 4] <= steps[1.0, 0] + 1 + steps_ahead


def test_a_model_that_was_wrong_is_asked_again_at_once_then_ever_more_rarely() -> None:
    bench = Bench(quality=0.0)
    bench.submit(1, [1, 2, 3], max_tokens=40)
    bench.run()
    counts = [0 if batch.drafts is None else int(batch.drafts.counts.sum()) for batch in bench.batches[1:]]
    assert counts[:34] == [4, 4, 1, 0, 1, *3 * [0], 1, *7 * [0], 1, *15 * [0], 1, 0]


def test_a_model_that_is_often_right_goes_on_as_before_when_it_was_wrong() -> None:
    """One miss says little: of drafts that are right seven times of ten, the first is wrong in three steps of ten."""
    bench = Bench(quality=0.7)
    bench.submit(1, [1, 2, 3], max_tokens=200)
    bench.run()
    counts = [0 if batch.drafts is None else int(batch.drafts.counts.sum()) for batch in bench.batches[1:-2]]
    assert sum(count == 4 for count in counts) >= 0.9 * len(counts)
    accepted, checked = bench.scheduler.speculation.num_accepted, len(counts)
    assert accepted < 0.9 * sum(counts) and accepted > checked  # some were wrong, and more than one a step was right


@QUALITIES
@AHEAD
def test_a_stop_inside_a_run_ends_the_answer_there(quality: float, steps_ahead: int) -> None:
    prompt = [1, 2, 3]
    free = solo(prompt, 30, (), VOCAB)
    for place in range(1, 12):
        stop = free[place]
        bench = Bench(quality, steps_ahead)
        bench.submit(1, prompt, max_tokens=30, stop_token_ids=(stop,))
        bench.run()
        assert bench.tokens[1] == solo(prompt, 30, (stop,), VOCAB)
        assert bench.reasons[1] == "stop"


@QUALITIES
@AHEAD
@pytest.mark.parametrize("page_size", [1, 2])
def test_preempted_sequences_with_drafts_in_flight_go_on_where_they_were(
    quality: float, steps_ahead: int, page_size: int
) -> None:
    bench = Bench(quality, steps_ahead, page_size=page_size, num_pages=36 // page_size, max_model_len=36)
    for request_id in range(4):
        bench.submit(request_id, [request_id + 1] * 3, max_tokens=24)
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    for request_id in range(4):
        assert bench.tokens[request_id] == solo([request_id + 1] * 3, 24, (), VOCAB)


@QUALITIES
def test_a_sequence_is_cancelled_with_drafts_in_flight_and_its_row_serves_another(quality: float) -> None:
    bench = Bench(quality, steps_ahead=1, max_num_sequences=1)
    bench.submit(1, [1, 2, 3], max_tokens=50)
    for _ in range(4):
        bench.step()
    bench.engine.abort(1)
    del bench.tokens[1]
    bench.submit(2, [4, 5], max_tokens=20)
    bench.run()
    assert bench.tokens == {2: solo([4, 5], 20, (), VOCAB)}


@QUALITIES
@AHEAD
@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_only_accepted_tokens_are_found_by_others(quality: float, steps_ahead: int, page_size: int) -> None:
    """Pages of an answer can be found by who continues it; the simulated model notices a page with other tokens."""
    bench = Bench(quality, steps_ahead, page_size=page_size, num_pages=256 // page_size)
    prompt = list(range(7))
    bench.submit(1, prompt, max_tokens=40)
    bench.run()
    longer = prompt + bench.tokens[1]
    bench.submit(2, longer, max_tokens=10)
    bench.run()
    assert bench.tokens[2] == solo(longer, 10, (), VOCAB)
    assert bench.started[2] == (len(longer) - 1) // page_size * page_size


@QUALITIES
@pytest.mark.parametrize("windows", [(5,), (None, 5), (7, 2, 2)], ids=str)
def test_pages_that_a_window_may_still_reach_are_kept(quality: float, windows: tuple[int | None, ...]) -> None:
    bench = Bench(quality, steps_ahead=1, page_size=2, windows=windows, num_pages=200)
    for request_id in range(3):
        bench.submit(request_id, [request_id] * 5, max_tokens=40)
    bench.run()
    for request_id in range(3):
        assert bench.tokens[request_id] == solo([request_id] * 5, 40, (), VOCAB, windows)


@AHEAD
def test_a_step_with_prompts_or_many_sequences_has_no_drafts(steps_ahead: int) -> None:
    many = MOST_DRAFTING + 1
    bench = Bench(1.0, steps_ahead, max_num_sequences=many, max_batched_tokens=512, num_pages=512)
    for request_id in range(many):
        bench.submit(request_id, [request_id + 1] * 3, max_tokens=4 + request_id % 2)
    bench.run()
    for batch in bench.batches:
        if batch.drafts is not None and batch.drafts.counts.any():
            assert len(batch.rows) <= MOST_DRAFTING and (batch.counts - batch.drafts.counts == 1).all()


def test_drafts_take_no_page_that_another_would_miss() -> None:
    """Two sequences fill the pool to the last page: without drafts nobody is preempted, so with them nobody is."""
    preemptions = []
    for num_drafts in (0, 8):
        bench = Bench(0.0, 1, num_drafts, page_size=1, num_pages=2 * 23, max_model_len=40)
        for request_id in range(2):
            bench.submit(request_id, [request_id + 1] * 3, max_tokens=21)
        bench.run()
        preemptions.append(bench.scheduler.num_preemptions)
    assert preemptions == [0, 0]


def test_nobody_is_preempted_for_tokens_that_may_not_be_there() -> None:
    """A sequence's page would be full if its drafts in flight were right; the only other page is another's."""
    bench = Bench(0.0, steps_ahead=1, page_size=4, num_pages=2, max_model_len=8)
    bench.submit(1, [1], max_tokens=3, priority_level=1)
    bench.step()
    bench.submit(2, [2], max_tokens=6)
    bench.run()
    assert any(batch.drafts is not None and batch.drafts.counts.max() > 1 for batch in bench.batches)
    assert bench.scheduler.num_preemptions == 0
    assert bench.tokens == {1: solo([1], 3, (), VOCAB), 2: solo([2], 6, (), VOCAB)}


def test_log_probabilities_of_a_run_are_those_of_its_tokens() -> None:
    """The entries behind a wrong draft are nobody's, nor are those behind a stop."""
    scheduler = Scheduler(
        SchedulerLimits(
            page_size=4, num_pages=64, max_model_len=64, max_num_sequences=4, max_batched_tokens=64, num_drafts=3
        ),
        clock=lambda: 0.0,
    )
    sampling = SamplingParams(max_tokens=30, temperature=0.0, logprobs=1, stop_token_ids=(77,))
    for request_id in (1, 2):
        scheduler.submit(Submit(request_id, np.array([1, 2], np.int32).tobytes(), sampling, (), "", 0.0))
    first = scheduler.schedule()
    assert first is not None
    scheduler.commit(first, _result([10, 20]))
    second = scheduler.schedule()
    assert second is not None and second.drafts is not None and second.drafts.counts.tolist() == [3, 3]
    output = scheduler.commit(second, _result([11, 12, -1, -1, 21, 77, 23, 24]))
    assert output.request_ids.tolist() == [1, 1, 2, 2]
    assert output.token_ids.tolist() == [11, 12, 21, 77]
    assert output.logprobs is not None and output.logprobs.tolist() == [0, -1, -4, -5]
    assert output.top_logprobs == {0: {100: 0.0}, 1: {101: -1.0}, 2: {104: -4.0}, 3: {105: -5.0}}
    assert [(finish.request_id, finish.reason) for finish in output.finishes] == [(2, "stop")]
    scheduler.check()
    assert (scheduler.speculation.num_proposed, scheduler.speculation.num_accepted) == (6, 4)


def _result(token_ids: list[int]) -> StepResult:
    at = np.arange(len(token_ids))
    return StepResult(
        np.array(token_ids, np.int32),
        logprobs=-at.astype(np.float32),
        ranks=at.astype(np.int32) + 1,
        top_ids=(100 + at[:, None]).astype(np.int32),
        top_logprobs=-at[:, None].astype(np.float32),
    )


def test_a_step_whose_drafts_are_out_of_bounds_is_not_launched() -> None:
    bench = Bench(1.0)
    bench.submit(1, [1, 2, 3])
    batch = bench.scheduler.schedule()
    assert batch is not None
    for counts, unsure in (([3], [0]), ([-1], [0]), ([0], [1]), ([0], [-1])):
        drafts = Drafts(np.array(counts, np.int32), np.array(unsure, np.int32))
        with pytest.raises(BrokenStepError, match="drafts|may be"):
            bench.engine._runner.launch(replace(batch, drafts=drafts))


def test_the_made_up_drafts_are_as_good_as_they_say() -> None:
    propose = Proposer(1.0, VOCAB)
    tokens = [1, 2, 3]
    drafts = propose(tokens, 3)
    for draft in drafts:
        assert draft == next_token(tokens, VOCAB)
        tokens.append(draft)


class Calls:
    """How often each of the scheduler's functions is called in a step."""

    def __init__(self, num_sequences: int, quality: float, num_drafts: int, **limits: object) -> None:
        sizes = SchedulerLimits(
            page_size=64,
            num_pages=256,
            max_model_len=512,
            max_num_sequences=16,
            max_batched_tokens=64,
            num_drafts=num_drafts,
            **limits,  # type: ignore[arg-type]
        )
        vocab_size = 1_000_003  # no pair comes again
        runner = TimedRunner(sizes, lambda batch: 0.001 * batch.num_tokens, vocab_size, Proposer(quality, vocab_size))
        self.engine = Engine(Scheduler(sizes, clock=lambda: runner.now), runner, steps_ahead=1)
        for request_id in range(num_sequences):
            sampling = SamplingParams(max_tokens=200, temperature=0.0)
            self.engine.submit(Submit(request_id, np.array([request_id], np.int32).tobytes(), sampling, (), "", 0.0))

    def of_step(self) -> Counter[str]:
        calls: Counter[str] = Counter()

        def note(frame: FrameType, event: str, _: object) -> None:
            code = frame.f_code
            if event == "call" and "paged_backend/scheduler/" in code.co_filename and "comp>" not in code.co_name:
                calls[code.co_qualname] += 1

        sys.setprofile(note)
        try:
            self.engine.step()
        finally:
            sys.setprofile(None)
        return calls


def usual(calls: Calls) -> Counter[str]:
    """Of 40 steps, what most of them call: some have a page to take, or a cost to learn."""
    for _ in range(60):
        calls.engine.step()
    [(found, times)] = Counter(tuple(sorted(calls.of_step().items())) for _ in range(40)).most_common(1)
    assert times > 20
    return Counter(dict(found))


@pytest.mark.parametrize("num_sequences", [1, 8])
@pytest.mark.parametrize("must_pay", [False, True], ids=["ngram", "auto"])
def test_of_a_text_that_repeats_nothing_one_step_in_sixteen_is_heard_and_no_row_looked_at(
    num_sequences: int, must_pay: bool
) -> None:
    off = usual(Calls(num_sequences, 0.0, 0))
    calls = Calls(num_sequences, 0.0, 4, drafts_from_text=True, drafts_must_pay=must_pay)
    more = usual(calls) - off
    clock = {"StepCosts.begins": 1, "StepCosts.ends": 1} if must_pay else {}
    assert more == {"Speculation.drafts": 1, "Speculation._of_texts": 1} | clock
    of_steps: Counter[str] = sum((calls.of_step() for _ in range(64)), Counter())
    assert of_steps["Speculation.heard"] == 4
    assert of_steps["Repetition.reads"] == 4 * num_sequences and not of_steps["Repetition.num_alike"]


@pytest.mark.parametrize("num_new", [0, 1, 5, 21, 50])
def test_a_text_that_begins_to_repeat_itself_is_found_within_sixteen_steps(num_new: int) -> None:
    """The answer is a text of which no pair comes again, then its end over and over."""
    end = list(range(60, 95))
    answer = list(range(num_new)) + end * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulated_runner, "next_token", lambda tokens, _: answer[min(len(tokens), len(answer)) - 1])
        bench = Bench(1.0, drafts_from_text=True, max_model_len=256, num_pages=80)
        bench.submit(0, [96], max_tokens=len(answer))
        bench.run()
    assert bench.tokens[0] == answer
    drafting = [batch for batch in bench.batches if batch.drafts is not None and batch.drafts.any]
    first_again = 1 + num_new + len(end)
    assert first_again < int(drafting[0].starts[0]) <= first_again + 2 + 16


@pytest.mark.parametrize("num_sequences", [1, 8])
def test_while_a_models_drafts_do_not_pay_no_row_is_looked_at(num_sequences: int) -> None:
    more = usual(Calls(num_sequences, 0.0, 4, drafts_must_pay=True)) - usual(Calls(num_sequences, 0.0, 0))
    asked = {"Speculation.drafts": 1, "Speculation._of_a_model": 1, "DraftCosts.rests": 1, "DraftCosts.resting": 1}
    assert more == asked | {"StepCosts.begins": 1, "StepCosts.ends": 1}


def test_more_sequences_than_may_have_drafts_are_not_listened_to() -> None:
    limits = {"max_num_sequences": MOST_DRAFTING + 1, "num_pages": 512, "drafts_from_text": True}
    bench = Bench(1.0, **limits)
    for request_id in range(MOST_DRAFTING + 1):
        bench.submit(request_id, [request_id] * 3, max_tokens=5 if request_id else 40)
    heard = []
    hears = Repetition.hears
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Repetition, "hears", lambda *args: (heard.append(args), hears(*args))[1])
        for _ in range(4):
            bench.step()
        assert not heard
        bench.run()
    assert heard and bench.tokens[0] == solo([0] * 3, 40, (), VOCAB)
