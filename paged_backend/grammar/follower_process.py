"""Follows grammars where a slow one holds up no engine: in a process of its own, forked by nursery.py. It holds each
guided sequence's way through its grammar, is told the tokens of the answer, and says what may come next.

Messages are msgpack, each after its length (4 bytes, little-endian). Every Begin, Follow and Look is answered by one
Followed, in their order, so that the engine knows at which it is.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from paged_backend.arrays import Int32, bits
from paged_backend.errors import ErrorKind
from paged_backend.grammar.compiler_process import check_pace
from paged_backend.grammar.utf8 import CLEAN, advance
from paged_backend.grammar.vocabulary import GrammarError, Vocabulary

MAX_BYTES = 2**31  # for all grammars and their sequences, beyond what the vocabulary has
# Drafts are a luxury: a look takes little longer than this of a processor's time, and a sequence of which a mask has
# taken longer than the other has none.
_LOOK_SECONDS = 0.002
_MASK_SECONDS = 0.001


class Begin(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A sequence's first tokens, and how it is to be followed."""

    guide: int
    grammar: int
    path: str  # of the grammar, in the library's serial form
    controls: str
    stop_ids: tuple[int, ...]
    min_tokens: int
    own: bytes  # int32 [words], the only tokens it may say, stop ids aside; empty: all
    token_ids: bytes  # int32, the answer so far


