"""How a step's tokens are shared out among the sequences that run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paged_backend.arrays import Int32

_SHORT_SHARE = 8  # a prompt is short up to this part of a step's budget


def short_len(budget: int) -> int:
    """The longest prompt that counts as short, in tokens: it need not wait behind long ones (admission.py)."""
    return max(1, budget // _SHORT_SHARE)


def kept_for_short(wanted: Int32, budget: int, waiting_short_tokens: int) -> int:
    """How many tokens of a step are kept for short prompts that wait: at most half of what decodes leave. wanted: by
    those that run.
    """
    return max(0, min((budget - int((wanted == 1).sum())) // 2, waiting_short_tokens))


def share_out(wanted: Int32, budget: int, waiting_short_tokens: int) -> tuple[NDArray[np.intp], Int32]:
    """(order, counts): who computes how much in a step. Decodes first, then what is left of short prompts, then long
    prompts in the order given.

    wanted: [n] tokens each sequence could compute, at least 1. waiting_short_tokens: of short prompts that could start
    in this step, for whom some tokens are kept. Those that get nothing are not in `order`.
    """
    short = short_len(budget)
    order = np.argsort((wanted > 1).astype(np.int8) + (wanted > short), kind="stable")
    wanted = wanted[order]
    kept = kept_for_short(wanted, budget, waiting_short_tokens)
    before = np.cumsum(wanted) - wanted
    limits = np.where(wanted > short, budget - kept, budget)
    counts = np.clip(limits - before, 0, wanted).astype(np.int32)
    return order[counts > 0], counts[counts > 0]
