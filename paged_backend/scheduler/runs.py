"""What a step with drafts brought: a run of tokens for each sampled sequence, of which some may not be there."""

from __future__ import annotations

import numpy as np

from paged_backend.arrays import Int32


class Runs:
    """Which entries of a step with drafts belong together: each sampled sequence's, in their order."""

    def __init__(self, num_drafts: Int32, token_ids: Int32) -> None:
        """num_drafts: [num_sampled sequences] of each."""
        self.lens = num_drafts + 1
        self.num_drafts: list[int] = num_drafts.tolist()
        self.firsts: list[int] = (np.cumsum(self.lens) - self.lens).tolist()
        self._token_ids = token_ids

    def token_ids(self, index: int) -> list[int]:
        """Those that a sequence was brought: one at least, before what is not there."""
        first = self.firsts[index]
        token_ids: list[int] = self._token_ids[first : first + 1 + self.num_drafts[index]].tolist()
        return token_ids[: token_ids.index(-1)] if token_ids[-1] < 0 else token_ids


def end_of(token_ids: list[int], stop_ids: tuple[int, ...]) -> int:
    """How many of a run's tokens are its sequence's: those up to the first that stops it."""
    return next((end for end, token_id in enumerate(token_ids, 1) if token_id in stop_ids), len(token_ids))
