"""What ranks do together or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from paged_backend.errors import EngineError
from paged_kernels.rank_ops import Ranks

T = TypeVar("T")


def agreed(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` returns, once no rank has failed at it: all begin what comes next together, or none does.

    Raises:
        EngineError: this rank's own sentence, or else that of the first that has failed.
    """
    try:
        result = work()
    except EngineError as error:
        ranks.tell_all(str(error))
        raise
    for rank, sentence in enumerate(ranks.tell_all("")):
        if sentence:
            raise EngineError(f"rank {rank}: {sentence}")
    return result
