"""Beam searches on rows and pages: each beam of a request is a runner with a row and pages of its own, forked from
others as the search decides.

A request's sequence (the leader) waits, is admitted, preempted and ended as one; in its place run `beam_width` runners.
The first computes the prompt, the others hold a row and a page in reserve. When the prompt's result is there, all
become beams: full pages are shared, the last, partial one is copied into the reserve. From then on a beam that goes on
more than once takes over the row and the partial page of one that is dropped, so a fork needs no new page.

    prompt --result--> beams --results of all--> beams ... --> answers
       ^                 |
       +--- preempted ---+   the beams are kept and computed again, once the prompt is
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

import msgspec
import numpy as np
from numpy.typing import NDArray

from paged_backend.arrays import Int32
from paged_backend.batch import Answer, Ask, Batch, BeamCandidates, BeamRows, Feature, TokenEdit
from paged_backend.errors import ErrorKind
from paged_backend.messages import Found, FoundSequence, Submit
from paged_backend.scheduler.beam_search import BeamHypothesis, BeamSearch, Candidates, Fork
from paged_backend.scheduler.features import SchedulerFeature, StepRows, Takings
from paged_backend.scheduler.prefix_cache import GONE
from paged_backend.scheduler.running import RunningSequences
from paged_backend.scheduler.sequence import Sequence
from paged_backend.scheduler.sequence_pages import PageTable


@dataclass
class BeamGroup:
    """What a sequence that searches with beams has beside them."""

    search: BeamSearch
    # the runner of each of the search's beams; none: the prompt is not computed yet
    live: list[Sequence] = field(default_factory=list)
    candidates: dict[int, Candidates] = field(default_factory=dict)  # by row, of the runners whose results are in


class Beams(SchedulerFeature):
    """Owns each leader's group."""

    asks = BeamRows

    def __init__(self, running: RunningSequences) -> None:
        self._running = running
        self._pages = running.pages
        self._groups: dict[Sequence, BeamGroup] = {}  # by leader
        self._runner_ids = count(-2, -1)  # of no request; never the same, so that a step's late result finds nobody

    # ---- requests come and go

    def refusal(self, sequence: Sequence, request: Submit) -> tuple[ErrorKind, str] | None:
        """A search that could never run to its end, even alone."""
        spec = sequence.spec
        sampling, prompt_len, length_limit = spec.sampling, spec.prompt_len, spec.length_limit
        width = sampling.beam_width if sampling.use_beam_search else None
        if width is None:
            return None
        max_running = len(self.rows.sequences)
        if width > max_running:
            return (
                ErrorKind.INVALID,
                f"beam_width: {width} beams are more than may run at once: {max_running} (max_num_sequences, "
                "max_batched_tokens)",
            )
        size, num_pages = self.rows.page_size, self._pages.pool.num_pages
        shared = prompt_len // size
        needed = (shared + width * max(-(-(length_limit - 1) // size) - shared, 1)) * len(self._pages.windows)
        if needed > num_pages:
            return (
                ErrorKind.INVALID,
                f"beam_width: {width} beams of up to {length_limit} tokens may need {needed} pages; the pool has "
                f"{num_pages}",
            )
        return None

    def enter(self, sequence: Sequence, request: Submit) -> bool:
        spec, s = sequence.spec, sequence.spec.sampling
        if not s.use_beam_search or s.beam_width is None:
            return False
        max_tokens = spec.length_limit - spec.prompt_len
        self._groups[sequence] = BeamGroup(
            BeamSearch(s.beam_width, spec.stop_ids, max_tokens, s.length_penalty, s.early_stopping)
        )
        sequence.runners = self._make_runners(sequence, s.beam_width)
        return True

    def leave(self, sequence: Sequence) -> None:
        del self._groups[sequence]

    def preempted(self, sequence: Sequence) -> None:
        """It will begin with the prompt again, then go on with the beams it has."""
        group = self._groups[sequence]
        group.live, group.candidates = [], {}
        sequence.runners = self._make_runners(sequence, group.search.width)

    def _make_runners(self, leader: Sequence, width: int) -> list[Sequence]:
        sampling = msgspec.structs.replace(leader.spec.sampling, logprobs=None)  # the search has them
        features = leader.spec.features & ~(Feature.LOGPROBS | Feature.TOP_LOGPROBS)
        runners = []
        for index in range(width):
            spec = replace(leader.spec, request_id=next(self._runner_ids), sampling=sampling, features=features)
            salt, token_ids = (leader.page_table.salt, leader.token_ids) if index == 0 else (None, leader.token_ids[:0])
            runner = Sequence(spec, token_ids, PageTable(salt, len(self._pages.windows)))
            runner.leader, runner.answered = leader, leader.answered
            runners.append(runner)
        return runners

    # ---- steps

    def holds_back(self, rows: Int32) -> NDArray[np.intp]:
        """Beams whose newest token is in flight: what becomes of them depends on the others' results."""
        table = self.rows
        return np.flatnonzero(
            (table.num_tokens[rows] > table.num_known[rows]) & (table.features[rows] & Feature.BEAM != 0)
        )

    def ask(self, step: StepRows) -> BeamRows | None:
        sampled = step.rows[step.samples]
        mine = np.flatnonzero(self.rows.features[sampled] & Feature.BEAM)
        if not len(mine):
            return None
        return BeamRows(
            mine.astype(np.int32), max(self._group_at(row)[1].search.num_candidates for row in sampled[mine].tolist())
        )

    def settle(self, batch: Batch, ask: Ask, answer: Answer | None, takings: Takings) -> None:
        """Beams go on, end, or begin again for want of a page."""
        assert isinstance(ask, BeamRows) and isinstance(answer, BeamCandidates)
        for leader, found in self._advanced(batch, ask, answer):
            takings.conclude(leader, found)

    def _advanced(self, batch: Batch, ask: BeamRows, answer: BeamCandidates) -> Iterator[tuple[Sequence, Found | None]]:
        """Yields the sequences that are over, with their answers, and with None those that must begin again.

        Whoever is yielded must have been ended or preempted when the next is asked for.
        """
        rows, request_ids = batch.rows[batch.samples][ask.sampled], batch.request_ids[batch.samples][ask.sampled]
        ready = []
        for entry, (row, request_id) in enumerate(zip(rows.tolist(), request_ids.tolist(), strict=True)):
            if self.rows.request_id[row] != request_id:
                continue  # ended or preempted while the step was in flight
            leader, group = self._group_at(row)
            group.candidates[row] = Candidates(answer.token_ids[entry], answer.logprobs[entry])
            if len(group.candidates) == max(len(group.live), 1):
                ready.append((leader, group))
        for leader, group in ready:
            parents = group.live or leader.runners[:1]
            forks = _next_beams(group, parents)
            if group.search.over:
                yield leader, _found(leader, group.search)
            elif not self._place(leader, group, parents, forks):
                yield leader, None

    # ---- forks

    def _place(self, leader: Sequence, group: BeamGroup, parents: list[Sequence], forks: list[Fork]) -> bool:
        """Gives every next beam a runner. parents: the runners that forks refer to. False: a reserve is missing,
        nothing has changed.
        """
        num_computed = int(self.rows.num_computed[parents[0].row])
        num_full, is_partial = divmod(num_computed, self.rows.page_size)
        kept = {fork.parent: fork for fork in reversed(forks)}  # the first of each parent stays where it is
        moved = [fork for fork in forks if kept[fork.parent] is not fork]
        free = [runner for runner in leader.runners if all(runner is not parents[parent] for parent in kept)]
        shared = {id(runner): num_full for runner in parents}  # the pages of the others are all in reserve
        free.sort(key=lambda runner: len(runner.page_table) - shared.get(id(runner), 0), reverse=True)
        takers = free[: len(moved)]
        if is_partial and any(len(runner.page_table) <= shared.get(id(runner), 0) for runner in takers):
            return False
        group.live = [parents[fork.parent] for fork in forks]
        for fork in kept.values():
            self._continue(leader, parents[fork.parent], fork.beam, num_computed)
        for runner, fork in zip(takers, moved, strict=True):
            group.live[next(at for at, other in enumerate(forks) if other is fork)] = runner
            table, source = runner.page_table, parents[fork.parent].page_table
            before = list(table.groups)
            self._pages.share(table, source, num_full, shared.get(id(runner), 0))
            assert runner.row is not None
            for number, (old, new) in enumerate(zip(before, table.groups, strict=True)):
                changed = (
                    (index, page) for index, page in enumerate(new) if page != GONE and old[index : index + 1] != [page]
                )
                self._running.tell_pages(runner.row, number, changed)
                if is_partial:
                    self.changes.page_copies.append((runner.row, source.groups[number][num_full], new[num_full]))
            self._continue(leader, runner, fork.beam, num_computed)
        for runner in free[len(moved) :]:
            self._pages.share(runner.page_table, runner.page_table, 0, shared.get(id(runner), 0))
            self.rows.rewrite(runner, runner.token_ids[:0], 0)
        return True

    def _continue(self, leader: Sequence, runner: Sequence, beam: BeamHypothesis, num_computed: int) -> None:
        """Puts a beam onto a runner that holds its pages."""
        assert runner.row is not None
        token_ids = np.concatenate([leader.token_ids, beam.token_ids])
        known = self.rows.token_ids_of(runner)
        length = min(len(known), len(token_ids))
        differing = np.flatnonzero(known[:length] != token_ids[:length])
        start = int(differing[0]) if len(differing) else length
        self.changes.token_edits.append(TokenEdit(runner.row, start, token_ids[start:]))
        self.rows.rewrite(runner, token_ids, num_computed)

    def _group_at(self, row: int) -> tuple[Sequence, BeamGroup]:
        runner = self.rows.sequences[row]
        assert runner is not None
        return runner.leader, self._groups[runner.leader]

    def check(self, living: Iterable[Sequence]) -> None:
        assert set(self._groups) == {sequence for sequence in living if sequence.runners != [sequence]}, (
            "beams without a search, or the reverse"
        )


def _next_beams(group: BeamGroup, parents: list[Sequence]) -> list[Fork]:
    """All results of the present beams are in."""
    candidates = [group.candidates[runner.row] for runner in parents if runner.row is not None]
    group.candidates = {}
    search = group.search
    if not group.live and len(search.beams[0].token_ids):  # it was preempted: what follows the prompt is known
        return [Fork(0, beam) for beam in search.beams]
    return search.advance(candidates)


def _found(leader: Sequence, search: BeamSearch) -> Found:
    best = search.endings[: leader.spec.sampling.n]
    return Found(
        leader.request_id,
        tuple(FoundSequence(end.beam.token_ids.tobytes(), end.beam.logprobs.tobytes(), end.stopped) for end in best),
    )
