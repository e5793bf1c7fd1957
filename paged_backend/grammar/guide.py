"""What the scheduler knows of one sequence's way through its grammar; the way itself is in another process
(follower_process.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.errors import ErrorKind
from paged_backend.grammar.follower_process import Followed, dead_end, may_come
from paged_backend.grammar.vocabulary import GrammarError

_numbers = count()


@dataclass(frozen=True, eq=False)
class Compiled:
    """A grammar, ready to be followed."""

    number: int
    path: Path  # of its serial form
    controls: str  # see Verdict
    num_bytes: int  # that it takes in memory
    noted: list[bool] = field(default_factory=list)  # its end will be told


@dataclass(frozen=True)
class Refusal:
    """Why a sequence cannot go on; the message is a clause for the caller."""

    kind: ErrorKind
    message: str


class Guide:
    """Used by one thread. `mask` and `over` are those after the first `num_followed` tokens of the answer, and `drafts`
    may come there.
    """

    def __init__(
        self, key: str, compiling: Future[Compiled], stop_ids: Sequence[int], min_tokens: int, own: Int32 | None = None
    ) -> None:
        """stop_ids: what may follow a complete answer; without any, it ends when it is complete. They wait for
        min_tokens if the grammar can go on.
        own: bits of the tokens that this sequence may say, stop ids aside; None: all."""
        self.key = key
        self.number = next(_numbers)
        self.stop_ids = tuple(stop_ids)
        self.min_tokens = min_tokens
        self.own = own
        self.refusal: Refusal | None = None
        self.over = False  # complete, and nothing may follow
        # [words] a bit per token of the vocabulary, the first in the lowest; 0: must not come
        self.mask: Int32 = np.zeros(0, np.int32)
        self.drafts: Int32 = np.zeros(0, np.int32)  # [k] of which it is known what may come after them
        self.masks_ahead: Int32 = np.zeros((0, 0), np.int32)  # [k, words] after each
        self.num_followed = -1
        self.asked = (-1, 0)  # which process, about how many tokens
        self.noted = False  # its end will be told
        self.deaths = 0  # of processes that were at it
        self.looks = True  # it is looked at drafts
        self._compiling = compiling

    @property
    def compiled(self) -> bool:
        """The grammar is, or cannot be."""
        return self._compiling.done()

    def knows(self, num_tokens: int) -> bool:
        """What comes after so many, or that nothing does."""
        return self.refusal is not None or self.num_followed == num_tokens

    def compiled_grammar(self) -> Compiled | None:
        """None: not yet, or it could not be compiled, which is the refusal then."""
        if not self._compiling.done():
            return None
        error = self._compiling.exception()
        if error is None:
            return self._compiling.result()
        known = isinstance(error, GrammarError)  # else it is not the caller's fault, and no reason to fail with him
        self.refusal = (
            Refusal(error.kind, str(error))
            if isinstance(error, GrammarError)
            else Refusal(ErrorKind.INTERNAL, "it cannot be compiled")
        )
        assert known or self.refusal.kind is ErrorKind.INTERNAL
        return None

    def take(self, followed: Followed, num_tokens: int) -> None:
        if followed.refusal:
            self.refusal = Refusal(followed.kind, followed.refusal)
            return
        self.mask, self.over, self.num_followed = np.frombuffer(followed.mask, np.int32), followed.over, num_tokens
        self.drafts = self.drafts[:0]

    def take_look(self, followed: Followed, num_tokens: int) -> None:
        """What a look behind so many tokens has found."""
        if self.refusal is None and self.num_followed == num_tokens:
            self.drafts = np.frombuffer(followed.drafts, np.int32)
            self.masks_ahead = np.frombuffer(followed.mask, np.int32).reshape(len(self.drafts), len(self.mask))

    def mask_after(self, num_drafts: int) -> Int32:
        """What may come if so many drafts do."""
        return self.masks_ahead[num_drafts - 1] if num_drafts else self.mask

    def check_last(self, token_id: int, num_before: int) -> None:
        """A token that ends the sequence, behind so many of the answer, is not followed, but may have come because
        nothing was left to choose from. Sets `refusal` then.
        """
        if not may_come(self.mask_after(num_before - self.num_followed), token_id):
            self.refusal = Refusal(ErrorKind.INVALID, dead_end(self.own is not None))
