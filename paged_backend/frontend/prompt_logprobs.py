"""Log-probabilities of a prompt's tokens, as a front end keeps them until they are sent: arrays, since a prompt may be
long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PromptTable:
    """Of the P tokens of a prompt, the first of which has no probability: nothing is before it."""

    token_ids: NDArray[np.int32]  # [P]
    logprobs: NDArray[np.float32]  # [P - 1]
    ranks: NDArray[np.int32]  # [P - 1], 1: the most likely
    top_ids: NDArray[np.int32]  # [P - 1, n] most likely first
    top_logprobs: NDArray[np.float32]  # [P - 1, n]

    def entries(self) -> Iterator[dict[int, tuple[float, int | None]] | None]:
        """Of each token: token id -> (log-probability, rank), the prompt's own first, then the n most likely. None for
        the first token.
        """
        yield None
        columns = (self.token_ids[1:], self.logprobs, self.ranks, self.top_ids, self.top_logprobs)
        for token_id, logprob, rank, ids, values in zip(*(column.tolist() for column in columns), strict=True):
            likeliest = {other: (value, place) for place, (other, value) in enumerate(zip(ids, values, strict=True), 1)}
            yield {token_id: (logprob, rank)} | {
                other: reported for other, reported in likeliest.items() if other != token_id
            }


class PromptTableParts:
    """The pieces of a table, in the order of the prompt. An engine that starts again tells from the beginning: what is
    known already is skipped.
    """

    def __init__(self, token_ids: NDArray[np.int32], n: int) -> None:
        """token_ids: [P] of the prompt. n: how many of the most likely tokens are told of each."""
        self._token_ids = token_ids
        self._n = n
        self._parts: list[tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]] = []
        self._num_known = 1  # tokens, the first included

    def add(self, start: int, logprobs: bytes, ranks: bytes, top_ids: bytes, top_logprobs: bytes) -> None:
        """See request.PromptLogprobs."""
        known = self._num_known - start
        assert known >= 0, "a piece of a prompt is missing"
        columns = (
            np.frombuffer(logprobs, np.float32),
            np.frombuffer(ranks, np.int32),
            np.frombuffer(top_ids, np.int32),
            np.frombuffer(top_logprobs, np.float32),
        )
        values, places, ids, tops = columns
        self._parts.append(
            (
                values[known:],
                places[known:],
                ids.reshape(len(values), self._n)[known:],
                tops.reshape(len(values), self._n)[known:],
            )
        )
        self._num_known += max(len(values) - known, 0)

    def whole(self) -> PromptTable | None:
        """None: something is still missing."""
        if self._num_known < len(self._token_ids):
            return None
        nothing = (
            np.empty(0, np.float32),
            np.empty(0, np.int32),
            np.empty((0, self._n), np.int32),
            np.empty((0, self._n), np.float32),
        )
        return PromptTable(
            self._token_ids, *(np.concatenate(column) for column in zip(nothing, *self._parts, strict=True))
        )
