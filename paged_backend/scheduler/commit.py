"""What steps bring: their token ids reach the sequences, those that met a stop or their limit end, and the callers'
part of it goes out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paged_backend.arrays import Int32, Int64
from paged_backend.batch import Batch, Feature, StepOutput, StepResult
from paged_backend.errors import ErrorKind
from paged_backend.messages import FeatureOutput, Finish, Found
from paged_backend.scheduler.lifecycle import Lifecycle
from paged_backend.scheduler.runs import Runs, end_of
from paged_backend.scheduler.sequence import Sequence
from paged_backend.scheduler.speculation import Speculation


class Commit:
    """Owns what one step's output will say, while its result is taken in."""

    def __init__(self, living: Lifecycle, speculation: Speculation) -> None:
        self._living = living
        self._speculation = speculation
        self._running = living.running
        self._features = living.features
        self._started: dict[int, int] = {}
        self._admitted: dict[int, float] = {}
        self._feature_outputs: list[FeatureOutput] = []
        self._result: StepResult | None = None  # the step's that is taken in
        self._firsts: list[int] | None = None  # entries of its sampled sequences; None: one each

    def commit(self, batch: Batch, result: StepResult) -> StepOutput:
        """Takes in the token ids of a step: appends them, publishes full pages, ends sequences that met a stop or their
        limit.
        """
        table = self._running.table
        rows, request_ids, token_ids = batch.rows[batch.samples], batch.request_ids[batch.samples], result.token_ids
        runs = None
        if batch.drafts is not None and batch.drafts.any:
            runs = Runs(batch.drafts.counts[batch.samples], token_ids)
        self._firsts = None if runs is None else runs.firsts
        present = table.request_id[rows] == request_ids
        chosen = np.flatnonzero(present & (table.features[rows] & Feature.BEAM == 0))
        of_each = request_ids if runs is None else np.repeat(request_ids, runs.lens)
        wanted: dict[int, int] = {}
        if batch.features & Feature.TOP_LOGPROBS:
            wanted = self._num_tops(rows if runs is None else np.repeat(rows, runs.lens), of_each)
        asked = [
            (self._features.asked(ask), ask, answer) for ask, answer in zip(batch.asks, result.answers, strict=True)
        ]
        self._result = result
        for feature, ask, answer in asked:
            feature.take(batch, ask, answer, self)
        if runs is None:
            entries = chosen
            self._append(rows[entries], token_ids[entries])
        else:
            entries = self._append_runs(rows.tolist(), runs, chosen.tolist())
        for feature, ask, answer in asked:
            feature.settle(batch, ask, answer, self)
        if not present.all():  # aborted, ended or preempted while the step was in flight
            landed = [entries]
            for index in np.flatnonzero(~present).tolist():
                run = [int(token_ids[index])] if runs is None else runs.token_ids(index)
                first = index if runs is None else runs.firsts[index]
                landed.append(np.arange(first, first + self._land(int(request_ids[index]), run)))
            entries = np.concatenate(landed)
        started, self._started = self._started, {}
        admitted, self._admitted = self._admitted, {}
        outputs, self._feature_outputs = tuple(self._feature_outputs), []
        return StepOutput(
            request_ids=of_each[entries],
            token_ids=token_ids[entries],
            logprobs=None if result.logprobs is None else result.logprobs[entries],
            ranks=None if result.ranks is None else result.ranks[entries],
            top_logprobs=_top_logprobs(result, entries, wanted) if wanted else {},
            started=started,
            admitted=admitted,
            feature_outputs=outputs,
            finishes=self._living.take_finishes() if self._living.finishes else (),
        )

    def _append(self, rows: Int32, token_ids: Int32) -> None:
        table = self._running.table
        known = self._running.append(rows, token_ids)
        if self._speculation.listens:
            self._speculation.heard(rows.tolist(), known.tolist(), token_ids.tolist())
        for row in rows[table.unanswered[rows]].tolist():
            table.unanswered[row] = False
            self._tell_start(table.sequences[row])
        stopped = (table.stop_ids[rows] == token_ids[:, None]).any(axis=1)
        ended = stopped | (known >= table.length_limit[rows])
        for row, token_id, stop in zip(
            rows[ended].tolist(), token_ids[ended].tolist(), stopped[ended].tolist(), strict=True
        ):
            self._finish(table.sequences[row], token_id, stop)

    def _append_runs(self, rows: list[int], runs: Runs, chosen: list[int]) -> NDArray[np.intp]:
        """As `_append`, where rows, of which a step with drafts has few, may have several tokens: of the chosen ones
        those up to the first stop. Returns their entries.
        """
        table, entries, known, newest = self._running.table, list[int](), list[int](), list[int]()
        for index in chosen:
            row, num_drafts, token_ids = rows[index], runs.num_drafts[index], runs.token_ids(index)
            sequence = table.sequences[row]
            assert sequence is not None
            num_wrong = num_drafts + 1 - len(token_ids)
            if num_drafts:
                self._speculation.note(sequence, num_drafts, len(token_ids) - 1)
            token_ids = token_ids[: end_of(token_ids, sequence.spec.stop_ids)]
            known.append(self._running.append_run(row, token_ids, num_drafts, num_wrong))
            newest.append(token_ids[-1])
            entries += range(runs.firsts[index], runs.firsts[index] + len(token_ids))
            if table.unanswered[row]:
                table.unanswered[row] = False
                self._tell_start(sequence)
            stop = token_ids[-1] in sequence.spec.stop_ids
            if stop or known[-1] >= table.length_limit[row]:
                self._finish(sequence, token_ids[-1], stop)
        if self._speculation.listens:
            self._speculation.heard([rows[index] for index in chosen], known, newest)
        return np.array(entries, np.intp)

    def _land(self, request_id: int, token_ids: list[int]) -> int:
        """Tokens of a step for a sequence that is not on its row any more: kept if the sequence was preempted, dropped
        if it is over. Returns how many are kept: none behind a stop.
        """
        sequence = self._living.find(request_id)
        if sequence is None or not sequence.awaits_token:
            return 0
        sequence.num_awaited -= 1
        token_ids = token_ids[: end_of(token_ids, sequence.spec.stop_ids)]
        sequence.token_ids = np.append(sequence.token_ids, np.array(token_ids, np.int32))
        if not sequence.answered:
            self._tell_start(sequence)
        token_id = token_ids[-1]
        stop = token_id in sequence.spec.stop_ids
        if stop or len(sequence.token_ids) >= sequence.spec.length_limit:
            self._finish(sequence, token_id, stop)
        return len(token_ids)

    # ---- what features have to say (features.py: Takings)

    def tell(self, output: FeatureOutput) -> None:
        self._feature_outputs.append(output)

    def replace_token(self, place: int, token_id: int) -> bool:
        """Its log-probability is that of what is certain."""
        assert self._result is not None
        result = self._result
        place = place if self._firsts is None else self._firsts[place]
        if result.token_ids[place] == token_id:
            return False
        result.token_ids[place] = token_id
        if result.logprobs is not None and result.ranks is not None:
            result.logprobs[place], result.ranks[place] = 0.0, 1
        return True

    def conclude(self, sequence: Sequence, found: Found | None) -> None:
        """A beam search is over; or it must begin again (None), for want of a page."""
        if found is None:
            self._living.preempt(sequence)
            return
        n = sequence.spec.sampling.n
        if len(found.sequences) < n:
            message = f"n: {n} answers are asked for, and only {len(found.sequences)} are possible with what is banned"
            self._living.end(sequence, Finish(sequence.request_id, error=ErrorKind.INVALID, message=message))
            return
        self.tell(found)
        self._tell_start(sequence)
        self._living.end(sequence, Finish(sequence.request_id, "stop" if found.sequences[0].stopped else "length"))

    def _tell_start(self, sequence: Sequence | None) -> None:
        assert sequence is not None
        sequence.answered = True
        self._started[sequence.request_id] = sequence.num_cached_tokens
        if sequence.spec.traced and sequence.admitted is not None:
            self._admitted[sequence.request_id] = sequence.admitted

    def _finish(self, sequence: Sequence | None, token_id: int, stop: bool) -> None:
        assert sequence is not None
        self._living.end(sequence, self._features.last_word(sequence, token_id, "stop" if stop else "length"))

    def _num_tops(self, rows: Int32, request_ids: Int64) -> dict[int, int]:
        """Entry of a step's results -> how many of the most likely tokens its sequence asked for, also one that has
        lost its row.
        """
        table, wanted = self._running.table, {}
        for entry, (row, request_id) in enumerate(zip(rows.tolist(), request_ids.tolist(), strict=True)):
            sequence = table.sequences[row] if table.request_id[row] == request_id else self._living.find(request_id)
            if sequence is not None and sequence.spec.sampling.logprobs:
                wanted[entry] = sequence.spec.sampling.logprobs
        return wanted


def _top_logprobs(result: StepResult, entries: NDArray[np.intp], wanted: dict[int, int]) -> dict[int, dict[int, float]]:
    """Output entry -> its most likely tokens, for the sequences that asked for them."""
    assert result.top_ids is not None and result.top_logprobs is not None
    return {
        position: dict(zip(result.top_ids[entry, :n].tolist(), result.top_logprobs[entry, :n].tolist(), strict=True))
        for position, entry in enumerate(entries.tolist())
        if (n := wanted.get(entry))
    }
