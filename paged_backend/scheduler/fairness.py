"""Nobody starves: who starts next, and how a step's tokens are shared out between those that run and those that wait.

The oldest of the lowest priority_level starts next. A flood of long prompts would keep short ones waiting for minutes;
therefore a short one may overtake, but only every second start while both kinds wait, and a part of each step's tokens
is reserved for short prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paged_backend.arrays import Int32
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.quarantine import Quarantine
from paged_backend.scheduler.running import RunningSequences
from paged_backend.scheduler.sequence import Sequence
from paged_backend.scheduler.waiting import WaitingQueue

_SHORT_SHARE = 8  # a prompt is short up to this part of a step's budget


def short_len(budget: int) -> int:
    """The longest prompt that counts as short, in tokens: it need not wait behind long ones."""
    return max(1, budget // _SHORT_SHARE)


def reserved_for_short(wanted: Int32, budget: int, waiting_short_tokens: int) -> int:
    """How many tokens of a step are reserved for short prompts that wait: at most half of what decodes leave.

    wanted: [n] tokens that each running sequence could compute.
    """
    return max(0, min((budget - int((wanted == 1).sum())) // 2, waiting_short_tokens))


def share_out(wanted: Int32, budget: int, waiting_short_tokens: int) -> tuple[NDArray[np.intp], Int32]:
    """(order, counts): who computes how much in a step. Decodes first, then what is left of short prompts, then long
    prompts in the order given.

    wanted: [n] tokens each sequence could compute, at least 1. waiting_short_tokens: of short prompts that could start
    in this step, for which some tokens are reserved. Those that get nothing are not in `order`.
    """
    short = short_len(budget)
    order = np.argsort((wanted > 1).astype(np.int8) + (wanted > short), kind="stable")
    wanted = wanted[order]
    reserved = reserved_for_short(wanted, budget, waiting_short_tokens)
    before = np.cumsum(wanted) - wanted
    limits = np.where(wanted > short, budget - reserved, budget)
    counts = np.clip(limits - before, 0, wanted).astype(np.int32)
    return order[counts > 0], counts[counts > 0]


@dataclass
class StartBudget:
    """What is left of a step's tokens for sequences that start in it; `reserved` of them for short prompts."""

    left: int
    reserved: int

    def take(self, wanted: int, is_short: bool) -> int:
        """Returns how many of the tokens that a starting sequence wants it gets, at least 1."""
        count = min(self.left if is_short else self.left - self.reserved, wanted)
        self.left -= count
        if is_short:
            self.reserved -= min(self.reserved, count)
        return count


@dataclass(frozen=True)
class NextStart:
    """A waiting sequence that is to start; `is_short` if it is the oldest short one, `short_waits` if there is any."""

    sequence: Sequence
    is_short: bool
    short_waits: bool


class Fairness:
    """Decides which waiting sequence starts next and what running ones must leave for it; moves nothing. Owns whether
    the next start is a short prompt's.
    """

    def __init__(
        self, limits: SchedulerLimits, waiting: WaitingQueue, running: RunningSequences, quarantine: Quarantine
    ) -> None:
        self._limits = limits
        self._budget = limits.max_batched_tokens
        self._waiting = waiting
        self._running = running
        self._quarantine = quarantine
        self._short_is_next = False

    def share_out(self, wanted: Int32) -> tuple[NDArray[np.intp], Int32]:
        """(order, counts) of the sequences that run; see the function."""
        return share_out(wanted, self._budget, self._startable_short_tokens())

    def start_budget(self, counts: Int32) -> StartBudget:
        """What a step leaves for those that start in it. counts: [n] tokens of each that runs."""
        return StartBudget(
            self._budget - int(counts.sum()),
            reserved_for_short(counts, self._budget, self._startable_short_tokens()),
        )

    def next_start(self, budget: StartBudget) -> NextStart | None:
        """The sequence whose start comes next, if `budget` has a token for one like it; it stays in the queue. None:
        nobody.
        """
        sequence, short = self._first(), self._waiting.first_short()
        if sequence is not short and budget.reserved >= budget.left:
            sequence = short  # nothing of this step is left for a long one, which stays next
        return None if sequence is None else NextStart(sequence, sequence is short, short is not None)

    def started(self, start: NextStart) -> None:
        """After a long prompt's start a short one's comes next, and the other way round."""
        if not start.is_short or self._short_is_next:
            self._short_is_next = not start.is_short and start.short_waits

    def _first(self) -> Sequence | None:
        """The oldest; or after a long prompt the oldest short one, if it has the same priority."""
        first, short = self._waiting.first(suspects=self._quarantine.one_may_start), self._waiting.first_short()
        if first is None or short is None or not self._short_is_next:
            return first
        return short if short.spec.sampling.priority_level == first.spec.sampling.priority_level else first

    def _startable_short_tokens(self) -> int:
        """Tokens of the short prompts that wait; 0 if the first of them will not start, because rows, pages or a lower
        priority_level are wanting.
        """
        first, short = self._first(), self._waiting.first_short()
        if (
            first is None
            or short is None
            or not self._running.table.num_free
            or short.spec.sampling.priority_level != first.spec.sampling.priority_level
        ):
            return 0
        num_tokens = len(short.token_ids) + (0 if first is short else len(first.token_ids))
        num_pages = (num_tokens // self._limits.page_size + 2) * self._limits.num_groups
        has_room = num_pages + self._running.headroom() <= self._running.pages.pool.num_available
        return self._waiting.short_tokens if has_room else 0
