"""Sequences that want the log-probabilities of their prompts: which tokens of a step must leave their logits, and what is told of them.

A token's log-probability comes from the logits of the token before it, so the whole prompt is computed: pages of others are of use only after a preemption,
for what was told before. The pages of such a prompt can be found by others as any.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.batch import Batch, Feature, PromptSpan, StepResult
from paged_backend.messages import PromptLogprobs
from paged_backend.scheduler.sequence import Rows


def spans(table: Rows, rows: Int32, starts: Int32, counts: Int32) -> tuple[PromptSpan, ...]:
    """Of a step that computes counts[i] tokens of rows[i] from starts[i]. Each token is asked for once: its result will come, whatever becomes of the row."""
    found = []
    for entry in np.flatnonzero(table.features[rows] & Feature.PROMPT_LOGPROBS).tolist():
        runner = table.sequences[rows[entry]]
        assert runner is not None
        sequence = runner.leader
        start, end = max(int(starts[entry]), sequence.unscored), min(int(starts[entry] + counts[entry]), sequence.prompt_len - 1)
        if start < end:
            found.append(PromptSpan(sequence.request_id, entry, start, end - start, sequence.sampling.prompt_logprobs or 0))
            sequence.unscored = end
        if sequence.scored:
            table.features[rows[entry]] &= ~Feature.PROMPT_LOGPROBS
    return tuple(found)


def reported(batch: Batch, result: StepResult, living: Container[int]) -> tuple[PromptLogprobs, ...]:
    """What a step found, for the requests that are not over."""
    return tuple(
        PromptLogprobs(
            request_id=span.request_id,
            start=span.start + 1,
            logprobs=scores.logprobs.tobytes(),
            ranks=scores.ranks.tobytes(),
            top_ids=scores.top_ids.tobytes(),
            top_logprobs=scores.top_logprobs.tobytes(),
        )
        for span, scores in zip(batch.prompts, result.prompts, strict=True)
        if span.request_id in living
    )
