"""Sequences that may choose certain tokens only: those whose answers follow a grammar (which may start, which are at
their end, what each may say next, and behind drafts), and those with a list of allowed tokens, which the device is
told once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from paged_backend.arrays import Int32, bits
from paged_backend.batch import Answer, Ask, Batch, Feature, TokenMasks
from paged_backend.errors import ErrorKind
from paged_backend.grammar.grammars import Grammars
from paged_backend.grammar.guide import Guide
from paged_backend.messages import Finish, Submit
from paged_backend.scheduler.features import SchedulerFeature, StepRows, Takings
from paged_backend.scheduler.sequence import Sequence, Status


class GrammarMasks(SchedulerFeature):
    """Owns each sequence's guide through its grammar. A sequence with one waits until it is compiled (waiting.py), and
    then runs only with all its tokens known: the mask of the next depends on them. Drafts of it are known, too, and
    have been looked at, so that what is sampled behind each has its own mask. A sequence without a grammar may have one
    mask for all its tokens.
    """

    asks = TokenMasks

    def __init__(self, grammars: Grammars | None = None) -> None:
        self._grammars = grammars or Grammars(None, 0, ())
        self._follower = self._grammars.follower
        self._guides: dict[Sequence, Guide] = {}
        self._unmasked: list[int] = []  # rows whose next mask is not known yet
        self._allowed: dict[Sequence, Int32] = {}  # [ceil(vocab / 32)] a bit a token, of sequences without a grammar
        # of a row that has all its tokens known: guesses at the next ones, and how many drafts it may have
        self.guesses: Callable[[int], tuple[Int32, int]] = lambda row: (np.empty(0, np.int32), 0)
        self._started: list[Sequence] = []  # of these, since the step before: the device does not have their masks yet

    # ---- a request comes, waits, ends

    def refusal(self, sequence: Sequence, request: Submit) -> tuple[ErrorKind, str] | None:
        """Of allowed tokens one must be left that nothing else can ban, or there might be none to choose. A guide sees
        to that itself.
        """
        spec, allowed = sequence.spec, _allowed(request)
        sampling = spec.sampling
        if allowed is None or sampling.guided:
            return None
        left = allowed & ~bits([word[-1] for word in spec.bad_words if word[-1] < 32 * len(allowed)], 32 * len(allowed))
        if not left.any():
            return (
                ErrorKind.INVALID,
                "allowed_token_ids and bad_words: every allowed token may be banned, and then there would be "
                "none to choose",
            )
        stop_ids = [token_id for token_id in spec.stop_ids if token_id < 32 * len(allowed)]
        if sampling.min_tokens > 0 and not (left & ~bits(stop_ids, 32 * len(allowed))).any():
            return (
                ErrorKind.INVALID,
                "allowed_token_ids and min_tokens: every allowed token would end the answer before "
                f"{sampling.min_tokens} tokens",
            )
        return None

    def enter(self, sequence: Sequence, request: Submit) -> bool:
        sampling, allowed = sequence.spec.sampling, _allowed(request)
        if sampling.grammar is not None:
            self._guides[sequence] = self._grammars.guide(
                sampling.grammar, sequence.spec.stop_ids, sampling.min_tokens, allowed, request.cache_salt
            )
        elif allowed is not None:
            self._allowed[sequence] = allowed
        return sampling.grammar is not None or allowed is not None

    def started(self, sequence: Sequence) -> None:
        if sequence in self._allowed:
            self._started.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        self._guides.pop(sequence, None)
        self._allowed.pop(sequence, None)

    def prepared(self, sequence: Sequence) -> bool:
        """What may come next is known."""
        guide = self._guides.get(sequence)
        return guide is None or (
            not sequence.awaits_token and guide.knows(len(sequence.token_ids) - sequence.spec.prompt_len)
        )

    def prepare(self, sequence: Sequence) -> bool:
        """Its grammar is compiled and what may come next is known; or it never will be."""
        guide = self._guides.get(sequence)
        if guide is None:
            return True
        if sequence.awaits_token or not guide.compiled:
            return False
        answer = sequence.token_ids[sequence.spec.prompt_len :]
        self._follower.ask(guide, answer)
        return guide.knows(len(answer))

    def last_word(self, sequence: Sequence, token_id: int) -> Finish | None:
        guide = self._guides.get(sequence)
        if guide is None:
            return None
        row = sequence.row
        num_known = len(sequence.token_ids) if row is None else int(self.rows.num_known[row])
        guide.check_last(token_id, num_known - 1 - sequence.spec.prompt_len)
        return None if guide.refusal is None else _refused(sequence, guide)

    # ---- once a step

    def review(self) -> None:
        """Takes in what has become known. Never waits."""
        self._follower.collect()

    def endings(self, let_in: list[Sequence]) -> Iterator[tuple[Sequence, Finish]]:
        for sequence in let_in:
            if sequence in self._guides:
                yield from _ending(sequence, self._guides[sequence])

    def endings_of_running(self) -> Iterator[tuple[Sequence, Finish]]:
        """A row whose mask is not known in time goes without a step."""
        rows, self._unmasked = self.rows, []
        guided = np.array([sequence.row for sequence in self._guides if sequence.status is Status.RUNNING], np.int32)
        if not len(guided):
            return
        guided.sort()
        self._follow(guided)
        self._follower.wait()
        for row in guided.tolist():
            sequence = rows.sequences[row]
            if sequence is not None:
                guide = self._guides[sequence]
                if guide.knows(int(rows.num_known[row]) - sequence.spec.prompt_len):
                    yield from _ending(sequence, guide)
                else:
                    self._unmasked.append(row)

    def holds_back(self, rows: Int32) -> NDArray[np.intp]:
        """Those of a grammar that have a token which is not known, or followed, yet."""
        table = self.rows
        behind = (table.num_tokens[rows] > table.num_known[rows]) | np.isin(rows, self._unmasked)
        return np.flatnonzero(behind & (table.features[rows] & Feature.GUIDED != 0))

    def drafts(self, row: int) -> Int32:
        """Those that a row of a grammar may have in its next step."""
        sequence = self.rows.sequences[row]
        assert sequence is not None
        return self._guides[sequence].drafts

    def ask(self, step: StepRows) -> TokenMasks | None:
        """None: every row may sample any token, or has been given its mask before."""
        rows, num_drafts = self.rows, _drafts_of(step)
        ahead: dict[tuple[int, int], Int32] = {}
        masks = {runner.row: self._allowed[sequence] for sequence in self._started for runner in sequence.runners}
        self._started = []
        for row in self._guided(step.rows[step.samples]).tolist():
            sequence = rows.sequences[row]
            assert sequence is not None
            guide = self._guides[sequence]
            assert guide.knows(int(rows.num_known[row]) - sequence.spec.prompt_len), "a row samples without its mask"
            masks[row] = guide.mask
            ahead |= {(row, place): guide.mask_after(place) for place in range(1, num_drafts.get(row, 0) + 1)}
        if not masks:
            return None
        asked = TokenMasks(np.array(list(masks), np.int32), np.stack(list(masks.values())))
        if ahead:
            asked = replace(asked, ahead=np.array(list(ahead), np.int32), words_ahead=np.stack(list(ahead.values())))
        return asked

    def settle(self, batch: Batch, ask: Ask, answer: Answer | None, takings: Takings) -> None:
        """Has the answers of the step's rows followed: early, so that masks come while others are attended to. Then
        drafts are looked at.
        """
        sampled = batch.rows[batch.samples]
        present = sampled[self.rows.request_id[sampled] == batch.request_ids[batch.samples]]
        guided = self._guided(present)
        self._follow(guided)
        looks = [self._look(row) for row in guided.tolist()]
        if any(looks):
            self._follower.collect()

    def _look(self, row: int) -> bool:
        """Has drafts of a row looked at, if it may have some. Whether it has."""
        sequence = self.rows.sequences[row]
        if sequence is None or not self._guides[sequence].looks:
            return False
        guesses, most = self.guesses(row)
        if most:
            num_answered = int(self.rows.num_known[row]) - sequence.spec.prompt_len
            self._follower.look(self._guides[sequence], num_answered, guesses, most)
        return most > 0

    def _guided(self, rows: Int32) -> Int32:
        guided: Int32 = rows[self.rows.features[rows] & Feature.GUIDED != 0]
        return guided

    def _follow(self, guided: Int32) -> None:
        """Has the answers on these rows followed, as far as they are known."""
        rows = self.rows
        for row in guided.tolist():
            sequence = rows.sequences[row]
            if sequence is not None:
                self._follower.ask(
                    self._guides[sequence], rows.token_ids[row, sequence.spec.prompt_len : rows.num_known[row]]
                )
        self._follower.collect()

    def check(self, living: Iterable[Sequence]) -> None:
        alive = set(living)
        assert set(self._guides) == {sequence for sequence in alive if sequence.spec.sampling.grammar is not None}, (
            "guides without a sequence, or the reverse"
        )
        assert set(self._allowed) <= alive - set(self._guides), (
            "allowed tokens of a sequence that is over, or beside a grammar"
        )


def _drafts_of(step: StepRows) -> dict[int, int]:
    """How many each row has."""
    return {} if step.drafts is None else dict(zip(step.rows.tolist(), step.drafts.counts.tolist(), strict=True))


def _allowed(request: Submit) -> Int32 | None:
    """A bit a token; None: any token."""
    return np.frombuffer(request.allowed, np.int32) if request.allowed else None


def _ending(sequence: Sequence, guide: Guide) -> Iterator[tuple[Sequence, Finish]]:
    if guide.refusal is not None:
        yield sequence, _refused(sequence, guide)
    elif guide.over:
        yield sequence, Finish(sequence.request_id, "stop")


def _refused(sequence: Sequence, guide: Guide) -> Finish:
    assert guide.refusal is not None
    return Finish(sequence.request_id, error=guide.refusal.kind, message=f"{guide.key}: {guide.refusal.message}")
