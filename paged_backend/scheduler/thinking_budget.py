"""Sequences that may think for so many tokens: the token that ends thinking takes the place of the one that was sampled
after them.

Where it would go is known from the start: behind `max_thinking_tokens` tokens of the answer. The step that samples
there is asked to be looked at; if thinking is still under way then, its token is replaced when it lands, before anybody
is told, and the device learns of it with the next step. Only for that one token does the row wait until it is known. No
other step, row or token is touched, and the random numbers of what follows are what they always are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paged_backend.arrays import Int32
from paged_backend.batch import Answer, Ask, Batch, LastThoughts, TokenEdit
from paged_backend.messages import Submit
from paged_backend.scheduler.features import SchedulerFeature, StepRows, Takings
from paged_backend.scheduler.sequence import Sequence


@dataclass(frozen=True)
class _Budget:
    """One sequence's."""

    sequence: Sequence
    limit: int  # length of prompt and thoughts: the next token ends them
    end_id: int
    start_ids: tuple[int, ...]  # (): the prompt has begun the thoughts

    def is_thinking(self, answer: Int32) -> bool:
        """answer: its tokens so far."""
        return self.end_id not in answer and _has_run(answer, self.start_ids)


def _has_run(tokens: Int32, run: tuple[int, ...]) -> bool:
    """Whether those tokens follow one another somewhere. An empty run is everywhere."""
    num_places = len(tokens) - len(run) + 1
    found = np.ones(max(num_places, 0), bool)
    for offset, token_id in enumerate(run):
        found &= tokens[offset : offset + num_places] == token_id
    return bool(found.any()) or not run


class ThinkingBudgets(SchedulerFeature):
    """Owns the budgets that are not used up."""

    asks = LastThoughts

    def __init__(self) -> None:
        self._budgets: dict[int, _Budget] = {}  # by request id
        self._unsettled: set[int] = set()  # request ids whose newest token may be replaced when it is known

    def enter(self, sequence: Sequence, request: Submit) -> bool:
        sampling = sequence.spec.sampling
        if sampling.max_thinking_tokens is None or sampling.end_thinking_token_id is None:
            return False
        limit = sequence.spec.prompt_len + sampling.max_thinking_tokens
        self._budgets[sequence.request_id] = _Budget(
            sequence, limit, sampling.end_thinking_token_id, sampling.start_thinking_token_ids
        )
        return True

    def leave(self, sequence: Sequence) -> None:
        del self._budgets[sequence.request_id]
        self._unsettled.discard(sequence.request_id)

    def holds_back(self, rows: Int32) -> NDArray[np.intp]:
        """Rows whose newest token may be replaced, until it is known."""
        return np.flatnonzero(np.isin(self.rows.request_id[rows], list(self._unsettled)))

    def ask(self, step: StepRows) -> LastThoughts | None:
        sampled, table = step.rows[step.samples], self.rows
        found = []
        for place, row in enumerate(sampled.tolist()):
            budget = self._budgets.get(int(table.request_id[row]))
            if budget is not None and table.num_tokens[row] == budget.limit + 1:  # that of this step counts already
                self._unsettled.add(budget.sequence.request_id)
                found.append(place)
        return LastThoughts(tuple(found)) if found else None

    def take(self, batch: Batch, ask: Ask, answer: Answer | None, takings: Takings) -> None:
        assert isinstance(ask, LastThoughts)
        table, rows, request_ids = self.rows, batch.rows[batch.samples], batch.request_ids[batch.samples]
        for place in ask.sampled:
            row, budget = int(rows[place]), self._budgets.get(int(request_ids[place]))
            if budget is None:
                continue
            self._unsettled.discard(budget.sequence.request_id)
            runs = table.request_id[row] == budget.sequence.request_id
            known = table.token_ids_of(budget.sequence) if runs else budget.sequence.token_ids
            if not budget.is_thinking(known[budget.sequence.spec.prompt_len :]) or not takings.replace_token(
                place, budget.end_id
            ):
                continue
            if runs:
                self.changes.token_edits.append(TokenEdit(row, budget.limit, np.array([budget.end_id], np.int32)))
