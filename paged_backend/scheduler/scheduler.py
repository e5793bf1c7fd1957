"""Decides what each step computes. Touches no tensor: rows, lengths and page ids go down in a `Batch`, token ids come
back in a `StepResult`.

One loop without phases: every sequence has tokens that are not computed yet, one of them while it decodes and many
while its prompt is read; a step is a share-out of `max_batched_tokens` among them. Steps may be scheduled before the
results of earlier ones are known: a token that is still in flight counts as present (`Rows.num_tokens`), only its id is
missing, and the device knows it.

    Submit -> intake -> lifecycle: waiting -> admission -> running -> Batch
                                                              ^         |
                                     StepOutput <- commit <---+--- StepResult

What only some requests ask for (grammars, adapters, beams, …) hangs off these rooms as features (features.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Listing
from pathlib import Path

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.batch import MOST_DRAFTING, Batch, StepOutput, StepResult
from paged_backend.errors import ErrorKind
from paged_backend.messages import Finish, Submit
from paged_backend.scheduler.adapter_slots import AdapterSlots
from paged_backend.scheduler.admission import Admission
from paged_backend.scheduler.beams import Beams
from paged_backend.scheduler.commit import Commit
from paged_backend.scheduler.deadlines import Deadlines
from paged_backend.scheduler.embeddings import EmbeddingsFeature
from paged_backend.scheduler.fairness import Fairness, short_len
from paged_backend.scheduler.features import LiveFeatures, StepRows
from paged_backend.scheduler.grammar_masks import GrammarMasks
from paged_backend.scheduler.intake import Intake
from paged_backend.scheduler.kv_events import KvEvents
from paged_backend.scheduler.lifecycle import Lifecycle
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.page_pool import PagePool
from paged_backend.scheduler.prompt_logprobs import PromptLogprobsFeature
from paged_backend.scheduler.quarantine import Quarantine
from paged_backend.scheduler.running import RunningSequences
from paged_backend.scheduler.sequence import Sequence
from paged_backend.scheduler.speculation import Speculation
from paged_backend.scheduler.step_costs import StepCosts
from paged_backend.scheduler.thinking_budget import ThinkingBudgets
from paged_backend.scheduler.waiting import WaitingQueue

log = logging.getLogger("paged")


class Scheduler:
    """The rooms that schedule together, and the step that leads through them. Owns nothing but the number of the
    step.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        clock: Callable[[], float] = time.monotonic,
        guides: GrammarMasks | None = None,
        adapters: AdapterSlots | None = None,
    ) -> None:
        self._clock = clock
        self._running = running = RunningSequences(limits)
        self._quarantine = Quarantine()
        guides = guides or GrammarMasks()
        self._costs = costs = StepCosts(limits.num_drafts, limits.windows, every_step=limits.drafts_must_pay)
        self._speculation = Speculation(limits, running, guides, costs.drafts if limits.drafts_must_pay else None)
        every = (
            self._quarantine,
            guides,
            adapters or AdapterSlots(),
            PromptLogprobsFeature(),
            EmbeddingsFeature(),
            ThinkingBudgets(),
            Beams(running),
            self._speculation,
        )
        self._features = LiveFeatures(every, running.table, running.changes)
        self._waiting = waiting = WaitingQueue(short_len(limits.max_batched_tokens), self._quarantine.__contains__)
        self._fairness = Fairness(limits, waiting, running, self._quarantine, costs)
        self._living = Lifecycle(waiting, running, self._features)
        self._intake = Intake(limits, self._features)
        self._admission = Admission(limits, self._living, self._fairness, clock)
        self._deadlines = Deadlines(limits, clock)
        self._commit = Commit(self._living, self._speculation)
        self._step = 0

    # ---- requests come and go

    def submit(self, request: Submit) -> None:
        """Queues a request, or ends it at once with an error that says which limit it met."""
        self._running.table.attend_to(request.request_id)
        try:
            taken: Sequence | Finish = self._intake.take(request, self.num_waiting)
        except Exception as error:  # our fault: it must not end the engine, and the next one that is asked the same
            log.exception("a request could not be taken in")
            taken = Finish(
                request.request_id,
                error=ErrorKind.INTERNAL,
                message=f"the request could not be taken in: {type(error).__name__}",
            )
        if isinstance(taken, Finish):
            self._living.refuse(taken)
        else:
            self._living.enter(taken)
            self._deadlines.enter(taken)
        self._running.table.attend_to(None)

    def abort(self, request_id: int) -> None:
        """Forgets a request and frees its pages; nothing more is said of it. Unknown ids (already over) are fine."""
        self._living.forget(request_id)

    # ---- a step

    def schedule(self) -> Batch | None:
        """The next step, or None if nothing can be computed before a result comes back or a request arrives."""
        living = self._living
        if self._clock() >= self._deadlines.next_check:
            living.end_all(self._deadlines.overdue(living))
        if self._features.active:
            living.end_all(self._admission.review())
            for feature in self._features.active:
                living.end_all(feature.endings_of_running())
        if self._running.releases_pages:
            self._running.release_passed()
        rows, counts = self._computed_by_those_that_run()
        if self._waiting.num_waiting:
            rows, counts = self._admission.admit(rows, counts)
        return self._batch(rows, counts) if len(rows) else None

    def _computed_by_those_that_run(self) -> tuple[Int32, Int32]:
        """(rows, counts) with pages. Rows that cannot get any are skipped, so that others, whose ends bring pages, can
        use the budget.
        """
        rows, counts = self._share_out()
        stalled: list[int] = []
        while (short := self._running.lack_pages(rows, counts)).any():
            shared = rows
            rows, counts = self._living.secure_pages(rows, counts, short)
            if len(rows):
                break
            stalled += shared.tolist()
            rows, counts = self._share_out(stalled)
        return rows, counts

    def _share_out(self, stalled: Listing[int] = ()) -> tuple[Int32, Int32]:
        """(rows, counts): each decoding sequence gets its one token, the rest of the budget goes to prompts in order of
        admission, long ones last.

        stalled: rows that get nothing."""
        rows, counts = self._running.computable()
        for feature in self._features.active:
            counts[feature.holds_back(rows)] = 0
        if stalled:
            counts[np.isin(rows, stalled)] = 0
        if (counts == 1).all():
            return rows, counts
        rows, counts = rows[counts > 0], counts[counts > 0]
        order, counts = self._fairness.share_out(rows, counts)
        return rows[order], counts

    def _batch(self, rows: Int32, counts: Int32) -> Batch:
        table = self._running.table
        speculation = self._speculation
        drafts = speculation.drafts(rows, counts) if speculation.in_use else None
        starts, samples = self._running.advance(rows, counts)
        asks = self._features.asks(StepRows(rows, starts, counts, samples, drafts)) if self._features.active else ()
        if drafts is not None and drafts.any:
            self._running.expect(rows, drafts.counts)
            counts = counts + drafts.counts
        self._step += 1
        batch = Batch(
            step=self._step,
            rows=rows,
            starts=starts,
            counts=counts,
            samples=samples,
            request_ids=table.request_id[rows],
            features=int(np.bitwise_or.reduce(table.features[rows])),
            asks=asks,
            drafts=drafts,
            read=speculation.reads,
            **self._running.changes.take(),
        )
        if self._costs.measures_next or (self._costs.every_step and len(rows) <= MOST_DRAFTING):
            self._costs.begins(batch, self._clock())
        return batch

    def commit(self, batch: Batch, result: StepResult) -> StepOutput:
        """Takes in what a step brought, in the order of steps."""
        if self._costs.begun:
            self._costs.ends(batch, self._clock())
        return self._commit.commit(batch, result)

    def refusals(self) -> StepOutput | None:
        """Ends of requests that no step brought: refused, overdue."""
        if not self._living.finishes:
            return None
        return StepOutput(np.empty(0, np.int64), np.empty(0, np.int32), finishes=self._living.take_finishes())

    # ---- what it looks like

    def tell_of_suspects(self, tell: Callable[[int | None], None]) -> None:
        """`tell` hears of a suspect request before its first step, and None once it is cleared or gone."""
        self._quarantine.tell = tell

    def expect(self, batch: Batch, seconds: float) -> None:
        """Steps with prompts will take as long as this one, which has run before the first request came: what is
        expected until steps are measured that serve requests.
        """
        self._costs.prompts.learn(batch.starts, batch.counts, seconds)

    def record_pages(self, events: KvEvents) -> None:
        """Tells `events` which pages can be found in the prefix cache. Called before the first request."""
        self._running.pages.record(events)

    def share_running(self, path: Path) -> None:
        """Makes a file of the ids of the requests that run, true at any moment: memory that outlives this process."""
        self._running.table.share_request_ids(path)

    @property
    def num_running(self) -> int:
        """Rows that are taken: a beam search has several."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._waiting.num_waiting

    @property
    def sequences(self) -> list[Sequence]:
        """All of them, oldest first; to be looked at only."""
        return list(self._living)

    def num_tokens(self, sequence: Sequence) -> int:
        """Its known tokens, of prompt and answer; of several answers, the longest."""
        return self._living.num_tokens(sequence)

    @property
    def pool(self) -> PagePool:
        return self._running.pages.pool

    @property
    def has_work(self) -> bool:
        return bool(len(self._living) or self._living.finishes)

    def live_tokens(self) -> int:
        """Slots of held pages that hold a token; a page shared by several sequences counts once."""
        return self._running.live_tokens()

    @property
    def num_preemptions(self) -> int:
        return self._living.num_preemptions

    @property
    def prefix_queries(self) -> int:
        return self._admission.prefix_queries

    @property
    def prefix_hits(self) -> int:
        return self._admission.prefix_hits

    @property
    def speculation(self) -> Speculation:
        """Its counts are to be looked at only."""
        return self._speculation

    def take_queue_times(self) -> tuple[float, ...]:
        """Seconds from arrival to admission, of those admitted since the last call."""
        return self._admission.take_queue_times()

    def check(self) -> None:
        """Raises AssertionError if an invariant is broken. O(pages + sequences)."""
        self._living.check()
