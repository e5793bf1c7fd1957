"""Sequences whose prompts become embeddings: which hidden states of a step are part of one, and what they come to.

The last token's state needs that token's step alone, and a prompt's other pages may come from the prefix cache. The
mean needs every token once: pages of others are of use only after a preemption, for what was added up before. Either
way the prompt's own pages can be found by others as any.

The sequence ends as one that generates a single token, which nobody is shown: so a prompt that is embedded waits, runs,
is preempted and is resumed by another engine as every other is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paged_backend.batch import Answer, Ask, Batch, PooledPrompts, PooledSpan, Pooling
from paged_backend.messages import PromptEmbedding, Submit
from paged_backend.scheduler.features import NO_LIMIT, SchedulerFeature, StepRows, Takings
from paged_backend.scheduler.sequence import Sequence


@dataclass
class _Pooled:
    """One prompt on its way to an embedding."""

    sequence: Sequence
    num_asked: int = 0  # of its first tokens, how many steps were asked for, or are not needed
    total: NDArray[np.float64] | None = None  # [hidden_size] sum of the states that steps have brought
    num_added: int = 0

    @property
    def takes_all(self) -> bool:
        return self.sequence.spec.sampling.pooling == "mean"


class EmbeddingsFeature(SchedulerFeature):
    """Owns how far each prompt's states were asked for, and their sums."""

    asks = Pooling

    def __init__(self) -> None:
        self._pooled: dict[int, _Pooled] = {}  # by request id

    def enter(self, sequence: Sequence, request: Submit) -> bool:
        if sequence.spec.sampling.pooling is None or sequence.answered:
            return False
        pooled = self._pooled[sequence.request_id] = _Pooled(sequence)
        pooled.num_asked = 0 if pooled.takes_all else sequence.spec.prompt_len - 1
        return True

    def leave(self, sequence: Sequence) -> None:
        del self._pooled[sequence.request_id]

    def num_reusable(self, sequence: Sequence) -> int:
        pooled = self._pooled[sequence.request_id]
        return pooled.num_asked if pooled.takes_all else NO_LIMIT

    def ask(self, step: StepRows) -> Pooling | None:
        """Each token is asked for once: its result will come, whatever becomes of the row."""
        entries = {row: entry for entry, row in enumerate(step.rows.tolist())}
        spans = []
        for request_id, pooled in self._pooled.items():
            entry = entries.get(-1 if pooled.sequence.row is None else pooled.sequence.row)
            if entry is None:
                continue
            start, end = int(step.starts[entry]), int(step.starts[entry] + step.counts[entry])
            start, end = max(start, pooled.num_asked), min(end, pooled.sequence.spec.prompt_len)
            if start < end:
                spans.append(PooledSpan(request_id, entry, start, end - start))
                pooled.num_asked = end
        return Pooling(tuple(spans)) if spans else None

    def take(self, batch: Batch, ask: Ask, answer: Answer | None, takings: Takings) -> None:
        """Adds up what a step found, for the requests that are not over, and tells of the embeddings that are whole
        with it.
        """
        assert isinstance(ask, Pooling) and isinstance(answer, PooledPrompts)
        for span, states in zip(ask.spans, answer.sums, strict=True):
            pooled = self._pooled.get(span.request_id)
            if pooled is None:
                continue
            pooled.total = states.astype(np.float64) if pooled.total is None else pooled.total + states
            pooled.num_added += span.count
            if span.start + span.count == pooled.sequence.spec.prompt_len:
                values = (pooled.total / pooled.num_added).astype(np.float32)
                takings.tell(PromptEmbedding(span.request_id, values.tobytes()))
