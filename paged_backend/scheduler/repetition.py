"""How far a text repeats itself at its end: what tells drafts that are worth computing from those that are not.

Drafts from a row's own text are what came after the last place where it went as it goes now (kernels/ngram.py). The
more tokens are alike there, the likelier they are right: a pair comes back by chance, eight in a row do not. So a
sequence has as many drafts as tokens are alike beyond the first, and none where nothing repeats. (The rule is that of
suffix decoding, Oliaro et al., 2024.)
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paged_backend.arrays import Int32

# as the kernel has them (paged_kernels.reference_rows); this wing imports no torch
LONGEST, SHORTEST = 8, 2  # tokens
SEARCHED = 16_384  # newest tokens
_HASHES = 2**16  # of pairs: a new one is taken for an old one with probability 1/4 where SEARCHED pairs are noted
_FEW = 16  # tokens that are noted one by one


class Repetition:
    """How far one sequence's text repeats itself, asked as it grows. Owns a note of the pairs of tokens that it has, a
    byte a hash: a text whose newest pair is new need not be searched.
    """

    def __init__(self) -> None:
        self._has = bytearray(0)  # [_HASHES] once it is asked
        self._num_noted = 1  # tokens whose pairs are noted

    def is_new(self, num_tokens: int, first: int, second: int) -> bool:
        """Whether nothing repeats at the end of a text of so many tokens, the newest two of which are these; looked up
        and noted in no time if it has grown by one. False: `num_alike` has to be asked.
        """
        if num_tokens != self._num_noted + 1 or not self._has:
            return False
        place = _hash(first, second)
        if self._has[place]:
            return False
        self._has[place] = 1
        self._num_noted = num_tokens
        return True

    def num_alike(self, token_ids: Int32) -> int:
        """As the function. token_ids: the text that it was asked about before, and what came since."""
        num_new = len(token_ids) - self._num_noted
        if num_new > _FEW:
            self._note_many(token_ids[max(self._num_noted - 1, len(token_ids) - SEARCHED - 1, 0) : -1].astype(np.int64))
            num_new = 1
        self._num_noted = max(self._num_noted, len(token_ids))
        seen = num_new < 1  # for all that is known
        has = self._has = self._has or bytearray(_HASHES)
        tokens: list[int] = token_ids[-1 - num_new :].tolist() if num_new > 0 else []
        for first, second in pairwise(tokens):
            place = _hash(first, second)
            seen = has[place] > 0
            has[place] = 1
        return num_alike(token_ids) if seen else 0

    def _note_many(self, tokens: NDArray[np.int64]) -> None:
        self._has = self._has or bytearray(_HASHES)
        np.frombuffer(self._has, np.uint8)[_hash(tokens[:-1], tokens[1:])] = 1


def _hash(first: Any, second: Any) -> Any:
    return (first * 40503 + second * 60493) & (_HASHES - 1)


def continuation(token_ids: Int32) -> Int32:
    """What came after the last place where a text went as it ends now: as many tokens as are drafts of it, none where
    nothing repeats. As the kernel finds them. token_ids: int32 [n], all that are known.
    """
    tokens = token_ids[-SEARCHED:]
    alike, place = _last_alike(tokens)
    found: Int32 = tokens[place + np.arange(max(alike - 1, 0)) % max(len(tokens) - place, 1)]
    return found


def num_alike(token_ids: Int32) -> int:
    """How many of the newest tokens, LONGEST at most, stand in the same order before another place of the text's newest
    SEARCHED tokens; 0 where fewer than SHORTEST do.

    token_ids: int32 [n], all that are known.
    """
    return _last_alike(token_ids[-SEARCHED:])[0]


def _last_alike(tokens: Int32) -> tuple[int, int]:
    """How many tokens are alike, and the last place before which they are; (0, 0): fewer than SHORTEST are."""
    places = np.flatnonzero(tokens[:-1] == tokens[-1]) + 1 if len(tokens) else np.empty(0, np.intp)
    alike, last = 0, 0
    while len(places) and alike < LONGEST:
        alike, last = alike + 1, int(places[-1])
        places = places[places > alike]
        places = places[tokens[places - alike - 1] == tokens[-alike - 1]]
    return (alike, last) if alike >= SHORTEST else (0, 0)
