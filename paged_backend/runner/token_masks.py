"""Masks of next tokens on the device: they lie in the rows until others come, and the sampler applies them there."""

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
        return {"mask_spans": spans, "masks": ask.words}
