"""The numbers that bound what the scheduler may let run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerLimits:
    """What the scheduler must know of config, checkpoint and pool."""

    page_size: int
    num_pages: int
    max_model_len: int  # <= num_pages // num_groups * page_size: the longest sequence alone always fits
    max_num_sequences: int
    max_batched_tokens: int
    vocab_size: int = 2**31  # ids below this have an embedding
    max_step_seconds: float = 0.0  # with prompt tokens, while somebody decodes; 0: as long as they take
    max_queue_size: int = 4096
    max_waiting_seconds: float = 600.0
    request_deadline_seconds: float = 3600.0
    prefix_cache: bool = True
    preemption: bool = True
    eos_ids: tuple[int, ...] = ()
    seed: int = 0
    num_drafts: int = 0  # of a row in a step, at most; 0: no speculation
    drafts_from_text: bool = False  # they are copied from the row's own tokens: a text that repeats nothing has none
    drafts_must_pay: bool = False  # it is measured whether steps with drafts bring more tokens a second
    # tokens that each KV group keeps of a sequence, the largest first; None: all
    windows: tuple[int | None, ...] = (None,)

    @property
    def num_groups(self) -> int:
        """Pages that page_size tokens take."""
        return len(self.windows)

    @property
    def max_running(self) -> int:
        """Every running sequence must fit into a step, or decoding sequences would wait for each other in turns."""
        return min(self.max_num_sequences, self.max_batched_tokens)
