"""The engine: a scheduler, a runner, and a loop that never lets one wait for the other. No process, socket or thread in
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from paged_backend.batch import Batch, StepOutput, StepResult
from paged_backend.messages import Stats, Submit
from paged_backend.scheduler.kv_events import KvEvents
from paged_backend.scheduler.scheduler import Scheduler


class Runner(Protocol):
    """What the engine asks of a model runner (model_runner.py; tests have their own)."""

    def launch(self, batch: Batch) -> None:
        """Starts a step; returns without waiting for the device."""

    def finished(self, keep: int) -> Iterator[tuple[Batch, StepResult]]:
        """The oldest steps with their results, until only `keep` are in flight."""


class Later(Protocol):
    """Work that a start has left for when there is time (runner/later_captures.py)."""

    def advance(self, busy: bool) -> bool:
        """Does a little of it; False if nothing is to be done, or not now. busy: sequences run."""


class Engine:
    """Offline use and tests call `submit`, `step`, `abort` directly; `process.py` puts sockets around it."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        steps_ahead: int,
        kv_events: KvEvents | None = None,
        later: Later | None = None,
    ) -> None:
        """steps_ahead: steps launched before the results of the oldest are read. 1 on a GPU, which computes meanwhile;
        0 on a CPU.
        """
        if kv_events is not None:
            scheduler.record_pages(kv_events)
        self._kv_events = kv_events
        self._num_committed = 0  # steps
        self._scheduler = scheduler
        self._runner = runner
        self._steps_ahead = steps_ahead
        self._later = later
        self.num_steps = 0
        self.stalled = False  # nothing can be computed before a message comes, or a grammar is compiled

    def submit(self, request: Submit) -> None:
        self._scheduler.submit(request)

    def abort(self, request_id: int) -> None:
        self._scheduler.abort(request_id)

    @property
    def idle(self) -> bool:
        return not self._scheduler.has_work

    def step(self) -> list[StepOutput]:
        """Launches the next step, and returns what the steps before it brought."""
        batch = self._scheduler.schedule()
        if batch is not None:
            self._runner.launch(batch)
            self.num_steps += 1
        keep = self._steps_ahead if batch is not None else 0
        outputs = [self._scheduler.commit(done, result) for done, result in self._runner.finished(keep)]
        if self._kv_events is not None:
            self._num_committed += len(outputs)
            self._kv_events.release(self.num_steps, self._num_committed)
        refusals = self._scheduler.refusals()
        self.stalled = batch is None and not outputs
        return [*outputs, refusals] if refusals is not None else outputs

    def use_spare_time(self) -> bool:
        """Between steps, or while there are none: does a little of what the start has left. False: nothing was done."""
        return self._later is not None and self._later.advance(busy=not self.idle)

    def stats(self) -> Stats:
        """The numbers of this moment; takes the queue times gathered since the last call."""
        scheduler = self._scheduler
        return Stats(
            pages_free=scheduler.pool.num_free,
            pages_held=scheduler.pool.num_held,
            pages_cached=scheduler.pool.num_cached,
            live_tokens=scheduler.live_tokens(),
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_preemptions=scheduler.num_preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            num_steps=self.num_steps,
            drafts_proposed=scheduler.speculation.num_proposed,
            drafts_accepted=scheduler.speculation.num_accepted,
            drafts_checked=scheduler.speculation.num_checked,
            queue_times=scheduler.take_queue_times(),
        )

    def check(self) -> None:
        """Raises AssertionError if an invariant is broken."""
        self._scheduler.check()
