"""Beams on the device: the likeliest continuations of some of a step's rows, beside the token that is chosen."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from paged_backend.arrays import Int32, floats
from paged_backend.batch import Batch, BeamCandidates, BeamRows
from paged_backend.runner.asks import AskRoom, ComputedStep
from paged_backend.runner.step_plan import StepPlan


class BeamRoom(AskRoom):
    """The sampler finds them, while it has the logits before and after bans at hand (sampler.py)."""

    def sections(self, ask: BeamRows, batch: Batch, plan: StepPlan) -> dict[str, Int32]:
        return {"beams": plan.first_outputs[ask.sampled].astype(np.int32)}

    def compute(self, ask: BeamRows, step: ComputedStep) -> Tensor | None:
        """int32 [beams, 2 n]: ids, logprobs."""
        return step.sampled.candidates

    def answer(self, ask: BeamRows, columns: Int32) -> BeamCandidates:
        n = columns.shape[1] // 2
        return BeamCandidates(columns[:, :n].copy(), floats(columns[:, n:]))
