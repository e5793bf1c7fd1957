"""The loop: arrivals, ends of steps and news of pages, in the order of their times."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from paged_backend.batch import Batch, StepResult
from paged_backend.block_hashes import block_hashes_of
from paged_backend.engine.findable_pages import FindablePages
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_backend.scheduler.kv_events import KvEvents, Note
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from tools.cluster_sim.costs import StepCost
from tools.cluster_sim.routers import Choice, Router
from tools.cluster_sim.traces import ANSWER_TOKEN, Request

EVENT_SECONDS = 0.005  # from a commit until a router knows of its pages


@dataclass
class Outcome:
    """What came of a trace."""

    prompt_tokens: int = 0
    hit_tokens: int = 0
    first_seconds: list[float] = field(default_factory=list)
    total_seconds: list[float] = field(default_factory=list)
    output_tokens: int = 0
    end: float = 0.0

    def line(self) -> dict[str, float]:
        first = np.array(self.first_seconds) * 1000
        return {
            "hit_share": round(self.hit_tokens / self.prompt_tokens, 3),
            "hit_tokens": self.hit_tokens,
            "first_token_ms_p50": round(float(np.quantile(first, 0.5)), 1),
            "first_token_ms_p90": round(float(np.quantile(first, 0.9)), 1),
            "first_token_ms_p99": round(float(np.quantile(first, 0.99)), 1),
            "total_seconds_mean": round(float(np.mean(self.total_seconds)), 3),
        }


class SimulatedServer:
    """The real scheduler, and no model: every token of an answer is the same."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(limits, clock=lambda: self.now)
        self.notes: list[Note] = []
        events = KvEvents(limits.page_size, self.notes.extend)
        self.scheduler.record_pages(events)
        self._events = events
        self._num_steps = 0
        self.page_size = limits.page_size
        self.pages = FindablePages(limits.page_size)
        self.busy = False

    def begin(self) -> Batch | None:
        batch = self.scheduler.schedule()
        self.busy = batch is not None
        return batch

    def end(self, batch: Batch) -> Any:
        """Commits a step."""
        output = self.scheduler.commit(
            batch,
            StepResult(np.full(int(batch.samples.sum()), ANSWER_TOKEN, np.int32), answers=(None,) * len(batch.asks)),
        )
        self._num_steps += 1
        self._events.release(self._num_steps, self._num_steps)
        self.busy = False
        return output


def simulate(
    trace: Sequence[Request], num_servers: int, router: Router, cost: StepCost, limits: SchedulerLimits
) -> Outcome:
    """Replays a trace."""
    return _Replay(trace, [SimulatedServer(limits) for _ in range(num_servers)], router, cost).run()


class _Replay:
    """Owns the clock: what happens next, and at what time."""

    def __init__(
        self, trace: Sequence[Request], servers: Sequence[SimulatedServer], router: Router, cost: StepCost
    ) -> None:
        self._servers, self._router, self._cost = servers, router, cost
        self._outcome = Outcome()
        self._live: dict[int, tuple[Request, Choice]] = {}  # by request id
        self._serials = itertools.count()  # of what happens at the same time, the first comes first
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        for request_id, request in enumerate(trace):
            self._plan(request.seconds, partial(self._arrive, request_id, request))

    def run(self) -> Outcome:
        while self._queue:
            self._outcome.end, _, happen = heapq.heappop(self._queue)
            happen()
        assert not self._live, "a request was never answered"
        return self._outcome

    @property
    def _now(self) -> float:
        return self._outcome.end

    def _plan(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (seconds, next(self._serials), happen))

    def _arrive(self, request_id: int, request: Request) -> None:
        hashes = block_hashes_of(request.token_ids, self._servers[0].page_size)
        choice = self._router.choose(hashes, len(request.token_ids))
        self._live[request_id] = request, choice
        server = self._servers[choice.server]
        server.now = self._now
        sampling = SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
        server.scheduler.submit(Submit(request_id, request.token_ids.tobytes(), sampling, (), "", self._now))
        if not server.busy:
            self._begin_step(choice.server)

    def _begin_step(self, number: int) -> None:
        batch = self._servers[number].begin()
        if batch is not None:
            self._plan(self._now + self._cost.seconds(batch), partial(self._end_step, number, batch))

    def _end_step(self, number: int, batch: Batch) -> None:
        server, outcome = self._servers[number], self._outcome
        server.now = self._now
        output = server.end(batch)
        for request_id, num_known in output.started.items():
            request, choice = self._live[request_id]
            outcome.first_seconds.append(self._now - request.seconds)
            outcome.prompt_tokens += len(request.token_ids)
            outcome.hit_tokens += num_known
            self._router.begun(choice)
        outcome.output_tokens += len(output.request_ids)
        for finish in output.finishes:
            assert finish.error is None, finish
            request, choice = self._live.pop(finish.request_id)
            outcome.total_seconds.append(self._now - request.seconds)
            self._router.over(choice)
        if server.notes:
            self._plan(self._now + EVENT_SECONDS, partial(self._hear, number, server.notes[:]))
            server.notes.clear()
        if server.scheduler.has_work:
            self._begin_step(number)

    def _hear(self, number: int, notes: list[Note]) -> None:
        """A router knows now of a server's pages."""
        self._router.hear(number, self._servers[number].pages.take(notes))
