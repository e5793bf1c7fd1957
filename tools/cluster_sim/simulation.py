"""The loop: arrivals, ends of steps and news of pages, in the order of their times."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    servers = [SimulatedServer(limits) for _ in range(num_servers)]
    outcome = Outcome()
    numbers = itertools.count()
    queue: list[tuple[float, int, str, Any]] = [
        (request.seconds, next(numbers), "arrival", request) for request in trace
    ]
    heapq.heapify(queue)
    live: dict[int, tuple[Request, Choice]] = {}  # by request id
    news: deque[tuple[int, list[Note]]] = deque()

    def start(number: int, now: float) -> None:
        server = servers[number]
        server.now = now
        batch = server.begin()
        if batch is not None:
            heapq.heappush(queue, (now + cost.seconds(batch), next(numbers), "step", (number, batch)))

    while queue:
        now, serial, kind, what = heapq.heappop(queue)
        outcome.end = now
        if kind == "arrival":
            hashes = block_hashes_of(what.token_ids, limits.page_size)
            choice = router.choose(hashes, len(what.token_ids))
            live[serial] = what, choice
            number = choice.server
            sampling = SamplingParams(max_tokens=what.output_tokens, temperature=0.0, ignore_eos=True)
            servers[number].now = now
            servers[number].scheduler.submit(Submit(serial, what.token_ids.tobytes(), sampling, (), "", now))
            if not servers[number].busy:
                start(number, now)
        elif kind == "news":
            number, notes = news.popleft()
            router.hear(number, servers[number].pages.take(notes))
        else:
            number, batch = what
            server = servers[number]
            server.now = now
            output = server.end(batch)
            for request_id, num_known in output.started.items():
                request, choice = live[request_id]
                outcome.first_seconds.append(now - request.seconds)
                outcome.prompt_tokens += len(request.token_ids)
                outcome.hit_tokens += num_known
                router.begun(choice)
            outcome.output_tokens += len(output.request_ids)
            for finish in output.finishes:
                assert finish.error is None, finish
                request, choice = live.pop(finish.request_id)
                outcome.total_seconds.append(now - request.seconds)
                router.over(choice)
            if server.notes:
                news.append((number, server.notes[:]))
                server.notes.clear()
                heapq.heappush(queue, (now + EVENT_SECONDS, next(numbers), "news", None))
            if server.scheduler.has_work:
                start(number, now)
    assert not live, "a request was never answered"
    return outcome
