"""Sequences that want the log-probabilities of their prompts: which tokens of a step must leave their logits, and what
is told of them.

A token's log-probability comes from the logits of the token before it, so the whole prompt is computed: pages of others
are of use only after a preemption, for what was told before. The pages of such a prompt can be found by others as any.
"""

from __future__ import annotations

import numpy as np

from paged_backend.batch import Answer, Ask, Batch, Feature, PromptScoring, PromptSpan, ScoredPrompts
from paged_backend.messages import PromptLogprobs, Submit
from paged_backend.scheduler.features import SchedulerFeature, StepRows, Takings
from paged_backend.scheduler.sequence import Sequence


class PromptLogprobsFeature(SchedulerFeature):
    """Owns how far each prompt's tokens were asked for."""

    asks = PromptScoring

    def __init__(self) -> None:
        self._unscored: dict[Sequence, int] = {}  # position of the first token whose logits are wanted still
        self._by_id: dict[int, Sequence] = {}

    def enter(self, sequence: Sequence, request: Submit) -> bool:
        if sequence.spec.sampling.prompt_logprobs is None or sequence.answered:
            return False
        self._unscored[sequence], self._by_id[sequence.request_id] = 0, sequence
        return True

    def leave(self, sequence: Sequence) -> None:
        del self._unscored[sequence], self._by_id[sequence.request_id]

    def num_reusable(self, sequence: Sequence) -> int:
        return self._unscored[sequence]

    def started(self, sequence: Sequence) -> None:
        if not self._scored(sequence):
            for runner in sequence.runners:
                self.rows.features[runner.row] |= Feature.PROMPT_LOGPROBS

    def ask(self, step: StepRows) -> PromptScoring | None:
        """Each token is asked for once: its result will come, whatever becomes of the row."""
        table, found = self.rows, []
        for entry in np.flatnonzero(table.features[step.rows] & Feature.PROMPT_LOGPROBS).tolist():
            row, start, count = int(step.rows[entry]), int(step.starts[entry]), int(step.counts[entry])
            runner = table.sequences[row]
            assert runner is not None
            sequence = runner.leader
            start, end = max(start, self._unscored[sequence]), min(start + count, sequence.spec.prompt_len - 1)
            if start < end:
                found.append(
                    PromptSpan(
                        sequence.request_id, entry, start, end - start, sequence.spec.sampling.prompt_logprobs or 0
                    )
                )
                self._unscored[sequence] = end
            if self._scored(sequence):
                table.features[row] &= ~Feature.PROMPT_LOGPROBS
        return PromptScoring(tuple(found)) if found else None

    def take(self, batch: Batch, ask: Ask, answer: Answer | None, takings: Takings) -> None:
        """What a step found, for the requests that are not over."""
        assert isinstance(ask, PromptScoring) and isinstance(answer, ScoredPrompts)
        for span, scores in zip(ask.spans, answer.scores, strict=True):
            if span.request_id in self._by_id:
                takings.tell(
                    PromptLogprobs(
                        request_id=span.request_id,
                        start=span.start + 1,
                        logprobs=scores.logprobs.tobytes(),
                        ranks=scores.ranks.tobytes(),
                        top_ids=scores.top_ids.tobytes(),
                        top_logprobs=scores.top_logprobs.tobytes(),
                    )
                )

    def _scored(self, sequence: Sequence) -> bool:
        """No more logits are wanted."""
        return self._unscored[sequence] >= sequence.spec.prompt_len - 1
