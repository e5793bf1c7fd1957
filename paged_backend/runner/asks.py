"""What the device does for a feature: for each kind of ask that a batch may bring, one `AskRoom` in a file of its own.
The table of them is ask_table.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from paged_backend.arrays import Int32
from paged_backend.batch import Answer, Batch
from paged_backend.runner.step_plan import StepPlan

if TYPE_CHECKING:  # those that use the table, which uses this
    from paged_backend.runner.model_runner import ModelRunner
    from paged_backend.runner.transfers import Sampled


@dataclass(frozen=True)
class ComputedStep:
    """A step's forward pass and sampling, launched."""

    runner: ModelRunner
    hidden: Tensor | None  # [T, hidden_size] of every token; None: the step was captured
    sampled: Sampled


class AskRoom:
    """What there may be to do for an ask, in the order of a step. `ask` is of the kind that the table gives to this
    room.
    """

    captured = True  # a captured step, which keeps the logits of its outputs only, can serve it

    def prepare(self, ask: Any, runner: ModelRunner) -> None:
        """Before anything of the step is launched."""

    def sections(self, ask: Any, batch: Batch, plan: StepPlan) -> dict[str, Int32]:
        """What the device has to learn for it, by name: goes there with the step's one copy."""
        return {}

    def compute(self, ask: Any, step: ComputedStep) -> Tensor | None:
        """Launches the rest. int32: what comes back to the host for the answer; None: nothing."""
        return None

    def answer(self, ask: Any, columns: Int32) -> Answer | None:
        """columns: as `compute` left them, in memory that is used again. Called if there are any."""
        return None
