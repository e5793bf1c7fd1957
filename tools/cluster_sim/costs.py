"""What a step of an engine takes, by what it computes. Each figure is measured, or solved for from measured ones, as
said beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from paged_backend.batch import Batch


@dataclass(frozen=True)
class StepCost:
    """Seconds: of any step, of each prompt token, of each sequence that decodes."""

    step: float
    prompt_token: float
    decoding: float

    def seconds(self, batch: Batch) -> float:
        """A row with one token decodes; rows with more read their prompts."""
        num_decoding = int((batch.counts == 1).sum())
        return self.step + self.prompt_token * (batch.num_tokens - num_decoding) + self.decoding * num_decoding


COSTS = {
    # Llama-3.1-8B on an H100, docs/performance.md: 184.4 tokens/s of one sequence, 18,334 of 256 (4,990 of 32: 6.41 ms
    # a step, and this says 6.46). A prompt token's share is what makes the simulated engine take as long as the
    # measured one (8,491 tokens/s) for the mix of 256 requests: `--fit-mix`.
    "llama-3.1-8b-h100": StepCost(step=5.39e-3, prompt_token=3.765e-5, decoding=3.35e-5),
}
