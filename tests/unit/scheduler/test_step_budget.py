"""A stream that decodes keeps its pace beside a flood of long prompts, which come to their end all the same. The device
is a simulated one, whose steps take what a test says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from paged_backend.batch import Batch
from paged_backend.config import TUNABLES
from paged_backend.engine.engine import Engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_backend.scheduler.features import SchedulerFeature
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from paged_backend.scheduler.sequence import Sequence
from paged_backend.scheduler.step_budget import LEAST_TOKENS, StepBudget
from paged_backend.scheduler.step_costs import PromptCosts
from tests.simulated_runner import TimedRunner, solo

VOCAB = 97
BUDGET = 512
BOUND = 0.05
STREAM = 1000  # its request's id
AHEAD = pytest.mark.parametrize("steps_ahead", [0, 1], ids=lambda n: f"{n} steps ahead")

Seconds = Callable[[Batch], float]


def read(batch: Batch) -> float:
    """Tokens that the step's tokens read."""
    return float((batch.counts * (batch.starts + (batch.counts + 1) / 2)).sum())


def linear(batch: Batch) -> float:
    """A whole budget takes 0.26 s at the beginning of a prompt, and as long again behind 2,500 tokens."""
    return 0.005 + 0.0005 * batch.num_tokens + 2e-7 * read(batch)


def idle_at_first(batch: Batch) -> float:
    """A GPU: up to 40 tokens cost nothing beside the weights that must be read."""
    return 0.003 + max(0.02, 0.0005 * batch.num_tokens) + 2e-7 * read(batch)


DEVICE = pytest.mark.parametrize("seconds", [linear, idle_at_first])


class Served:
    """Requests that an engine answers on such a device, and when it did."""

    def __init__(self, seconds: Seconds, steps_ahead: int, max_step_seconds: float = BOUND, **limits: object) -> None:
        sizes = {"page_size": 16, "num_pages": 2000, "max_model_len": 3200, "max_num_sequences": 12}
        self.limits = SchedulerLimits(
            **(sizes | {"max_batched_tokens": BUDGET, "prefix_cache": False} | limits),  # type: ignore[arg-type]
            max_step_seconds=max_step_seconds,
        )
        self.batches: list[Batch] = []
        self.device = TimedRunner(self.limits, lambda batch: (self.batches.append(batch), seconds(batch))[1], VOCAB)
        self.scheduler = Scheduler(self.limits, clock=lambda: self.device.now)
        self.engine = Engine(self.scheduler, self.device, steps_ahead)
        self.prompts: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.times: dict[int, list[float]] = {}  # of each token

    def submit(self, request_id: int, length: int, max_tokens: int) -> None:
        prompt = self.prompts[request_id] = [request_id % VOCAB, *[9] * (length - 1)]
        self.tokens[request_id], self.times[request_id] = [], []
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.engine.submit(Submit(request_id, np.array(prompt, np.int32).tobytes(), sampling, (), "", self.device.now))

    def step(self) -> None:
        for output in self.engine.step():
            for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                self.tokens[request_id].append(token)
                self.times[request_id].append(self.device.now)

    def run(self) -> None:
        while not self.engine.idle:
            self.step()
        for request_id, prompt in self.prompts.items():
            tokens = self.tokens[request_id]
            assert tokens == solo(prompt, len(tokens), (), VOCAB)

    def flood(self, num_prompts: int = 4, length: int = 2500) -> None:
        """A stream decodes; then they come, all at once."""
        self.submit(STREAM, 40, max_tokens=150)
        while not self.times[STREAM]:
            self.step()
        for request_id in range(num_prompts):
            self.submit(request_id, length, max_tokens=2)

    @property
    def gaps(self) -> list[float]:
        """Seconds between two tokens of the stream."""
        return [after - before for before, after in itertools.pairwise(self.times[STREAM])]

    def chunks(self) -> list[int]:
        """Prompt tokens of each step in which somebody decodes."""
        return [int(batch.counts[batch.counts > 1].sum()) for batch in self.batches if (batch.counts == 1).any()]


