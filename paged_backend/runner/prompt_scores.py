"""Log-probabilities of prompts' tokens on the device: the logits of many of a step's tokens, which a plain step does
not compute.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from paged_backend.arrays import Int32, floats
from paged_backend.batch import Batch, PromptScores, PromptScoring, ScoredPrompts
from paged_backend.runner.asks import AskRoom, ComputedStep
from paged_backend.runner.step_plan import StepPlan


class PromptRoom(AskRoom):
    """The tokens of all spans lie end to end, in their order."""

    captured = False

    def sections(self, ask: PromptScoring, batch: Batch, plan: StepPlan) -> dict[str, Int32]:
        """int32 [3, k]: which token of the step, and the row and position of the one after it."""
        columns = []
        for span in ask.spans:
            positions = np.arange(span.start, span.start + span.count, dtype=np.int32)
            at = plan.firsts[span.entry] + positions - batch.starts[span.entry]
            columns.append(np.stack([at, np.full_like(positions, batch.rows[span.entry]), positions + 1]))
        return {"prompt_tokens": np.concatenate(columns, axis=1)}

    def compute(self, ask: PromptScoring, step: ComputedStep) -> Tensor:
        """int32 [k, 2 + 2 n]: logprob, rank, top ids, top logprobs."""
        assert step.hidden is not None
        return step.runner.score_prompts(step.hidden, max(span.num_tops for span in ask.spans))

    def answer(self, ask: PromptScoring, columns: Int32) -> ScoredPrompts:
        widest = (columns.shape[1] - 2) // 2
        found = []
        at = 0
        for span in ask.spans:
            part, n = columns[at : at + span.count], span.num_tops
            at += span.count
            found.append(
                PromptScores(
                    floats(part[:, 0]),
                    part[:, 1].copy(),
                    part[:, 2 : 2 + n].copy(),
                    floats(part[:, 2 + widest : 2 + widest + n]),
                )
            )
        return ScoredPrompts(tuple(found))
