"""Sequences whose answers follow a grammar: which of them may start, which are at their end, and what each may say next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from paged_backend.batch import Feature, Int32, TokenMasks
from paged_backend.grammar import Grammars, Guide, Refusal
from paged_backend.request import Finish, SamplingParams
from paged_backend.sequence import Rows
from paged_backend.sequence import Sequence as Generation


class Guides:
    """What the scheduler asks about grammars. A sequence with one waits until it is compiled (waiting_queue.py), and then runs only with all its tokens
    known: the mask of the next depends on them."""

    def __init__(self, grammars: Grammars | None = None) -> None:
        self._grammars = grammars or Grammars(None, 0, ())

    def guide(self, sampling: SamplingParams, stop_ids: Sequence[int]) -> Guide | None:
        """For a new sequence; None: it may say anything."""
        grammar = sampling.grammar
        return None if grammar is None else self._grammars.guide(grammar, stop_ids, sampling.min_tokens)

    def review_waiting(self, changed: Sequence[Generation]) -> Iterator[tuple[Generation, Finish]]:
        """The sequences that cannot go on, or need not. changed: those that waited for their grammar, or got a token after they were preempted."""
        for sequence in changed:
            yield from _ending(sequence, sequence.token_ids)

    def review_running(self, rows: Rows) -> Iterator[tuple[Generation, Finish]]:
        """The same, of those on rows."""
        for row in np.flatnonzero((rows.features & Feature.MASK != 0) & (rows.num_tokens > 0)).tolist():
            sequence = rows.sequences[row]
            if sequence is not None:
                yield from _ending(sequence, rows.token_ids[row, : rows.num_known[row]])

    def masks(self, rows: Rows, sampled: Int32) -> TokenMasks | None:
        """sampled: rows that a step samples. None: it may choose any token for each of them."""
        guided = sampled[rows.features[sampled] & Feature.MASK != 0]
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