@AHEAD
@DEVICE
def test_a_stream_keeps_its_pace_beside_long_prompts(seconds: Seconds, steps_ahead: int) -> None:
    bounded = Served(seconds, steps_ahead)
    bounded.flood()
    bounded.run()
    assert max(bounded.gaps) <= 1.25 * BOUND
    beside = [chunk for chunk in bounded.chunks() if chunk]
    assert len(beside) > 100 and np.median(beside) > LEAST_TOKENS, "the time is not used"
    unbounded = Served(seconds, steps_ahead, 0.0)
    unbounded.flood()
    unbounded.run()
    assert max(unbounded.gaps) > 5 * BOUND


@AHEAD
def test_a_chunk_at_the_end_of_a_long_prompt_is_shorter_than_one_at_its_beginning(steps_ahead: int) -> None:
    served = Served(linear, steps_ahead)
    served.flood(num_prompts=1)
    served.run()
    chunks = [chunk for chunk in served.chunks() if chunk]
    assert np.mean(chunks[-6:-1]) < 0.75 * np.mean(chunks[5:10])
    assert all(0.8 * BOUND < gap < 1.25 * BOUND for gap in served.gaps[8 : len(chunks) - 2])


@AHEAD
def test_prompts_alone_have_the_whole_budget(steps_ahead: int) -> None:
    """Nobody waits for a token: steps are as without a bound, to the last."""
    counts = []
    for bound in (BOUND, 0.0):
        served = Served(linear, steps_ahead, bound)
        for request_id in range(5):
            served.submit(request_id, 2500 - request_id, max_tokens=1)
        served.run()
        counts.append([batch.counts.tolist() for batch in served.batches])
    assert counts[0] == counts[1] and sum(counts[0][0]) == BUDGET


@AHEAD
@pytest.mark.parametrize(("times", "bound"), [(4.0, 0.2), (0.25, 0.1)], ids=["slower", "faster"])
def test_the_estimate_follows_a_device_that_changes(steps_ahead: int, times: float, bound: float) -> None:
    changed_at = math.inf
    served = Served(lambda batch: linear(batch) * (times if served.device.now > changed_at else 1), steps_ahead, bound)
    served.flood(num_prompts=10)
    while len(served.times[STREAM]) < 30:
        served.step()
    before, changed_at = served.chunks()[-1], served.device.now
    while len(served.times[STREAM]) < 60:
        served.step()
    assert all(gap <= 1.25 * bound for gap in served.gaps[38:]), "eight steps later the stream has its pace again"
    after = served.chunks()[-1]
    assert after < before / 3 if times > 1 else after > before * 2
    served.run()


@AHEAD
def test_a_step_that_was_held_up_says_little_about_the_next(steps_ahead: int) -> None:
    steps = itertools.count()
    served = Served(lambda batch: linear(batch) * (100 if next(steps) == 30 else 1), steps_ahead)
    served.flood()
    served.run()
    chunks = served.chunks()
    at = 30 - (len(served.batches) - len(chunks))
    assert min(chunks[at : at + 8]) > 0.55 * chunks[at]
    assert min(chunks[at + 8 : at + 20]) > 0.8 * chunks[at]


@AHEAD
def test_nobody_starves_where_no_step_is_short_enough(steps_ahead: int) -> None:
    """Steps have a few prompt tokens at least, a short prompt's and a long one's."""
    served = Served(linear, steps_ahead, 1e-6)
    served.flood(num_prompts=2, length=600)
    served.submit(7, 60, max_tokens=2)
    served.run()
    first = next(at for at, batch in enumerate(served.batches) if 0 in batch.request_ids)
    beside = served.chunks()[first - 1 :]
    last = max(at for at, chunk in enumerate(beside) if chunk)
    assert set(beside[: last - 1]) == {LEAST_TOKENS}
    assert served.times[7][0] < served.times[0][0] / 2, "the short one had its share"
    assert "at least 32" in (TUNABLES["max_step_seconds"].description or "") and LEAST_TOKENS == 32


