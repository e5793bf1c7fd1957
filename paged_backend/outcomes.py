"""What steps brought: tokens are appended, pages published, and sequences end that met a stop, a limit, a deadline or an error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np

from paged_backend import prompt_logprobs
from paged_backend.batch import Batch, Feature, Int32, StepOutput, StepResult
from paged_backend.beams import Beams
from paged_backend.errors import ErrorKind
from paged_backend.guides import Guides
from paged_backend.living import Living
from paged_backend.request import Finish, Found
from paged_backend.residents import Residents
from paged_backend.sequence import Sequence

_OVERDUE_CHECK_SECONDS = 0.05


class Outcomes:
    """Collects what is to be told until somebody asks. What is told of a request ends with its Finish."""

    def __init__(
        self,
        living: Living,
        residents: Residents,
        guides: Guides,
        beams: Beams,
        max_waiting_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._living = living
        self._residents = residents
        self._guides = guides
        self._beams = beams
        self._max_waiting_seconds = max_waiting_seconds
        self._clock = clock
        self._next_overdue_check = 0.0
        self._finishes: list[Finish] = []
        self._started: dict[int, int] = {}  # request -> how many tokens of its prompt the cache had
        self._found: list[Found] = []

    # ---- ends

    def refuse(self, finish: Finish) -> None:
        """A request that did not become a sequence."""
        self._finishes.append(finish)

    def end(self, ends: Iterable[tuple[Sequence, Finish]]) -> None:
        """Of living sequences."""
        for sequence, finish in ends:
            self._living.leave(sequence)
            self._finishes.append(finish)

    def forget(self, request_id: int) -> None:
        """Nothing more is said of a request."""
        sequence = self._living.by_id.get(request_id)
        if sequence is not None:
            self._living.leave(sequence)
        else:
            self._finishes = [finish for finish in self._finishes if finish.request_id != request_id]

    def end_overdue(self) -> None:
        """Ends requests that waited or lived too long. Looked at now and then: a limit of seconds needs no more."""
        now = self._clock()
        if now < self._next_overdue_check:
            return
        self._next_overdue_check = now + _OVERDUE_CHECK_SECONDS
        for sequence in list(self._living.by_id.values()):
            age = now - sequence.arrival
            if age > sequence.deadline_seconds:
                error, message = ErrorKind.CANCELLED, f"not finished after {sequence.deadline_seconds:g} s (request_deadline_seconds)"
            elif sequence.admitted is None and not sequence.answered and age > self._max_waiting_seconds:
                error, message = ErrorKind.OVERLOADED, f"not started after {self._max_waiting_seconds:g} s (max_waiting_seconds)"
            else:
                continue
            self.end([(sequence, Finish(sequence.request_id, error=error, message=message))])

    @property
    def untold(self) -> bool:
        """Some request has ended, and nobody knows."""
        return bool(self._finishes)

    def without_step(self) -> StepOutput | None:
        """Ends of requests that no step brought: refused, overdue."""
        if not self._finishes:
            return None
        return StepOutput(np.empty(0, np.int64), np.empty(0, np.int32), finishes=self._take_finishes())

    # ---- what a step brought

    def commit(self, batch: Batch, result: StepResult) -> StepOutput:
        """Takes in the token ids of a step."""
        table = self._residents.rows
        rows, request_ids, token_ids = batch.rows[batch.samples], batch.request_ids[batch.samples], result.token_ids
        present = table.request_id[rows] == request_ids
        entries = np.flatnonzero(present & (table.features[rows] & Feature.BEAM == 0))
        tops = self._top_logprobs(result, rows, entries) if batch.features & Feature.TOP_LOGPROBS else {}
        prompts = prompt_logprobs.told(batch, result, self._living.by_id)
        self._append(rows[entries], token_ids[entries])
        for sequence, found in self._beams.take(batch, result):
            self._conclude(sequence, found)
        if len(entries) < len(rows):  # aborted, ended or preempted while the step was in flight
            landed = [entry for entry in np.flatnonzero(~present).tolist() if self._land(int(request_ids[entry]), int(token_ids[entry]))]
            entries = np.concatenate([entries, np.array(landed, np.intp)])
        started, self._started = self._started, {}
        answers, self._found = tuple(self._found), []
        return StepOutput(
            request_ids=request_ids[entries],
            token_ids=token_ids[entries],
            logprobs=None if result.logprobs is None else result.logprobs[entries],
            top_logprobs=tops,
            started=started,
            finishes=self._take_finishes(),
            prompts=prompts,
            found=answers,
        )

    def _append(self, rows: Int32, token_ids: Int32) -> None:
        table = self._residents.rows
        known = table.num_known[rows]
        table.token_ids[rows, known] = token_ids
        known = known + 1
        table.num_known[rows] = known
        for row in rows[table.unanswered[rows]].tolist():
            table.unanswered[row] = False
            self._tell_start(table.sequences[row])
        for row in rows[np.minimum(known, table.num_computed[rows]) >= table.publish_at[rows]].tolist():
            self._residents.publish(row, int(table.num_computed[row]))
        stopped = (table.stop_ids[rows] == token_ids[:, None]).any(axis=1)
        ended = stopped | (known >= table.length_limit[rows])
        for row, token_id, stop in zip(rows[ended].tolist(), token_ids[ended].tolist(), stopped[ended].tolist(), strict=True):
            self._finish(table.sequences[row], token_id, stop)

    def _land(self, request_id: int, token_id: int) -> bool:
        """A token for a sequence that is not on its row any more: kept if the sequence was preempted, dropped if it is over."""
        sequence = self._living.by_id.get(request_id)
        if sequence is None or not sequence.awaits_token:
            return False
        sequence.awaits_token = False
        sequence.token_ids = np.append(sequence.token_ids, np.int32(token_id))
        if not sequence.answered:
            self._tell_start(sequence)
        stop = token_id in sequence.stop_ids
        if stop or len(sequence.token_ids) >= sequence.length_limit:
            self._finish(sequence, token_id, stop)
        else:
            self.end(self._guides.review_waiting([sequence]))
        return True

    def _conclude(self, sequence: Sequence, found: Found | None) -> None:
        """A beam search is over; or it must begin again (None), for want of a page."""
        if found is None:
            self._living.preempt(sequence)
            return
        n = sequence.sampling.n
        if len(found.sequences) < n:
            message = f"n: {n} answers are asked for, and only {len(found.sequences)} are possible with what is banned"
            self.end([(sequence, Finish(sequence.request_id, error=ErrorKind.INVALID, message=message))])
            return
        self._found.append(found)
        self._tell_start(sequence)
        self.end([(sequence, Finish(sequence.request_id, "stop" if found.sequences[0].stopped else "length"))])

    def _tell_start(self, sequence: Sequence | None) -> None:
        assert sequence is not None
        sequence.answered = True
        self._started[sequence.request_id] = sequence.num_cached_tokens

    def _finish(self, sequence: Sequence | None, token_id: int, stop: bool) -> None:
        assert sequence is not None
        self.end([(sequence, self._guides.last_word(sequence, token_id, "stop" if stop else "length"))])

    def _top_logprobs(self, result: StepResult, rows: Int32, entries: Int32) -> dict[int, dict[int, float]]:
        """Output entry → its most likely tokens, for the sequences that asked for them."""
        assert result.top_ids is not None and result.top_logprobs is not None
        tops = {}
        for position, entry in enumerate(entries.tolist()):
            sequence = self._residents.rows.sequences[rows[entry]]
            n = sequence.sampling.logprobs if sequence is not None else None
            if n:
                tops[position] = dict(zip(result.top_ids[entry, :n].tolist(), result.top_logprobs[entry, :n].tolist(), strict=True))
        return tops

    def _take_finishes(self) -> tuple[Finish, ...]:
        finishes, self._finishes = tuple(self._finishes), []
        return finishes
