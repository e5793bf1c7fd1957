"""Masks of next tokens on the device: they lie in the rows until others come, and the sampler applies them there. Those
behind drafts are the step's.
"""

from __future__ import annotations

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.batch import Batch, TokenMasks
from paged_backend.runner.asks import AskRoom
from paged_backend.runner.step_plan import StepPlan


class MaskRoom(AskRoom):
    """Brings masks to their rows."""

    def sections(self, ask: TokenMasks, batch: Batch, plan: StepPlan) -> dict[str, Int32]:
        """The masks, and where they belong, as spans (step_sections.py)."""
        count, width = ask.words.shape
        places = np.arange(count, dtype=np.int32) * width
        spans = np.stack([ask.rows, np.zeros_like(places), places, np.full_like(places, width)], axis=1)
        sections = {"mask_spans": spans, "masks": ask.words}
        if len(ask.ahead):
            sections |= {"masks_ahead": ask.words_ahead, "outputs_ahead": _outputs_ahead(ask.ahead, batch, plan)}
        return sections


def _outputs_ahead(ahead: Int32, batch: Batch, plan: StepPlan) -> Int32:
    """Of each output the mask behind drafts that is its own; -1: none."""
    firsts = dict(zip(batch.rows[batch.samples].tolist(), plan.first_outputs.tolist(), strict=True))
    outputs = np.full(plan.shape.num_outputs, -1, np.int32)
    for mask, (row, num_before) in enumerate(ahead.tolist()):
        outputs[firsts[row] + num_before] = mask
    return outputs
