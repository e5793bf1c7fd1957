"""Sequences whose answers follow a grammar: which of them may start, which are at their end, and what each may say next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from paged_backend.arrays import Int32, bits
from paged_backend.batch import Feature, TokenMasks
from paged_backend.errors import ErrorKind
from paged_backend.grammar.grammars import Grammars, Guide, Refusal
from paged_backend.messages import Finish
from paged_backend.request import SamplingParams
from paged_backend.scheduler.sequence import Rows
from paged_backend.scheduler.sequence import Sequence as Generation


class Guides:
    """What the scheduler asks about grammars. A sequence with one waits until it is compiled (waiting.py), and then runs only with all its tokens
    known: the mask of the next depends on them."""

    def __init__(self, grammars: Grammars | None = None) -> None:
        self._grammars = grammars or Grammars(None, 0, ())

    def guide(self, sampling: SamplingParams, stop_ids: Sequence[int], allowed: Int32 | None = None) -> Guide | None:
        """For a new sequence; None: it follows no grammar. allowed: int32 [ceil(vocab / 32)], its only tokens."""
        grammar = sampling.grammar
        return None if grammar is None else self._grammars.guide(grammar, stop_ids, sampling.min_tokens, allowed)

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

    def review_waiting(self, changed: Sequence[Generation]) -> Iterator[tuple[Generation, Finish]]:
        """The sequences that cannot go on, or need not. changed: those whose grammar is compiled now, or that got a token after they were preempted."""
        for sequence in changed:
            yield from _ending(sequence, sequence.token_ids)

    def review_running(self, rows: Rows) -> Iterator[tuple[Generation, Finish]]:
        """The same, of those on rows."""
        for row in np.flatnonzero((rows.features & Feature.GUIDED != 0) & (rows.num_tokens > 0)).tolist():
            sequence = rows.sequences[row]
            if sequence is not None:
                yield from _ending(sequence, rows.token_ids[row, : rows.num_known[row]])

    def masks(self, rows: Rows, sampled: Int32) -> TokenMasks | None:
        """sampled: rows that a step samples. None: it may choose any token for each of them."""
        guided = sampled[rows.features[sampled] & Feature.GUIDED != 0]
        if not len(guided):
            return None
        words = []
        for row in guided.tolist():
            sequence = rows.sequences[row]
            assert sequence is not None and sequence.guide is not None
            sequence.guide.follow(rows.token_ids[row, sequence.prompt_len : rows.num_known[row]])
            words.append(sequence.guide.mask)
        return TokenMasks(guided, np.stack(words))

    def last_word(self, sequence: Generation, token_id: int, reason: str) -> Finish:
        """How a sequence ends whose newest token is its last."""
        if sequence.guide is not None:
            sequence.guide.check_last(token_id)
            if sequence.guide.refusal is not None:
                return _refused(sequence, sequence.guide.refusal)
        return Finish(sequence.request_id, reason)


def _ending(sequence: Generation, known: Int32) -> Iterator[tuple[Generation, Finish]]:
    guide = sequence.guide
    if guide is None or not guide.compiled:
        return
    guide.follow(known[sequence.prompt_len :])
    if guide.refusal is not None:
        yield sequence, _refused(sequence, guide.refusal)
    elif guide.over:
        yield sequence, Finish(sequence.request_id, "stop")


def _refused(sequence: Generation, refusal: Refusal) -> Finish:
    return Finish(sequence.request_id, error=refusal.kind, message=refusal.message)
