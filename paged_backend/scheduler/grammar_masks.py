"""Sequences whose answers follow a grammar: which of them may start, which are at their end, and what each may say next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from paged_backend.arrays import Int32, bits
from paged_backend.batch import Feature, TokenMasks
from paged_backend.errors import ErrorKind
from paged_backend.grammar.grammars import Grammars
from paged_backend.grammar.guide import Guide
from paged_backend.messages import Finish
from paged_backend.request import SamplingParams
from paged_backend.scheduler.sequence import Rows
from paged_backend.scheduler.sequence import Sequence as Generation


class GrammarMasks:
    """What the scheduler asks about grammars. A sequence with one waits until it is compiled (waiting.py), and then runs only with all its tokens
    known: the mask of the next depends on them."""

    def __init__(self, grammars: Grammars | None = None) -> None:
        self._grammars = grammars or Grammars(None, 0, ())
        self._follower = self._grammars.follower

    def guide(self, sampling: SamplingParams, stop_ids: Sequence[int], allowed: Int32 | None = None, caller: str = "") -> Guide | None:
        """For a new sequence; None: it follows no grammar. allowed: int32 [ceil(vocab / 32)], its only tokens. caller: whose grammars are compiled in turns
        with others'."""
        grammar = sampling.grammar
        return None if grammar is None else self._grammars.guide(grammar, stop_ids, sampling.min_tokens, allowed, caller)

    def refusal(
        self, sampling: SamplingParams, stop_ids: Sequence[int], bad_words: Sequence[Sequence[int]], allowed: Int32 | None
    ) -> tuple[ErrorKind, str] | None:
        """Of allowed tokens one must be left that nothing else can ban, or there might be none to choose. A guide sees to that itself."""
        if allowed is None or sampling.guided:
            return None
        left = allowed & ~bits([word[-1] for word in bad_words if word[-1] < 32 * len(allowed)], 32 * len(allowed))
        if not left.any():
            return ErrorKind.INVALID, "allowed_token_ids and bad_words: every allowed token may be banned, and then there would be none to choose"
        if sampling.min_tokens > 0 and not (left & ~bits([token_id for token_id in stop_ids if token_id < 32 * len(allowed)], 32 * len(allowed))).any():
            return ErrorKind.INVALID, f"allowed_token_ids and min_tokens: every allowed token would end the answer before {sampling.min_tokens} tokens"
        return None

    def is_ready(self, sequence: Generation) -> bool:
        """A waiting sequence's grammar is compiled and what may come next is known; or it never will be."""
        guide = sequence.guide
        if guide is None:
            return True
        if sequence.awaits_token or not guide.compiled:
            return False
        answer = sequence.token_ids[sequence.prompt_len :]
        self._follower.ask(guide, answer)
        return guide.knows(len(answer))

    def collect(self) -> None:
        """Takes in what has become known. Never waits."""
        self._follower.collect()

    def review_waiting(self, ready: Sequence[Generation]) -> Iterator[tuple[Generation, Finish]]:
        """The sequences that cannot go on, or need not."""
        for sequence in ready:
            yield from _ending(sequence)

    def ask(self, rows: Rows, sampled: Int32) -> None:
        """Has the answers on these rows followed, as far as they are known: early, so that masks come while others are attended to."""
        for row in sampled[rows.features[sampled] & Feature.GUIDED != 0].tolist():
            sequence = rows.sequences[row]
            if sequence is not None and sequence.guide is not None:
                self._follower.ask(sequence.guide, rows.token_ids[row, sequence.prompt_len : rows.num_known[row]])
        self._follower.collect()

    def review_running(self, rows: Rows) -> Iterator[tuple[Generation, Finish]]:
        """Sequences on rows that cannot go on, or need not. A row whose mask is not known in time is marked: it goes without a step."""
        guided = np.flatnonzero((rows.features & Feature.GUIDED != 0) & (rows.num_tokens > 0))
        if not len(guided):
            return
        self.ask(rows, guided)
        self._follower.wait()
        for row in guided.tolist():
            sequence = rows.sequences[row]
            if sequence is not None and sequence.guide is not None:
                rows.unmasked[row] = not sequence.guide.knows(int(rows.num_known[row]) - sequence.prompt_len)
                if not rows.unmasked[row]:
                    yield from _ending(sequence)

    def masks(self, rows: Rows, sampled: Int32) -> TokenMasks | None:
        """sampled: rows that a step samples. None: it may choose any token for each of them."""
        guided = sampled[rows.features[sampled] & Feature.GUIDED != 0]
        if not len(guided):
            return None
        words = []
        for row in guided.tolist():
            sequence = rows.sequences[row]
            assert sequence is not None and sequence.guide is not None
            assert sequence.guide.knows(int(rows.num_known[row]) - sequence.prompt_len), "a row samples without its mask"
            words.append(sequence.guide.mask)
        return TokenMasks(guided, np.stack(words))

    def last_word(self, sequence: Generation, token_id: int, reason: str) -> Finish:
        """How a sequence ends whose newest token is its last."""
        if sequence.guide is not None:
            sequence.guide.check_last(token_id)
            if sequence.guide.refusal is not None:
                return _refused(sequence, sequence.guide)
        return Finish(sequence.request_id, reason)


def _ending(sequence: Generation) -> Iterator[tuple[Generation, Finish]]:
    guide = sequence.guide
    if guide is None:
        return
    if guide.refusal is not None:
        yield sequence, _refused(sequence, guide)
    elif guide.over:
        yield sequence, Finish(sequence.request_id, "stop")


def _refused(sequence: Generation, guide: Guide) -> Finish:
    assert guide.refusal is not None
    return Finish(sequence.request_id, error=guide.refusal.kind, message=f"{guide.key}: {guide.refusal.message}")
