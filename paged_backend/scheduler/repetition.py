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

from paged_backend.arrays import Int32

# as the kernel has them (paged_kernels.reference_rows); this wing imports no torch
LONGEST, SHORTEST = 8, 2  # tokens
SEARCHED = 16_384  # newest tokens
_HASHES = 2**16  # of pairs: a new one is taken for an old one with probability 1/4 where SEARCHED pairs are noted
_FACTORS = 40503, 60493  # of a pair's tokens in its hash
_FEW = 16  # tokens that are noted one by one


class Repetition:
    """How far one sequence's text repeats itself, as it grows. Owns a note of the pairs of tokens that it has, a byte a
    hash, so that a text whose newest pair is new need not be searched; and the place after which it goes on as it did
    there, so that as long as it does it need not be searched again.
    """

    def __init__(self) -> None:
        self._has = bytearray(0)  # [_HASHES] once it is asked
        self.num_noted = -1  # tokens whose pairs are noted; -1: it was never asked
        self._newest = 0  # the last of them
        # of the text when `num_alike` was asked last: its tokens, how many are alike, and the place that they stand
        # before; no fewer are than LONGEST, if it is so many
        self._num_asked, self._alike, self._place = -1, 0, 0

    def hears(self, num_tokens: int, token_id: int) -> bool:
        """The text has so many tokens now, and this one is the newest. False: nothing repeats. True: its newest pair is
        an old one, or, if not so many are noted, not all of its tokens were heard.
        """
        if num_tokens != self.num_noted + 1:
            return True
        # as _hash, without the call: this is asked of every token
        place = (self._newest * _FACTORS[0] + token_id * _FACTORS[1]) & (_HASHES - 1)
        self.num_noted, self._newest = num_tokens, token_id
        if self._has[place]:
            return True
        self._has[place] = 1
        return False

    def num_alike(self, token_ids: Int32) -> int:
        """As the function. token_ids: int32 [n], the text that it was asked about before, and what came since."""
        if len(token_ids) != self._num_asked:
            if not self.reads(token_ids):
                self._alike = 0
            elif not self._goes_on(token_ids):
                self._alike, self._place = _last_alike(token_ids[-SEARCHED:])
                self._place += max(len(token_ids) - SEARCHED, 0)
            self._num_asked = len(token_ids)
        return min(self._alike, LONGEST)

    def reads(self, token_ids: Int32) -> bool:
        """As `hears`, of the whole text, of which some was not heard."""
        if len(token_ids) == self.num_noted:
            return True  # for all that is known
        has = self._has = self._has or bytearray(_HASHES)
        newest = token_ids[max(self.num_noted - 1, 0) :]
        if len(newest) > _FEW:
            tokens = newest[-SEARCHED - 1 : -1].astype(np.int64)
            np.frombuffer(has, np.uint8)[_hash(tokens[:-1], tokens[1:])] = 1
            newest = newest[-2:]
        seen = False
        for pair in pairwise(newest.tolist()):
            place = _hash(*pair)
            seen = has[place] > 0
            has[place] = 1
        self.num_noted, self._newest = len(token_ids), int(token_ids[-1]) if len(token_ids) else 0
        return seen

    def _goes_on(self, token_ids: Int32) -> bool:
        """What is new stands behind the place, too: then no other place has more tokens alike before it."""
        num_new, place = len(token_ids) - self._num_asked, self._place
        if not self._alike or num_new > _FEW or place - LONGEST < len(token_ids) - SEARCHED:
            return False
        if token_ids[place : place + num_new].tolist() != token_ids[-num_new:].tolist():
            return False
        self._alike, self._place = self._alike + num_new, place + num_new
        return True


def _hash(first: Any, second: Any) -> Any:
    return (first * _FACTORS[0] + second * _FACTORS[1]) & (_HASHES - 1)


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
    if len(tokens) <= SHORTEST:
        return 0, 0
    places = np.flatnonzero((tokens[1:-1] == tokens[-1]) & (tokens[:-2] == tokens[-2])) + SHORTEST
    if not len(places):
        return 0, 0
    alike = SHORTEST
    while len(places) > 1 and alike < LONGEST:
        farther = places[places > alike]
        farther = farther[tokens[farther - alike - 1] == tokens[-alike - 1]]
        if not len(farther):
            break
        places, alike = farther, alike + 1
    last = int(places[-1])
    if len(places) == 1:
        while alike < min(LONGEST, last) and tokens[last - alike - 1] == tokens[-alike - 1]:
            alike += 1
    return alike, last
