"""Decides what each step computes. Touches no tensor: rows, lengths and page ids go down in a `Batch`, token ids come back in a `StepResult`.

One loop without phases: every sequence has tokens that are not computed yet, one of them while it decodes and many while its prompt is read;
a step is a share-out of `max_batched_tokens` among them. Steps may be scheduled before the results of earlier ones are known: a token that is
still in flight counts as present (`Rows.num_tokens`), only its id is missing, and the device knows it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from paged_backend import budget, prompt_logprobs
from paged_backend.adapters import Adapters
from paged_backend.batch import Batch, Feature, Int32, NewRow, StepOutput, StepResult
from paged_backend.beams import Beams
from paged_backend.errors import ErrorKind
from paged_backend.guides import Guides
from paged_backend.messages import Submit
from paged_backend.page_pool import PagePool
from paged_backend.request import Finish, Found
from paged_backend.row_changes import RowChanges
from paged_backend.sequence import NO_BERTH, Rows, Sequence, Status
from paged_backend.sequence_pages import SequencePages
from paged_backend.suspects import Suspects
from paged_backend.waiting_queue import WaitingQueue

_OVERDUE_CHECK_SECONDS = 0.05


@dataclass(frozen=True)
class SchedulerLimits:
    """What the scheduler must know of config, checkpoint and pool."""

    page_size: int
    num_pages: int
    max_model_len: int  # <= num_pages * page_size: the longest sequence alone always fits
    max_num_sequences: int
    max_batched_tokens: int
    max_queue_size: int = 4096
    max_waiting_seconds: float = 600.0
    request_deadline_seconds: float = 3600.0
    prefix_cache: bool = True
    preemption: bool = True
    eos_ids: tuple[int, ...] = ()
    seed: int = 0


class Scheduler:
    """Owns the sequences, their rows and their pages.

    Invariant (`check`): the runners of running sequences hold rows and pages, those of waiting ones neither, and there are no others.
    """

    def __init__(
        self, limits: SchedulerLimits, clock: Callable[[], float] = time.monotonic, guides: Guides | None = None, adapters: Adapters | None = None
    ) -> None:
        # every running sequence must fit into a step, or decoding sequences would wait for each other in turns
        max_running = min(limits.max_num_sequences, limits.max_batched_tokens)
        self._limits = limits
        self._clock = clock
        self._pages = SequencePages(limits.num_pages, limits.page_size)
        self._rows = Rows(max_running, limits.max_model_len, limits.page_size)
        self._sequences: dict[int, Sequence] = {}
        self._waiting = WaitingQueue(budget.short_len(limits.max_batched_tokens))
        self._short_ones_turn = False
        self._running: list[Sequence] = []  # runners
        self._running_rows: Int32 | None = None  # of _running, in its order; None: to be gathered again
        self._finishes: list[Finish] = []  # of requests that ended without a step
        self._started: dict[int, int] = {}
        self._found: list[Found] = []
        self._changes = RowChanges()
        self._beams = Beams(self._rows, self._pages, self._changes)
        self._serial = 0
        self._step = 0
        self._next_overdue_check = 0.0
        self._suspects = Suspects()
        self._guides = guides or Guides()
        self._adapters = adapters or Adapters()
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.queue_times: list[float] = []

    def tell_of_suspects(self, tell: Callable[[int | None], None]) -> None:
        """`tell` hears of a suspect request before its first step, and None once it is cleared or gone."""
        self._suspects.tell = tell

    def share_running(self, path: Path) -> None:
        """Makes a file of the ids of the requests that run, true at any moment: memory that outlives this process."""
        self._rows.share_request_ids(path)

    # ---- requests come and go

    def submit(self, request: Submit) -> None:
        """Queues a request, or ends it at once with an error that says which limit it met."""
        token_ids = np.frombuffer(request.prompt_ids, np.int32)
        sampling = request.sampling
        eos_ids = () if sampling.ignore_eos else self._limits.eos_ids
        stop_ids = tuple(dict.fromkeys(eos_ids + sampling.stop_token_ids))
        allowed = np.frombuffer(request.allowed, np.int32) if request.allowed else None
        prompt_len = len(token_ids) - request.num_answered
        length_limit = min(prompt_len + (sampling.max_tokens or self._limits.max_model_len), self._limits.max_model_len)
        refusal = (
            self._refusal(token_ids, request.resumed)
            or self._guides.refusal(sampling, stop_ids, request.bad_words, allowed)
            or self._beams.refusal(sampling, prompt_len, length_limit)
        )
        if refusal is not None:
            self._finishes.append(Finish(request.request_id, error=refusal[0], message=refusal[1]))
            return
        serial = self._serial = self._serial + 1
        finds = self._limits.prefix_cache and not sampling.skip_prefix_cache
        sequence = Sequence(
            request_id=request.request_id,
            serial=serial,
            token_ids=token_ids,
            prompt_len=prompt_len,
            length_limit=length_limit,
            sampling=sampling,
            seed=self._own_seed(serial) if sampling.seed is None else sampling.seed & (2**64 - 1),
            stop_ids=stop_ids,
            bad_words=request.bad_words,
            cache_salt=f"salt {request.cache_salt}" if finds else f"family {request.family}",
            shares=finds or request.family is not None,
            arrival=request.arrival,
            suspect=request.suspect,
            deadline_seconds=min(sampling.request_deadline_seconds or math.inf, self._limits.request_deadline_seconds),
            answered=request.num_answered > 0,
            guide=self._guides.guide(sampling, stop_ids, allowed),
            allowed=None if sampling.guided else allowed,
        )
        if sampling.prompt_logprobs is not None and not sequence.answered:
            sequence.unscored = 0
        self._beams.enrol(sequence)
        self._sequences[sequence.request_id] = sequence
        self._waiting.add(sequence)

    def abort(self, request_id: int) -> None:
        """Forgets a request and frees its pages; nothing more is said of it. Unknown ids (already over) are fine."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._leave(sequence)
        else:
            self._finishes = [finish for finish in self._finishes if finish.request_id != request_id]

    def _refusal(self, token_ids: Int32, resumed: bool) -> tuple[ErrorKind, str] | None:
        limits = self._limits
        if len(self._waiting) >= limits.max_queue_size and not resumed:
            return ErrorKind.OVERLOADED, f"{len(self._waiting)} requests are waiting, the limit is {limits.max_queue_size} (max_queue_size)"
        if not 0 < len(token_ids) < limits.max_model_len:
            return ErrorKind.INVALID, f"prompt: {len(token_ids)} tokens, expected 1 to {limits.max_model_len - 1} (max_model_len - 1)"
        return None

    def _own_seed(self, serial: int) -> int:
        return int.from_bytes(blake2b(f"{self._limits.seed}/{serial}".encode(), digest_size=8).digest(), "little")

    def _leave(self, sequence: Sequence) -> None:
        """The end of a sequence, whatever it was doing."""
        if sequence.status is Status.RUNNING:
            for runner in sequence.runners:
                self._stop_running(runner)
            sequence.status = Status.FINISHED
        else:
            self._waiting.leave(sequence)
        self._adapters.release(sequence)
        del self._sequences[sequence.request_id]

    def _stop_running(self, runner: Sequence) -> None:
        assert runner.row is not None
        self._changes.drop(runner.row)
        self._rows.vacate(runner)
        self._pages.release(runner)
        self._running.remove(runner)
        self._running_rows = None

    # ---- what the next step computes

    def schedule(self) -> Batch | None:
        """The next step, or None if nothing can be computed before a result comes back or a request arrives."""
        self._end_overdue()
        self._suspects.review(self._rows)
        self._let_in()
        self._end_some(self._guides.review_running(self._rows))
        rows, counts = self._share_budget()
        rows, counts = self._secure_pages(rows, counts)
        rows, counts = self._admit(rows, counts)
        if len(rows) == 0:
            return None
        table = self._rows
        starts = table.num_computed[rows]
        ends = starts + counts
        samples = ends == table.num_tokens[rows]
        table.num_computed[rows] = ends
        table.num_tokens[rows] += samples
        for row in rows[(counts > 1) & (ends >= table.publish_at[rows])].tolist():  # prompts: their ids are known before they are computed
            self._publish(row, int(table.num_computed[row]))
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
            **self._changes.take(),
        )

    def _let_in(self) -> None:
        """Gives those a place in the queue that have got what they waited for, and ends those that never will."""
        self._adapters.collect()
        let_in = self._waiting.let_in(self._is_ready)
        self._end_some(self._guides.review_waiting(let_in))
        self._end_some((sequence, finish) for sequence, finish in self._adapters.refusals() if sequence.status is Status.WAITING)

    def _is_ready(self, sequence: Sequence) -> bool:
        return (sequence.guide is None or sequence.guide.compiled) and self._adapters.take(sequence)

    def _share_budget(self) -> tuple[Int32, Int32]:
        """(rows, counts): each decoding sequence gets its one token, the rest of the budget goes to prompts in order of admission, long ones last."""
        rows = self._gather_running_rows()
        table = self._rows
        num_tokens = table.num_tokens[rows]
        wanted = num_tokens - table.num_computed[rows]
        wanted[num_tokens >= table.length_limit[rows]] = 0  # its last token is in flight and need not be computed
        wanted[(num_tokens > table.num_known[rows]) & (table.features[rows] & Feature.STEPWISE != 0)] = 0  # what may come next depends on it
        if (wanted == 1).all():
            return rows, wanted
        rows = rows[wanted > 0]
        wanted = wanted[wanted > 0]
        order, counts = budget.share_out(wanted, self._limits.max_batched_tokens, self._waiting_short_tokens())
        return rows[order], counts

    def _waiting_short_tokens(self) -> int:
        """Of the short prompts that wait; 0 if the first of them will not start: for want of a row, or pages, or priority."""
        first, short = self._next_to_start(), self._waiting.first_short()
        if first is None or short is None or not self._rows.num_free or short.sampling.priority_level != first.sampling.priority_level:
            return 0
        num_tokens = len(short.token_ids) + (0 if first is short else len(first.token_ids))
        num_pages = num_tokens // self._limits.page_size + 2
        return self._waiting.short_tokens if num_pages + self._headroom() <= self.pool.num_available else 0

    def _gather_running_rows(self) -> Int32:
        if self._running_rows is None:
            self._running_rows = np.array([sequence.row for sequence in self._running], np.int32)
        return self._running_rows

    def _secure_pages(self, rows: Int32, counts: Int32) -> tuple[Int32, Int32]:
        """Gives every row the pages its tokens need. Who finds none left goes without a step; who is preempted drops out."""
        table = self._rows
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
        row = runner.row
        assert row is not None
        while self._rows.capacity[row] < num_tokens:
            page = self._pages.append(runner)
            while page is None:
                victim = max(self._running, key=Sequence.turn).leader
                if victim is runner.leader:
                    return False  # it keeps what it has and waits: whoever is older will finish
                self._preempt(victim)
                page = self._pages.append(runner)
            self._changes.page_updates.append((row, len(runner.pages) - 1, page))
            self._rows.capacity[row] += self._limits.page_size
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's pages; it waits again and recomputes, from the prefix cache where its pages survive."""
        row = sequence.row  # None: its results are not waited for, its runners will be others
        sequence.awaits_token = row is not None and bool(self._rows.num_tokens[row] > self._rows.num_known[row])
        for runner in sequence.runners:
            self._stop_running(runner)
        self._beams.fold(sequence)
        self._waiting.add(sequence)
        self.num_preemptions += 1

    def _admit(self, rows: Int32, counts: Int32) -> tuple[Int32, Int32]:
        """Lets waiting sequences start, oldest first, while rows, budget and pages last. Only a short prompt may overtake, in turns with the oldest."""
        left = self._limits.max_batched_tokens - int(counts.sum())
        kept = budget.kept_for_short(counts, self._limits.max_batched_tokens, self._waiting_short_tokens())
        new_rows: list[int] = []
        new_counts: list[int] = []
        while left > 0:
            sequence, short = self._next_to_start(), self._waiting.first_short()
            if sequence is not short and kept >= left:  # nothing of this step is left for a long one, whose turn it stays
                sequence = short
            if sequence is None or sequence.awaits_token or self._rows.num_free < len(sequence.runners):
                break
            num_tokens = len(sequence.token_ids) if self._limits.preemption else sequence.length_limit - 1
            num_computed = self._pages.take(sequence.runners, num_tokens, self._headroom())
            if num_computed is None:
                break
            self._waiting.pop(sequence)
            if sequence is not short or self._short_ones_turn:
                self._short_ones_turn = sequence is not short and short is not None
            row = self._start_all(sequence, num_computed)
            new_rows.append(row)
            new_counts.append(min(left if sequence is short else left - kept, int(self._rows.num_tokens[row] - self._rows.num_computed[row])))
            left -= new_counts[-1]
            kept -= min(kept, new_counts[-1]) if sequence is short else 0
            self._publish(row, num_computed + new_counts[-1])
        if not new_rows:
            return rows, counts
        return np.concatenate([rows, np.array(new_rows, np.int32)]), np.concatenate([counts, np.array(new_counts, np.int32)])

    def _next_to_start(self) -> Sequence | None:
        """The oldest; or after a long prompt the oldest short one, if it has the same priority: a flood of long prompts does not keep it waiting."""
        first, short = self._waiting.first(suspects=self._suspects.one_may_start), self._waiting.first_short()
        if first is None or short is None or not self._short_ones_turn:
            return first
        return short if short.sampling.priority_level == first.sampling.priority_level else first

    def _headroom(self) -> int:
        """Pages to leave alone at admission: one for each running sequence that will grow, so that a start does not cost a preemption soon."""
        rows = self._gather_running_rows()
        return int((self._rows.capacity[rows] < self._rows.length_limit[rows] - 1).sum())

    def _start_all(self, sequence: Sequence, num_computed: int) -> int:
        """Puts a sequence's runners, which hold their pages, onto rows. Returns that of the first: the others have nothing to compute yet."""
        first, *others = sequence.runners
        row = self._start(first, num_computed)
        for runner in others:
            self._start(runner, 0)
        sequence.status = Status.RUNNING
        if sequence.admitted is None:
            sequence.admitted = self._clock()
            sequence.num_cached_tokens = num_computed
            self.prefix_queries += sequence.prompt_len
            self.prefix_hits += num_computed
            self.queue_times.append(max(0.0, sequence.admitted - sequence.arrival))
        return row

    def _start(self, runner: Sequence, num_computed: int) -> int:
        """The device learns of it with this step's batch."""
        row = self._rows.occupy(runner, num_computed)
        self._running.append(runner)
        self._running_rows = None
        self._suspects.note_start(runner)
        new = NewRow(
            row=row,
            token_ids=runner.token_ids,
            prompt_len=runner.prompt_len,
            sampling=runner.sampling,
            seed=runner.seed,
            stop_ids=runner.stop_ids,
            bad_words=runner.bad_words,
            allowed=runner.allowed,
            berth=runner.berth,
        )
        self._changes.new_rows.append(new)
        self._changes.page_updates.extend((row, index, page) for index, page in enumerate(runner.pages))
        return row

    def _publish(self, row: int, num_computed: int) -> None:
        """Makes a row's pages findable as far as their tokens are known, and computed before or in this step: whoever finds them may use them in the same
        step, because every layer stores all of a step's keys and values before it attends to any."""
        table, size = self._rows, self._limits.page_size
        sequence = table.sequences[row]
        assert sequence is not None
        if num_computed < table.publish_at[row]:
            return
        first = int(table.publish_at[row]) // size - 1
        end = min(num_computed, int(table.num_known[row])) // size
        self._pages.publish(sequence, table.token_ids[row], first, end)
        table.publish_at[row] = (end + 1) * size

    # ---- what a step brought

    def commit(self, batch: Batch, result: StepResult) -> StepOutput:
        """Takes in the token ids of a step: appends them, publishes full pages, ends sequences that met a stop or their limit."""
        rows, request_ids, token_ids = batch.rows[batch.samples], batch.request_ids[batch.samples], result.token_ids
        present = self._rows.request_id[rows] == request_ids
        entries = np.flatnonzero(present & (self._rows.features[rows] & Feature.BEAM == 0))
        tops = self._top_logprobs(result, rows, entries) if batch.features & Feature.TOP_LOGPROBS else {}
        prompts = prompt_logprobs.told(batch, result, self._sequences)
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
            finishes=self._drain_finishes(),
            prompts=prompts,
            found=answers,
        )

    def refusals(self) -> StepOutput | None:
        """Ends of requests that no step brought: refused, overdue."""
        if not self._finishes:
            return None
        return StepOutput(np.empty(0, np.int64), np.empty(0, np.int32), finishes=self._drain_finishes())

    def _append(self, rows: Int32, token_ids: Int32) -> None:
        table = self._rows
        known = table.num_known[rows]
        table.token_ids[rows, known] = token_ids
        known = known + 1
        table.num_known[rows] = known
        for row in rows[table.unanswered[rows]].tolist():
            table.unanswered[row] = False
            self._tell_start(table.sequences[row])
        for row in rows[np.minimum(known, table.num_computed[rows]) >= table.publish_at[rows]].tolist():
            self._publish(row, int(table.num_computed[row]))
        stopped = (table.stop_ids[rows] == token_ids[:, None]).any(axis=1)
        ended = stopped | (known >= table.length_limit[rows])
        for row, token_id, stop in zip(rows[ended].tolist(), token_ids[ended].tolist(), stopped[ended].tolist(), strict=True):
            self._finish(table.sequences[row], token_id, stop)

    def _land(self, request_id: int, token_id: int) -> bool:
        """A token for a sequence that is not on its row any more: kept if the sequence was preempted, dropped if it is over."""
        sequence = self._sequences.get(request_id)
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
            self._end_some(self._guides.review_waiting([sequence]))
        return True

    def _conclude(self, sequence: Sequence, found: Found | None) -> None:
        """A beam search is over; or it must begin again (None), for want of a page."""
        if found is None:
            self._preempt(sequence)
            return
        n = sequence.sampling.n
        if len(found.sequences) < n:
            message = f"n: {n} answers are asked for, and only {len(found.sequences)} are possible with what is banned"
            self._end(sequence, Finish(sequence.request_id, error=ErrorKind.INVALID, message=message))
            return
        self._found.append(found)
        self._tell_start(sequence)
        self._end(sequence, Finish(sequence.request_id, "stop" if found.sequences[0].stopped else "length"))

    def _tell_start(self, sequence: Sequence | None) -> None:
        assert sequence is not None
        sequence.answered = True
        self._started[sequence.request_id] = sequence.num_cached_tokens

    def _finish(self, sequence: Sequence | None, token_id: int, stop: bool) -> None:
        assert sequence is not None
        self._end(sequence, self._guides.last_word(sequence, token_id, "stop" if stop else "length"))

    def _end_some(self, ends: Iterable[tuple[Sequence, Finish]]) -> None:
        for sequence, finish in ends:
            self._end(sequence, finish)

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        self._leave(sequence)
        self._finishes.append(finish)

    def _top_logprobs(self, result: StepResult, rows: Int32, entries: Int32) -> dict[int, dict[int, float]]:
        """Output entry → its most likely tokens, for the sequences that asked for them."""
        assert result.top_ids is not None and result.top_logprobs is not None
        tops = {}
        for position, entry in enumerate(entries.tolist()):
            sequence = self._rows.sequences[rows[entry]]
            n = sequence.sampling.logprobs if sequence is not None else None
            if n:
                tops[position] = dict(zip(result.top_ids[entry, :n].tolist(), result.top_logprobs[entry, :n].tolist(), strict=True))
        return tops

    def _drain_finishes(self) -> tuple[Finish, ...]:
        finishes, self._finishes = tuple(self._finishes), []
        return finishes

    def _end_overdue(self) -> None:
        """Ends requests that waited or lived too long. Looked at now and then: a limit of seconds needs no more."""
        now = self._clock()
        if now < self._next_overdue_check:
            return
        self._next_overdue_check = now + _OVERDUE_CHECK_SECONDS
        limits = self._limits
        for sequence in list(self._sequences.values()):
            age = now - sequence.arrival
            if age > sequence.deadline_seconds:
                error, message = ErrorKind.CANCELLED, f"not finished after {sequence.deadline_seconds:g} s (request_deadline_seconds)"
            elif sequence.admitted is None and not sequence.answered and age > limits.max_waiting_seconds:
                error, message = ErrorKind.OVERLOADED, f"not started after {limits.max_waiting_seconds:g} s (max_waiting_seconds)"
            else:
                continue
            self._end(sequence, Finish(sequence.request_id, error=error, message=message))

    # ---- what it looks like

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def sequences(self) -> list[Sequence]:
        """All of them, oldest first; to be looked at only."""
        return list(self._sequences.values())

    def num_tokens(self, sequence: Sequence) -> int:
        """Its known tokens, of prompt and answer; of several answers, the longest."""
        return max(len(runner.token_ids) if runner.row is None else int(self._rows.num_known[runner.row]) for runner in sequence.runners)

    @property
    def pool(self) -> PagePool:
        return self._pages.pool

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._finishes)

    def live_tokens(self) -> int:
        """Slots of held pages that hold a token; a page shared by several sequences counts once."""
        rows = self._gather_running_rows()
        unused = int((self._rows.capacity[rows] - np.minimum(self._rows.num_computed[rows], self._rows.capacity[rows])).sum())
        return self.pool.num_held * self._limits.page_size - unused

    def check(self) -> None:
        """Raises AssertionError if an invariant is broken. O(pages + sequences)."""
        self._pages.check(self._running)
        self._adapters.check(self._sequences.values())
        for runner in self._running:
            assert runner.leader.status is Status.RUNNING and runner.row is not None and self._rows.sequences[runner.row] is runner
            assert self._rows.capacity[runner.row] == len(runner.pages) * self._limits.page_size
            assert self._rows.num_computed[runner.row] <= self._rows.capacity[runner.row], "computed tokens without a slot"
        waiting = [sequence for sequence in self._sequences.values() if sequence.status is Status.WAITING]
        assert len(waiting) == len(self._waiting)
        assert not any(runner.pages or runner.row is not None for sequence in waiting for runner in sequence.runners)
        running = {id(runner) for runner in self._running}
        expected = {id(runner) for sequence in self._sequences.values() if sequence.status is Status.RUNNING for runner in sequence.runners}
        assert running == expected and len(running) == len(self._running), "a sequence is neither waiting nor running"