class Follow(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """More of its tokens."""

    guide: int
    token_ids: bytes


class Look(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What may come if its next tokens were drafts, which are not its tokens yet."""

    guide: int
    guesses: bytes  # int32, at what comes next
    most: int  # drafts


class Forget(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A sequence is over."""

    guide: int


class Drop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A grammar is not wanted any more; those that follow it keep it."""

    grammar: int


ToFollower = Begin | Follow | Look | Forget | Drop


class Followed(msgspec.Struct, frozen=True, array_like=True):
    """What may come after all tokens that a sequence was said to have; of a look, after each draft."""

    # int32 [words] a bit per token of the vocabulary, the first in the lowest; 0: must not come. Of a look, one behind
    # the other
    mask: bytes = b""
    over: bool = False  # complete, and nothing may follow
    refusal: str = ""
    kind: ErrorKind = ErrorKind.INVALID
    drafts: bytes = b""  # int32, of a look: each may come, and something may come after it


decode_to_follower = msgspec.msgpack.Decoder(ToFollower).decode
decode_followed = msgspec.msgpack.Decoder(Followed).decode
encode = msgspec.msgpack.Encoder().encode


def framed(message: msgspec.Struct) -> bytes:
    body = encode(message)
    return len(body).to_bytes(4, "little") + body


class Frames:
    """Takes a stream of bytes apart."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, part: bytes | memoryview) -> list[bytes]:
        """The messages that are whole now."""
        self._bytes += part
        found, at = [], 0
        while len(self._bytes) >= at + 4 and len(self._bytes) >= (
            end := at + 4 + int.from_bytes(self._bytes[at : at + 4], "little")
        ):
            found.append(bytes(self._bytes[at + 4 : end]))
            at = end
        del self._bytes[:at]
        return found


class _Way:
    """One sequence's way through its grammar. Invariant: the matcher has accepted the first `_num_accepted` tokens of
    the answer.
    """

    def __init__(self, vocabulary: Vocabulary, grammar: Any, begin: Begin) -> None:
        self._vocabulary = vocabulary
        self._matcher = vocabulary.xgrammar.GrammarMatcher(grammar)
        self._allowed = vocabulary.clean_or_lines if begin.controls == "lines" else None
        self._own = np.frombuffer(begin.own, np.int32) if begin.own else None
        self._stop_bits = bits([token_id for token_id in begin.stop_ids if token_id < vocabulary.size], vocabulary.size)
        self._min_tokens = begin.min_tokens
        self._mask = np.full_like(self._stop_bits, -1)
        self._num_accepted = 0
        self._seconds = 0.0  # of a processor's time, so far
        self._looks = True  # drafts are looked at
        self._state = CLEAN  # of the bytes so far (utf8.py)

    def follow(self, token_ids: Sequence[int]) -> Followed:
        """
        Raises:
            GrammarError: the answer cannot go on, or it takes too long to know how.
        """
        begun = time.thread_time()
        for token_id in token_ids:
            self._accept(token_id)
        mask, over = self._look_ahead()
        self._mask = mask
        seconds = time.thread_time() - begun
        self._seconds += seconds
        self._looks = self._looks and seconds <= _MASK_SECONDS * (1 + len(token_ids))
        check_pace(self._seconds, self._num_accepted)  # ambiguous grammars take longer with every token
        return Followed(mask.tobytes(), over)

    def look(self, guesses: list[int], most: int) -> Followed:
        """Goes on with drafts, as far as they may come, and back to where it was. They are the guesses, and where none
        is left that may come, what the grammar leaves no choice of.

        Whether a request is refused depends on its tokens alone: no draft is a reason, nor counts its time.
        """
        drafts: list[int] = []
        masks: list[Int32] = []
        mask, state, num_accepted = self._mask, self._state, self._num_accepted
        end = time.thread_time() + _LOOK_SECONDS
        try:
            while self._looks and len(drafts) < most and time.thread_time() < end:
                draft = self._next_draft(guesses)
                if draft is None:
                    break
                self._accept(draft)
                self._mask, over = self._look_ahead()
                if over:  # the token that ends an answer is its last: none is sampled after it
                    break
                drafts.append(draft)
                masks.append(self._mask)
        except GrammarError:  # a dead end, which is told when it is reached
            pass
        except (MemoryError, RuntimeError, ValueError):
            self._looks = False
        finally:
            if self._num_accepted > num_accepted:
                self._matcher.rollback(self._num_accepted - num_accepted)
            self._mask, self._state, self._num_accepted = mask, state, num_accepted
        return Followed(b"".join(ahead.tobytes() for ahead in masks), drafts=np.array(drafts, np.int32).tobytes())

    def _next_draft(self, guesses: list[int]) -> int | None:
        """Takes it from the guesses, or replaces them by what must come; None: there is neither. A token that would
        stop the sequence is no draft: nothing comes after it.
        """
        allowed = self._mask & ~self._stop_bits
        if not guesses or not may_come(allowed, guesses[0]):
            guesses[:] = self._matcher.find_jump_forward_tokens()
        return guesses.pop(0) if guesses and may_come(allowed, guesses[0]) else None

    def _accept(self, token_id: int) -> None:
        state = advance(self._state, self._vocabulary.spelled[token_id])
        if state is None or not may_come(self._mask, token_id) or not self._matcher.accept_token(token_id):
            raise GrammarError(dead_end(self._own is not None))
        self._state = state
        self._num_accepted += 1
        self._mask = np.full_like(self._mask, -1)  # not known yet

    def _look_ahead(self) -> tuple[Int32, bool]:
        mask = np.zeros_like(self._mask)
        self._matcher.fill_next_token_bitmask(mask[None])
        mask &= self._vocabulary.following[self._state]
        for other in (self._allowed, self._own):
            if other is not None:
                mask &= other
        over, unstopped = False, mask & ~self._stop_bits
        if self._num_accepted < self._min_tokens and unstopped.any():
            mask = unstopped
        elif self._matcher.is_completed():
            mask |= self._stop_bits
            over = not self._stop_bits.any() and (self._num_accepted > 0 or not mask.any())
        if not over and not mask.any():
            where = "" if self._own is None else " among allowed_token_ids"
            raise GrammarError(f"it allows no {'further ' if self._num_accepted else ''}token of this model{where}")
        return mask, over


def may_come(mask: Int32, token_id: int) -> bool:
    return bool(mask[token_id >> 5] >> (token_id & 31) & 1)


def dead_end(restricted: bool) -> str:
    return f"no token was left that it{', allowed_token_ids' if restricted else ''} and bad_words allow"


class GrammarFollower:
    """All sequences that follow a grammar, and the grammars. Used by one thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._grammars: dict[int, Any] = {}
        self._ways: dict[int, _Way] = {}

    def take(self, message: ToFollower) -> Followed | None:
        match message:
            case Forget():
                self._ways.pop(message.guide, None)
            case Drop():
                self._grammars.pop(message.grammar, None)
            case Begin() | Follow():
                return self._followed(message)
            case Look():
                way = self._ways.get(message.guide)
                guesses = np.frombuffer(message.guesses, np.int32).tolist()
                return Followed() if way is None else way.look(guesses, message.most)
        return None

    def _followed(self, message: Begin | Follow) -> Followed:
        try:
            if isinstance(message, Begin):
                self._ways[message.guide] = _Way(self._vocabulary, self._grammar(message), message)
            way = self._ways.get(message.guide)
            if way is None:  # refused before
                raise GrammarError("it cannot be followed any more")
            return way.follow(np.frombuffer(message.token_ids, np.int32).tolist())
        except GrammarError as error:
            self._ways.pop(message.guide, None)
            return Followed(refusal=str(error), kind=error.kind)
        except (MemoryError, RuntimeError, ValueError, OSError) as error:  # the library's own are among them
            self._ways.pop(message.guide, None)
            full = isinstance(error, MemoryError) or "bad_alloc" in str(error)
            return Followed(
                refusal="it takes too much memory to follow" if full else "it cannot be followed",
                kind=ErrorKind.INVALID if full else ErrorKind.INTERNAL,
            )

    def _grammar(self, begin: Begin) -> Any:
        if begin.grammar not in self._grammars:
            serialised = Path(begin.path).read_text()
            self._grammars[begin.grammar] = self._vocabulary.xgrammar.CompiledGrammar.deserialize_json(
                serialised, self._vocabulary.tokens
            )
        return self._grammars[begin.grammar]


def follow(connection: socket.socket, vocabulary: Vocabulary) -> None:
    """Answers until the engine closes the connection."""
    follower, frames = GrammarFollower(vocabulary), Frames()
    while part := connection.recv(2**18):
        for frame in frames.feed(part):
            followed = follower.take(decode_to_follower(frame))
            if followed is not None:
                connection.sendall(framed(followed))