@AHEAD
def test_short_prompts_and_long_ones_share_the_little_that_there_is(steps_ahead: int) -> None:
    """Of 64 tokens that count as short many come, one after another, each of which needs several steps."""
    served = Served(linear, steps_ahead, max_num_sequences=40)
    served.flood(num_prompts=2)
    for request_id in range(100, 130):
        served.submit(request_id, 64, max_tokens=1)
    while any(not served.times[request_id] for request_id in range(100, 130)):
        served.step()
    long, short = 0, 0
    for batch in served.batches:
        prompts = batch.counts * (batch.counts > 1) * (batch.request_ids != STREAM)
        long += int(prompts[batch.request_ids < 100].sum())
        short += int(prompts[batch.request_ids >= 100].sum())
    assert 0.35 < long / (long + short) < 0.65
    served.run()


@AHEAD
def test_a_prompt_that_starts_behind_what_is_cached_has_a_shorter_chunk(steps_ahead: int) -> None:
    """Its tokens read those before them, whoever has computed these."""
    served = Served(linear, steps_ahead, prefix_cache=True)
    served.submit(0, 2500, max_tokens=1)
    served.run()
    served.flood(num_prompts=0)
    served.prompts[97] = served.prompts[0][:2400] + [5] * 600
    served.tokens[97], served.times[97] = [], []
    sampling = SamplingParams(max_tokens=2, temperature=0.0)
    served.engine.submit(Submit(97, np.array(served.prompts[97], np.int32).tobytes(), sampling, (), "", 0.0))
    served.run()
    first = next(batch for batch in served.batches if 97 in batch.request_ids)
    assert int(first.starts[first.request_ids == 97][0]) == 2400
    assert max(served.gaps) <= 1.25 * BOUND


class EverySecondStep(SchedulerFeature):
    """Leaves the stream out of every second step, as a mask that comes late does."""

    def __init__(self) -> None:
        self._step = 0

    def enter(self, sequence: Sequence, request: Submit) -> bool:
        return request.request_id == STREAM

    def holds_back(self, rows: np.ndarray) -> np.ndarray:
        self._step += 1
        return np.flatnonzero(self.rows.request_id[rows] == STREAM) if self._step % 2 else np.empty(0, np.intp)


def test_a_stream_that_is_left_out_of_a_step_waits_for_its_end_all_the_same() -> None:
    served = Served(linear, 1)
    features, feature = served.scheduler._features, EverySecondStep()
    feature.rows, feature.changes = served.scheduler._running.table, served.scheduler._running.changes
    features.every, features._num_users = (*features.every, feature), [*features._num_users, 0]
    served.flood()
    served.run()
    assert max(served.gaps) <= 2 * 1.25 * BOUND
    assert np.median(served.gaps[5:60]) > 1.5 * BOUND, "it is not left out"


def test_what_the_start_has_timed_is_expected_of_the_first_step() -> None:
    """Without it there are as few prompt tokens as there may be, until a step is measured."""
    firsts = []
    for timed in (False, True):
        served = Served(linear, 1)
        if timed:
            prompts = Served(linear, 0)
            prompts.submit(0, 600, max_tokens=1)
            prompts.step()
            served.scheduler.expect(prompts.batches[0], linear(prompts.batches[0]))
        served.submit(STREAM, 1, max_tokens=100)
        served.step()
        served.submit(0, 600, max_tokens=1)
        served.step()
        firsts.append(served.chunks()[-1])
        served.run()
        assert max(served.gaps) <= 1.25 * BOUND
    assert firsts[0] == LEAST_TOKENS and 2 * LEAST_TOKENS < firsts[1] <= 100


