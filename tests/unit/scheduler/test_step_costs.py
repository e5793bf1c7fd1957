"""speculation=auto: drafts are had where they bring more tokens a second, found out by a clock, and nowhere else. The
device is a simulated one, whose steps take what a test says.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from paged_backend.batch import MOST_DRAFTING, Batch, Drafts
from paged_backend.engine.engine import Engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from paged_backend.scheduler.step_costs import StepCosts
from tests.simulated_runner import Proposer, TimedRunner, solo

VOCAB = 97
MAX_TOKENS = 400
AHEAD = pytest.mark.parametrize("steps_ahead", [0, 1], ids=lambda n: f"{n} steps ahead")
ROWS = pytest.mark.parametrize("rows", [1, 8], ids=lambda n: f"{n} rows")


class Device(TimedRunner):
    """Its steps take so many seconds for their tokens; counts those that have drafts."""

    def __init__(self, limits: SchedulerLimits, quality: float, seconds: Callable[[int], float]) -> None:
        super().__init__(limits, lambda batch: seconds(batch.num_tokens), VOCAB, Proposer(quality, VOCAB))
        self.num_drafting = 0
        self.batches: list[Batch] = []

    def launch(self, batch: Batch) -> None:
        super().launch(batch)
        self.num_drafting += batch.drafts is not None and bool(batch.drafts.counts.any())
        self.batches.append(batch)


class HostBound(Device):
    """The device takes no time, the host some for each step that it launches."""

    def __init__(self, limits: SchedulerLimits, quality: float, seconds: Callable[[int], float]) -> None:
        super().__init__(limits, quality, lambda tokens: 0.0)
        self._host_seconds = seconds

    def launch(self, batch: Batch) -> None:
        super().launch(batch)
        self.now += self._host_seconds(batch.num_tokens)


def served(
    rows: int,
    num_drafts: int,
    quality: float,
    seconds: Callable[[int], float],
    steps_ahead: int,
    kind: type[Device] = Device,
    **limits: object,
) -> Device:
    """The device after so many sequences were answered at once, as they must be."""
    sizes = SchedulerLimits(
        page_size=16,
        num_pages=64 * rows,
        max_model_len=512,
        max_num_sequences=rows,
        max_batched_tokens=256,
        num_drafts=num_drafts,
        **limits,  # type: ignore[arg-type]
    )
    device = kind(sizes, quality, seconds)
    engine = Engine(Scheduler(sizes, clock=lambda: device.now), device, steps_ahead)
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    tokens: dict[int, list[int]] = {request_id: [] for request_id in range(rows)}
    for request_id in range(rows):
        prompt = np.array([request_id + 1] * 3, np.int32)
        engine.submit(Submit(request_id, prompt.tobytes(), sampling, (), "", 0.0))
    while not engine.idle:
        for output in engine.step():
            for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                tokens[request_id].append(token)
    assert tokens == {i: solo([i + 1] * 3, MAX_TOKENS, (), VOCAB) for i in range(rows)}
    return device


def flat(tokens: int) -> float:
    """A device that waits for its memory: a draft is almost free."""
    return 0.01 + 0.00001 * tokens


def busy(tokens: int) -> float:
    """A device that has enough to compute: each token costs the same."""
    return 0.001 + 0.001 * tokens


@pytest.mark.one_in(2)
@AHEAD
@ROWS
@pytest.mark.parametrize("seconds", [flat, busy])
def test_wrong_drafts_cost_next_to_nothing(rows: int, steps_ahead: int, seconds: Callable[[int], float]) -> None:
    off = served(rows, 0, 0.0, seconds, steps_ahead)
    auto = served(rows, 4, 0.0, seconds, steps_ahead, drafts_must_pay=True)
    assert auto.num_drafting > 0
    assert auto.now <= off.now * 1.02 + 4 * seconds(5 * rows)  # until it is found out


@pytest.mark.one_in(2)
@AHEAD
@ROWS
def test_right_drafts_are_had_where_they_are_cheap(rows: int, steps_ahead: int) -> None:
    off = served(rows, 0, 1.0, flat, steps_ahead)
    auto = served(rows, 4, 1.0, flat, steps_ahead, drafts_must_pay=True)
    assert auto.now <= off.now / 3


@pytest.mark.one_in(2)
@AHEAD
@ROWS
def test_right_drafts_that_cost_more_than_they_bring_are_given_up(rows: int, steps_ahead: int) -> None:
    """Steps with drafts take eight times as long, whatever they bring."""

    def slow(tokens: int) -> float:
        return 0.01 * (8 if tokens > rows else 1)

    off = served(rows, 0, 1.0, slow, steps_ahead)
    auto = served(rows, 4, 1.0, slow, steps_ahead, drafts_must_pay=True)
    assert auto.num_drafting > 0
    assert auto.now <= off.now * 1.02 + 8 * slow(5 * rows)


@AHEAD
@ROWS
@pytest.mark.parametrize("quality", [0.0, 1.0], ids=["wrong", "right"])
def test_drafts_that_cost_the_host_more_than_they_bring_are_given_up(
    rows: int, steps_ahead: int, quality: float
) -> None:
    """What the host does for a step falls into the time of the one before."""

    def slow(tokens: int) -> float:
        return 0.001 * (8 if tokens > rows else 1)

    off = served(rows, 0, quality, slow, steps_ahead, HostBound)
    auto = served(rows, 4, quality, slow, steps_ahead, HostBound, drafts_must_pay=True)
    assert auto.num_drafting > 0
    assert auto.now <= off.now * 1.02 + 10 * slow(5 * rows)


@AHEAD
@ROWS
def test_right_drafts_are_had_where_the_host_has_little_to_do_for_them(rows: int, steps_ahead: int) -> None:
    def quick(tokens: int) -> float:
        return 0.001 * (1.2 if tokens > rows else 1)

    off = served(rows, 0, 1.0, quick, steps_ahead, HostBound)
    auto = served(rows, 4, 1.0, quick, steps_ahead, HostBound, drafts_must_pay=True)
    assert auto.now <= off.now / 2.5


@AHEAD
def test_a_model_whose_drafts_do_not_pay_does_not_read_steps_until_it_is_tried_again(steps_ahead: int) -> None:
    """It reads the prompts, and the step before each that has drafts."""
    device = served(1, 4, 0.0, busy, steps_ahead, drafts_must_pay=True)
    drafting = [batch.drafts is not None and batch.drafts.any for batch in device.batches]
    read = [batch.read for batch in device.batches]
    assert read[0] and all(before for before, has in zip(read, drafting[1:], strict=False) if has)
    assert any(drafting[20:]) and sum(read) < len(read) / 6


@AHEAD
@ROWS
def test_a_model_whose_drafts_pay_reads_nearly_all(rows: int, steps_ahead: int) -> None:
    device = served(rows, 4, 1.0, flat, steps_ahead, drafts_must_pay=True)
    assert sum(not batch.read for batch in device.batches) <= 0.2 * len(device.batches)


@AHEAD
def test_without_auto_a_model_reads_every_step(steps_ahead: int) -> None:
    assert all(batch.read for batch in served(1, 4, 0.0, busy, steps_ahead).batches)


@AHEAD
def test_a_text_that_does_not_repeat_itself_has_no_drafts(steps_ahead: int) -> None:
    """The simulated texts are noise: a pair of tokens comes again now and then."""
    device = served(1, 4, 1.0, flat, steps_ahead, drafts_from_text=True)
    assert device.num_drafting < MAX_TOKENS / 10


def batch_of(step: int, rows: int, num_drafts: int) -> Batch:
    drafts = np.full(rows, num_drafts, np.int32)
    return Batch(
        step=step,
        rows=np.arange(rows, dtype=np.int32),
        starts=np.full(rows, 9, np.int32),
        counts=1 + drafts,
        samples=np.ones(rows, np.bool_),
        request_ids=np.arange(rows),
        drafts=Drafts(drafts, 0 * drafts) if num_drafts else None,
        read=False,
    )


class Clock:
    def __init__(self) -> None:
        self.costs = StepCosts(num_drafts=4, every_step=True)
        self.now = 0.0
        self.step = 0

    def take(self, rows: int, num_drafts: int, seconds: float) -> None:
        self.step += 1
        batch = batch_of(self.step, rows, num_drafts)
        self.costs.begins(batch, self.now)
        self.now += seconds
        self.costs.ends(batch, self.now)


def test_a_step_without_drafts_comes_first_and_again_now_and_then() -> None:
    clock = Clock()
    assert clock.costs.drafts.most_drafts([4, 4], [0.9, 0.9]) == 0
    clock.take(2, 0, 0.01)
    had = []
    for _ in range(500):
        most = clock.costs.drafts.most_drafts([4, 4], [0.9, 0.9])
        had.append(most)
        clock.take(2, most, 0.011)
    assert [step for step, most in enumerate(had) if most != 4] == [32, 32 + 65, 32 + 65 + 129, 32 + 65 + 129 + 257]
    assert set(had) == {0, 4}


def test_of_several_numbers_of_drafts_the_one_that_brings_the_most_tokens_a_second_is_had() -> None:
    clock = Clock()
    for num_drafts, seconds in ((0, 0.010), (1, 0.011), (2, 0.012), (3, 0.030), (4, 0.031)):
        clock.take(1, num_drafts, seconds)
    assert clock.costs.drafts.most_drafts([4], [0.9]) == 2
    assert clock.costs.drafts.most_drafts([1], [0.9]) == 1
    assert clock.costs.drafts.most_drafts([4], [0.05]) == 0
    assert clock.costs.drafts.most_drafts([0], [0.9]) == 0


def costly() -> Clock:
    """Steps with drafts take six times as long as those without."""
    clock = Clock()
    clock.take(1, 0, 0.01)
    for _ in range(20):
        for num_drafts in (1, 2, 3, 4):
            clock.take(1, num_drafts, 0.06)
        clock.take(1, 0, 0.01)
    return clock


def test_what_did_not_pay_is_tried_again_ever_more_rarely_and_asked_about_as_rarely() -> None:
    clock, asked, tries = costly(), [], []
    for step in range(1, 3000):
        most = 0
        if not clock.costs.drafts.rests():
            asked.append(step)
            most = clock.costs.drafts.most_drafts([4], [0.9])
        if most:
            tries.append(step)
        clock.take(1, most, 0.06 if most else 0.01)
    rests = np.diff([0, *tries])
    assert tries[0] > 30 and (rests[1:] > 1.9 * rests[:-1]).all() and len(tries) >= 5
    assert len(asked) <= 4 * len(tries)


def test_a_rest_is_over_as_soon_as_drafts_pay() -> None:
    clock = costly()
    while not (clock.costs.drafts.rests() or clock.costs.drafts.most_drafts([4], [0.9])):
        clock.take(1, 0, 0.01)
    assert clock.costs.drafts.rests()
    for _ in range(20):
        clock.take(1, 4, 0.01)  # of a sequence that has come
    assert not clock.costs.drafts.rests() and clock.costs.drafts.most_drafts([4], [0.9]) == 4
    assert not clock.costs.drafts.resting


def test_who_comes_during_a_rest_is_asked_about_once() -> None:
    clock = costly()
    while not clock.costs.drafts.rests():
        assert clock.costs.drafts.most_drafts([4], [0.9]) == 0
    clock.costs.drafts.wake()
    assert not clock.costs.drafts.rests()
    assert clock.costs.drafts.most_drafts([4], [0.9]) == 0
    assert clock.costs.drafts.rests() and clock.costs.drafts.resting


def test_a_step_that_was_held_up_says_little_about_the_next() -> None:
    clock = Clock()
    clock.take(1, 0, 0.01)
    for _ in range(10):
        clock.take(1, 4, 0.012)
    clock.take(1, 4, 100.0)
    assert clock.costs.drafts.most_drafts([4], [0.9]) > 0


def test_prompts_and_many_rows_are_no_concern_here() -> None:
    clock = Clock()
    clock.take(MOST_DRAFTING + 1, 0, 0.01)
    clock.step += 1
    batch = batch_of(clock.step, 2, 0)
    batch.counts[:] = 7
    clock.costs.begins(batch, clock.now)
    clock.costs.ends(batch, clock.now + 5)
    drafts = clock.costs.drafts
    assert not any(drafts._plain) and not drafts._drafting and not clock.costs.begun
