"""Sequences whose answers follow a grammar: which of them may start, which are at their end, and what each may say next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from paged_backend.arrays import Int32, bits
from paged_backend.batch import Answer, Ask, Batch, Feature, TokenMasks
from paged_backend.errors import ErrorKind
from paged_backend.grammar.grammars import Grammars
from paged_backend.grammar.guide import Guide
from paged_backend.messages import Finish, Submit
from paged_backend.scheduler.features import SchedulerFeature, StepRows, Takings
from paged_backend.scheduler.sequence import Sequence, Status


class GrammarMasks(SchedulerFeature):
    """Owns each sequence's guide through its grammar. A sequence with one waits until it is compiled (waiting.py), and then runs only with all its tokens
    known: the mask of the next depends on them."""

    asks = TokenMasks

    def __init__(self, grammars: Grammars | None = None) -> None:
        self._grammars = grammars or Grammars(None, 0, ())
        self._follower = self._grammars.follower
        self._guides: dict[Sequence, Guide] = {}

    # ---- a request comes, waits, ends

    def refusal(self, sequence: Sequence) -> tuple[ErrorKind, str] | None:
        """Of allowed tokens one must be left that nothing else can ban, or there might be none to choose. A guide sees to that itself."""
        sampling, allowed = sequence.sampling, sequence.allowed
        if allowed is None:
            return None
        left = allowed & ~bits([word[-1] for word in sequence.bad_words if word[-1] < 32 * len(allowed)], 32 * len(allowed))
        if not left.any():
            return ErrorKind.INVALID, "allowed_token_ids and bad_words: every allowed token may be banned, and then there would be none to choose"
        stop_ids = [token_id for token_id in sequence.stop_ids if token_id < 32 * len(allowed)]
        if sampling.min_tokens > 0 and not (left & ~bits(stop_ids, 32 * len(allowed))).any():
            return ErrorKind.INVALID, f"allowed_token_ids and min_tokens: every allowed token would end the answer before {sampling.min_tokens} tokens"
        return None

    def enter(self, sequence: Sequence, request: Submit) -> bool:
        sampling = sequence.sampling
        if sampling.grammar is None:
            return False
        allowed = np.frombuffer(request.allowed, np.int32) if request.allowed else None
        self._guides[sequence] = self._grammars.guide(sampling.grammar, sequence.stop_ids, sampling.min_tokens, allowed, request.cache_salt)
        return True

    def leave(self, sequence: Sequence) -> None:
        del self._guides[sequence]

    def prepared(self, sequence: Sequence) -> bool:
        """What may come next is known."""
        return not sequence.awaits_token and self._guides[sequence].knows(len(sequence.token_ids) - sequence.prompt_len)

    def prepare(self, sequence: Sequence) -> bool:
        """Its grammar is compiled and what may come next is known; or it never will be."""
        guide = self._guides[sequence]
        if sequence.awaits_token or not guide.compiled:
            return False
        answer = sequence.token_ids[sequence.prompt_len :]
        self._follower.ask(guide, answer)
        return guide.knows(len(answer))

    def last_word(self, sequence: Sequence, token_id: int) -> Finish | None:
        guide = self._guides[sequence]
        guide.check_last(token_id)
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
        """A row whose mask is not known in time is marked: it goes without a step."""
        rows = self.rows
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
                rows.unmasked[row] = not guide.knows(int(rows.num_known[row]) - sequence.prompt_len)
                if not rows.unmasked[row]:
                    yield from _ending(sequence, guide)

    def ask(self, step: StepRows) -> TokenMasks | None:
        """None: every row may sample any token."""
        rows, sampled = self.rows, step.rows[step.samples]
        guided = self._guided(sampled)
        if not len(guided):
            return None
        words = []
        for row in guided.tolist():
            sequence = rows.sequences[row]
            assert sequence is not None
            guide = self._guides[sequence]
            assert guide.knows(int(rows.num_known[row]) - sequence.prompt_len), "a row samples without its mask"
            words.append(guide.mask)
        return TokenMasks(guided, np.stack(words))

    def settle(self, batch: Batch, ask: Ask, answer: Answer | None, takings: Takings) -> None:
        """Has the answers of the step's rows followed: early, so that masks come while others are attended to."""
        sampled = batch.rows[batch.samples]
        present = sampled[self.rows.request_id[sampled] == batch.request_ids[batch.samples]]
        self._follow(self._guided(present))

    def _guided(self, rows: Int32) -> Int32:
        guided: Int32 = rows[self.rows.features[rows] & Feature.GUIDED != 0]
        return guided

    def _follow(self, guided: Int32) -> None:
        """Has the answers on these rows followed, as far as they are known."""
        rows = self.rows
        for row in guided.tolist():
            sequence = rows.sequences[row]
            if sequence is not None:
                self._follower.ask(self._guides[sequence], rows.token_ids[row, sequence.prompt_len : rows.num_known[row]])
        self._follower.collect()

    def check(self, living: Iterable[Sequence]) -> None:
        assert set(self._guides) == {sequence for sequence in living if sequence.sampling.grammar is not None}, "guides without a sequence, or the reverse"


def _ending(sequence: Sequence, guide: Guide) -> Iterator[tuple[Sequence, Finish]]:
    if guide.refusal is not None:
        yield sequence, _refused(sequence, guide)
    elif guide.over:
        yield sequence, Finish(sequence.request_id, "stop")


def _refused(sequence: Sequence, guide: Guide) -> Finish:
    assert guide.refusal is not None
    return Finish(sequence.request_id, error=guide.refusal.kind, message=f"{guide.key}: {guide.refusal.message}")