def batch_parts(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    num_decodes = int(random.integers(0, 40))
    starts = np.append(random.integers(0, 4000, num_decodes), random.integers(0, 60000)).astype(np.int32)
    counts = np.append(np.ones(num_decodes), random.integers(2, 2048)).astype(np.int32)
    return starts, counts


@pytest.mark.parametrize("windows", [(None,), (None, 512), (256,)], ids=str)
def test_the_seconds_of_a_step_are_learnt_from_others(windows: tuple[int | None, ...]) -> None:
    """Of a step, of its tokens, and of those that these read, in the layers that read all and in those with a
    window.
    """

    def seconds(starts: np.ndarray, counts: np.ndarray) -> float:
        reads = 0
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            for window in windows:
                reads += np.minimum(np.arange(start + 1, start + count + 1), window or math.inf).sum() / len(windows)
        return float(0.02 + 3e-5 * counts.sum() + 2e-9 * reads)

    costs, random = PromptCosts(windows), np.random.default_rng(0)
    assert not costs.known
    for _ in range(400):
        starts, counts = batch_parts(random)
        costs.learn(starts, counts, seconds(starts, counts) * float(np.exp(0.05 * random.standard_normal())))
    wrong = []
    for _ in range(100):
        starts, counts = batch_parts(random)
        wrong.append(abs(costs.expected(starts, counts) / seconds(starts, counts) - 1))
    assert costs.known and np.median(wrong) < 0.05 and np.quantile(wrong, 0.9) < 0.2


@pytest.mark.parametrize("times", [2, 10, 1000])
def test_a_first_step_that_was_held_up_is_forgotten(times: int) -> None:
    """What is expected comes nearer with each step, and so has soon come down to what steps take."""
    costs, starts = PromptCosts(), np.zeros(1, np.int32)
    costs.learn(starts, np.array([40], np.int32), times * 0.014)
    for _ in range(25):
        count = max(min(costs.fitting(0.2, 0), 2048), LEAST_TOKENS)
        counts, seconds = np.array([count], np.int32), 0.01 + 1e-4 * count
        before = costs.expected(starts, counts)
        costs.learn(starts, counts, seconds)
        after = costs.expected(starts, counts)
        assert min(before, seconds) < after * 1.000001 and after < max(before, seconds) * 1.000001
    assert 1700 < count < 2000


def test_steps_that_contradict_each_other_leave_numbers_that_can_be_used() -> None:
    """A thousand times few tokens take long and many take none: what was expected of a token became nothing once, and
    what fits into a step no number.
    """
    costs, starts = PromptCosts(), np.zeros(1, np.int32)
    for _ in range(1500):
        for count, seconds in ((2, 0.5), (2048, 0.001)):
            costs.learn(starts, np.array([count], np.int32), seconds)
            assert 0 <= costs.fitting(0.2, 100_000) <= costs.fitting(0.2, 0)
            assert 0 < costs.expected(starts, np.array([count], np.int32)) < math.inf


@pytest.mark.parametrize("windows", [(None,), (None, 512)], ids=str)
@pytest.mark.parametrize("start", [0, 100, 100_000])
def test_what_fits_fits_and_little_more_would(windows: tuple[int | None, ...], start: int) -> None:
    costs = PromptCosts(windows)
    costs.learn(np.array([0], np.int32), np.array([2048], np.int32), 0.06)
    for seconds in (0.001, 0.05, 0.3):
        count = costs.fitting(seconds, start)
        assert costs.more(start, count) <= seconds < costs.more(start, int(count * 1.1) + 2)


def test_a_budget_is_taken_once() -> None:
    costs = PromptCosts()
    costs.learn(np.array([0], np.int32), np.array([1000], np.int32), 1.0)
    budget = StepBudget(costs, 1000, seconds=0.3, least=8)
    part = budget.split(*budget.half(10**6))
    assert part.seconds == budget.seconds == 0.15 and (part.tokens, budget.tokens) == (500, 500)
    taken = budget.take(1000, 0)
    assert 150 < taken < 300 and not budget.has_room and budget.take(1, 0) == 0
    assert part.take(10, 0) == 10 and part.has_room
    assert part.take(1000, 10**6) == 1, "it has room: who starts gets a token, however many that reads"
    assert not part.has_room
