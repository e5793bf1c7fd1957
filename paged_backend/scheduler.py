"""Decides what each step computes. Touches no tensor: rows, lengths and page ids go down in a `Batch`, token ids come back in a `StepResult`.

One loop without phases: every sequence has tokens that are not computed yet, one of them while it decodes and many while its prompt is read;
a step is a share-out of `max_batched_tokens` among them. Steps may be scheduled before the results of earlier ones are known: a token that is
still in flight counts as present (`Rows.num_tokens`), only its id is missing, and the device knows it.

    request --intake--> waits --admission--> runs: a row and pages (residents) --outcomes--> over
                          ^                    |
                          +---- preempted -----+          every move: living
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from paged_backend import budget, prompt_logprobs
from paged_backend.adapters import Adapters
from paged_backend.admission import Admission
from paged_backend.batch import Batch, Feature, Int32, StepOutput, StepResult
from paged_backend.beams import Beams
from paged_backend.guides import Guides
from paged_backend.intake import Intake
from paged_backend.limits import SchedulerLimits
from paged_backend.living import Living
from paged_backend.messages import Submit
from paged_backend.outcomes import Outcomes
from paged_backend.page_pool import PagePool
from paged_backend.request import Finish
from paged_backend.residents import Residents
from paged_backend.sequence import NO_BERTH, Sequence
from paged_backend.waiting_queue import WaitingQueue

__all__ = ["Scheduler", "SchedulerLimits"]


class Scheduler:
    """The rooms around a step, and the step itself: who computes how many tokens."""

    def __init__(
        self, limits: SchedulerLimits, clock: Callable[[], float] = time.monotonic, guides: Guides | None = None, adapters: Adapters | None = None
    ) -> None:
        self._limits = limits
        self._guides = guides or Guides()
        self._adapters = adapters or Adapters()
        self._residents = Residents(limits)
        self._beams = Beams(self._residents.rows, self._residents.pages, self._residents.changes)
        self._waiting = WaitingQueue(budget.short_len(limits.max_batched_tokens))
        self._living = Living(self._waiting, self._residents, self._beams, self._adapters)
        self._intake = Intake(limits, self._guides, self._beams)
        self._admission = Admission(limits, self._waiting, self._living, self._residents, self._guides, self._adapters, clock)
        self._outcomes = Outcomes(self._living, self._residents, self._guides, self._beams, limits.max_waiting_seconds, clock)
        self._step = 0

    def tell_of_suspects(self, tell: Callable[[int | None], None]) -> None:
        """`tell` hears of a suspect request before its first step, and None once it is cleared or gone."""
        self._admission.suspects.tell = tell

    def share_running(self, path: Path) -> None:
        """Makes a file of the ids of the requests that run, true at any moment: memory that outlives this process."""
        self._residents.rows.share_request_ids(path)

    # ---- requests come and go

    def submit(self, request: Submit) -> None:
        """Queues a request, or ends it at once with an error that says which limit it met."""
        sequence = self._intake.read(request, len(self._waiting))
        if isinstance(sequence, Finish):
            self._outcomes.refuse(sequence)
        else:
            self._living.add(sequence)

    def abort(self, request_id: int) -> None:
        """Forgets a request and frees its pages; nothing more is said of it. Unknown ids (already over) are fine."""
        self._outcomes.forget(request_id)

    # ---- steps

    def schedule(self) -> Batch | None:
        """The next step, or None if nothing can be computed before a result comes back or a request arrives."""
        self._outcomes.end_overdue()
        self._outcomes.end(self._admission.prepare())
        self._outcomes.end(self._guides.review_running(self._residents.rows))
        rows, counts = self._share_budget()
        rows, counts = self._secure_pages(rows, counts)
        rows, counts = self._admission.admit(rows, counts)
        return self._batch(rows, counts) if len(rows) else None

    def commit(self, batch: Batch, result: StepResult) -> StepOutput:
        """What a step brought: tokens, and requests that started or ended."""
        return self._outcomes.commit(batch, result)

    def refusals(self) -> StepOutput | None:
        """Ends of requests that no step brought: refused, overdue."""
        return self._outcomes.without_step()

    def _share_budget(self) -> tuple[Int32, Int32]:
        """(rows, counts): each decoding sequence gets its one token, the rest of the budget goes to prompts in order of admission, long ones last."""
        rows, table = self._residents.row_numbers, self._residents.rows
        num_tokens = table.num_tokens[rows]
        wanted = num_tokens - table.num_computed[rows]
        wanted[num_tokens >= table.length_limit[rows]] = 0  # its last token is in flight and need not be computed
        wanted[(num_tokens > table.num_known[rows]) & (table.features[rows] & Feature.STEPWISE != 0)] = 0  # what may come next depends on it
        if (wanted == 1).all():
            return rows, wanted
        rows = rows[wanted > 0]
        wanted = wanted[wanted > 0]
        order, counts = budget.share_out(wanted, self._limits.max_batched_tokens, self._admission.short_tokens)
        return rows[order], counts

    def _secure_pages(self, rows: Int32, counts: Int32) -> tuple[Int32, Int32]:
        """Gives every row the pages its tokens need. Who finds none left goes without a step; who is preempted drops out."""
        table = self._residents.rows
        ends = table.num_computed[rows] + counts
        short = ends > table.capacity[rows]
        if not short.any():
            return rows, counts
        stalled = set()
        num_preemptions = self.num_preemptions
        for row, end in zip(rows[short].tolist(), ends[short].tolist(), strict=True):
            runner = table.sequences[row]
            if runner is not None and not self._grow(runner, end):
                stalled.add(row)
        if stalled or self.num_preemptions != num_preemptions:
            keep = np.array([table.sequences[row] is not None and row not in stalled for row in rows.tolist()], np.bool_)
            rows, counts = rows[keep], counts[keep]
        return rows, counts

    def _grow(self, runner: Sequence, num_tokens: int) -> bool:
        """Pages for so many tokens of a runner, at the cost of the youngest others if need be."""
        assert runner.row is not None
        while self._residents.rows.capacity[runner.row] < num_tokens:
            while not self._residents.grow(runner):
                victim = max(self._residents.running, key=Sequence.turn).leader
                if victim is runner.leader:
                    return False  # it keeps what it has and waits: whoever is older will finish
                self._living.preempt(victim)
        return True

    def _batch(self, rows: Int32, counts: Int32) -> Batch:
        """What the device must know; from here on the step's tokens count as computed."""
        table = self._residents.rows
        starts = table.num_computed[rows]
        ends = starts + counts
        samples = ends == table.num_tokens[rows]
        table.num_computed[rows] = ends
        table.num_tokens[rows] += samples
        for row in rows[(counts > 1) & (ends >= table.publish_at[rows])].tolist():  # prompts: their ids are known before they are computed
            self._residents.publish(row, int(table.num_computed[row]))
        self._step += 1
        return Batch(
            step=self._step,
            rows=rows,
            starts=starts,
            counts=counts,
            samples=samples,
            request_ids=table.request_id[rows],
            features=int(np.bitwise_or.reduce(table.features[rows])),
            adapted=self._adapters.in_use and bool((table.berth[rows] != NO_BERTH).any()),
            adapters=self._adapters.arrivals(),
            masks=self._guides.masks(table, rows[samples]),
            prompts=prompt_logprobs.spans(table, rows, starts, counts),
            beams=self._beams.wanted(rows[samples]),
            **self._residents.changes.take(),
        )

    # ---- what it looks like

    @property
    def num_running(self) -> int:
        return len(self._residents.running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_preemptions(self) -> int:
        return self._living.num_preemptions

    @property
    def prefix_queries(self) -> int:
        """Tokens of prompts that started."""
        return self._admission.prefix_queries

    @property
    def prefix_hits(self) -> int:
        """Of them, those whose pages were found."""
        return self._admission.prefix_hits

    def take_queue_times(self) -> list[float]:
        """Seconds from arrival to start, of those that started since the last call."""
        taken, self._admission.queue_times = self._admission.queue_times, []
        return taken

    @property
    def sequences(self) -> list[Sequence]:
        """All of them, oldest first; to be looked at only."""
        return list(self._living.by_id.values())

    def num_tokens(self, sequence: Sequence) -> int:
        """Its known tokens, of prompt and answer; of several answers, the longest."""
        return self._living.num_tokens(sequence)

    @property
    def pool(self) -> PagePool:
        return self._residents.pages.pool

    @property
    def has_work(self) -> bool:
        return bool(self._living.by_id) or self._outcomes.untold

    def live_tokens(self) -> int:
        """Slots of held pages that hold a token; a page shared by several sequences counts once."""
        return self._residents.live_tokens()

    def check(self) -> None:
        """Raises AssertionError if an invariant of any room is broken. O(pages + sequences)."""
        self._living.check()
