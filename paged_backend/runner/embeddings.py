"""Embeddings on the device: sums of the hidden states of some of a step's tokens, after the final norm."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from paged_backend.arrays import Int32, floats
from paged_backend.batch import Batch, PooledPrompts, Pooling
from paged_backend.runner.asks import AskRoom, ComputedStep
from paged_backend.runner.step_plan import StepPlan


class PoolingRoom(AskRoom):
    """The tokens of all spans lie end to end, in their order."""

    captured = False

    def sections(self, ask: Pooling, batch: Batch, plan: StepPlan) -> dict[str, Int32]:
        """int32 [k]: which token of the step each of them is."""
        firsts = [int(plan.firsts[span.entry]) + span.start - int(batch.starts[span.entry]) for span in ask.spans]
        return {
            "pooled_tokens": np.concatenate(
                [
                    np.arange(first, first + span.count, dtype=np.int32)
                    for first, span in zip(firsts, ask.spans, strict=True)
                ]
            )
        }

    def compute(self, ask: Pooling, step: ComputedStep) -> Tensor:
        """int32 [spans, hidden_size]: the bits of the sums."""
        assert step.hidden is not None
        return step.runner.pool(step.hidden, [span.count for span in ask.spans])

    def answer(self, ask: Pooling, columns: Int32) -> PooledPrompts:
        return PooledPrompts(floats(columns))
