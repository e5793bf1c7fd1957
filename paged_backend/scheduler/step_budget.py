"""What a step has for prompts: tokens, and seconds while somebody decodes.

A sequence that decodes gets its next token at the end of a step, however many prompt tokens the step computes beside
it. So a step with prompts ends within max_step_seconds if it goes as expected (step_costs.py), or else computes few
prompt tokens: prompts must come to an end, too. With nobody who waits for a token, prompts have the whole budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from paged_backend.arrays import Int32
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.running import RunningSequences
from paged_backend.scheduler.step_costs import PromptCosts, StepCosts

LEAST_TOKENS = 32
"""Of prompts in a step, however long they take, so that they come to their end."""


@dataclass
class StepBudget:
    """What a step, or a part of it, has left for prompts."""

    costs: PromptCosts
    tokens: int
    seconds: float = math.inf
    least: int = 0  # tokens that take no notice of the seconds

    @property
    def has_room(self) -> bool:
        return self.tokens > 0 and (self.least > 0 or self.seconds > 0)

    def take(self, wanted: int, start: int) -> int:
        """Returns how many of the tokens that a sequence wants it gets, the first at position `start`: at least 1 if
        there is room. Who gets less than it wants has taken the last.
        """
        if not self.has_room:
            return 0
        count = min(wanted, self.tokens)
        if self.seconds < math.inf:
            fitting = self.costs.fitting(self.seconds, start) if self.seconds > 0 else 0
            count = min(count, max(fitting, self.least, 1))
            self.seconds -= self.costs.more(start, count)
        self.tokens = self.tokens - count if count == wanted else 0
        self.least -= min(self.least, count)
        return count

    def half(self, tokens: int) -> tuple[int, float]:
        """(tokens, seconds) that are half of it at most, and no more than so many tokens at the beginning of prompts
        need.
        """
        tokens = min(self.tokens // 2, tokens)
        return tokens, self.seconds if self.seconds == math.inf else min(self.seconds / 2, self.costs.more(0, tokens))

    def split(self, tokens: int, seconds: float) -> StepBudget:
        """Moves so much of it, as far as it is there, into a budget of its own."""
        tokens, seconds = max(min(self.tokens, tokens), 0), min(self.seconds, seconds)
        part = StepBudget(self.costs, tokens, seconds, min(self.least // 2, tokens))
        self.tokens -= part.tokens
        self.least -= part.least
        if self.seconds < math.inf:
            self.seconds -= part.seconds
        return part


class StepBudgets:
    """Makes the budgets of steps; owns nothing."""

    def __init__(self, limits: SchedulerLimits, running: RunningSequences, costs: StepCosts) -> None:
        self._max_tokens = limits.max_batched_tokens
        self._max_seconds = limits.max_step_seconds
        self._running = running
        self._costs = costs

    def left(self, rows: Int32, counts: Int32) -> StepBudget:
        """What a step has left that computes the next counts[i] tokens of rows[i]."""
        costs = self._costs.prompts
        budget = StepBudget(costs, self._max_tokens - int(counts.sum()))
        if self._max_seconds:
            self._costs.measures_next = True
            if self._somebody_decodes():
                budget.least = max(LEAST_TOKENS - int(counts[counts > 1].sum()), 0)
                budget.seconds = 0.0
                if costs.known:
                    starts = self._running.table.num_computed[rows]
                    budget.seconds = self._max_seconds - costs.expected(starts, counts)
        return budget

    def _somebody_decodes(self) -> bool:
        """Also one that is left out of this step: it waits for its end all the same."""
        _, counts = self._running.computable()
        return bool((counts == 1).any())
