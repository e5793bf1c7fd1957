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
from paged_backend.scheduler.step_budget import StepBudget, StepBudgets
from paged_backend.scheduler.step_costs import StepCosts
from paged_backend.scheduler.waiting import WaitingQueue

_SHORT_SHARE = 8  # a prompt is short up to this part of a step's budget


def short_len(budget: int) -> int:
    """The longest prompt that counts as short, in tokens: it need not wait behind long ones."""
    return max(1, budget // _SHORT_SHARE)


def share_out(
    wanted: Int32, starts: Int32, budget: StepBudget, short: int, waiting_short_tokens: int
) -> tuple[NDArray[np.intp], Int32]:
    """(order, counts): who computes how much in a step. Decodes come first. Half of what they leave is for short
    prompts, those that wait included, and half for long ones in the order given; what one kind does not need the other
    gets.

    wanted: [n] tokens each sequence could compute, at least 1, the first at starts[n]. budget: what decodes leave.
    short: the longest prompt that counts as short. waiting_short_tokens: of short prompts that could start in this
    step, for which some tokens are reserved. Those that get nothing are not in `order`.
    """
    order = np.argsort((wanted > 1).astype(np.int8) + (wanted > short), kind="stable")
    num_decodes, first_long = int((wanted == 1).sum()), int((wanted <= short).sum())
    wants, firsts = wanted[order].tolist(), starts[order].tolist()
    shorts, longs = range(num_decodes, first_long), range(first_long, len(wants))
    counts = np.ones(len(wants), np.int32)
    counts[num_decodes:] = 0
    reserved = budget.split(*budget.half(sum(wants[entry] for entry in shorts) + waiting_short_tokens))
    for entry in shorts:
        counts[entry] = reserved.take(wants[entry], firsts[entry])
    for entry in (*longs, *shorts):
        taken = int(counts[entry])
        counts[entry] += budget.take(wants[entry] - taken, firsts[entry] + taken)
    return order[counts > 0], counts[counts > 0]


@dataclass
class StartBudget:
    """What is left of a step for sequences that start in it, and what of it is reserved for short prompts."""

    free: StepBudget
    reserved: StepBudget

    def take(self, wanted: int, start: int, is_short: bool) -> int:
        """Returns how many of the tokens that a starting sequence wants it gets, the first at position `start`: at
        least 1 if there is room for one like it.
        """
        count = self.reserved.take(wanted, start) if is_short else 0
        return count + self.free.take(wanted - count, start + count)


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
        self,
        limits: SchedulerLimits,
        waiting: WaitingQueue,
        running: RunningSequences,
        quarantine: Quarantine,
        costs: StepCosts,
    ) -> None:
        self._limits = limits
        self._short_len = short_len(limits.max_batched_tokens)
        self._budgets = StepBudgets(limits, running, costs)
        self._waiting = waiting
        self._running = running
        self._quarantine = quarantine
        self._short_is_next = False

    def share_out(self, rows: Int32, wanted: Int32) -> tuple[NDArray[np.intp], Int32]:
        """(order, counts) of the sequences that run; see the function."""
        decodes = wanted == 1
        if decodes.all():
            return np.arange(len(rows)), wanted
        budget = self._budgets.left(rows[decodes], wanted[decodes])
        starts = self._running.table.num_computed[rows]
        return share_out(wanted, starts, budget, self._short_len, self._startable_short_tokens())

    def start_budget(self, rows: Int32, counts: Int32) -> StartBudget:
        """What a step leaves for those that start in it, which computes counts[i] tokens of rows[i] already: for short
        prompts, half of what decodes leave.
        """
        free, decodes = self._budgets.left(rows, counts), counts == 1
        whole = free if decodes.all() else self._budgets.left(rows[decodes], counts[decodes])
        return StartBudget(free, free.split(*whole.half(self._startable_short_tokens())))

    def next_start(self, budget: StartBudget) -> NextStart | None:
        """The sequence whose start comes next, if `budget` has a token for one like it; it stays in the queue. None:
        nobody.
        """
        sequence, short = self._first(), self._waiting.first_short()
        if not budget.free.has_room:
            if not budget.reserved.has_room:
                return None
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
