"""Structured output: grammars are compiled beside the engine and kept; each sequence that follows one has a guide, which knows what may come next.

A grammar that is new is compiled in a process of its own kind (compiler_process.py), whose time and memory are bounded; a thread waits for it and reads the
result. The library lets go of the interpreter meanwhile, so the engine's loop goes on.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock, local
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np

from paged_backend.arrays import Int32, bits
from paged_backend.errors import ErrorKind
from paged_backend.grammar.compiler import GrammarCompiler
from paged_backend.grammar.compiler_process import Verdict, VocabularyPlace, check_pace
from paged_backend.grammar.options import Grammar
from paged_backend.grammar.utf8 import CLEAN, advance
from paged_backend.grammar.vocabulary import GrammarError, Vocabulary, read_vocabulary

_NUM_THREADS = 2
_MAX_CACHED = 512  # grammars
_MAX_CACHED_BYTES = 512 * 2**20

log = logging.getLogger("paged")


class Compiler(Protocol):
    """What a thread compiles with: compiler.py; tests have their own."""

    def compile(self, grammar: Grammar) -> Verdict: ...


@dataclass(frozen=True)
class Compiled:
    """A grammar, ready to be followed."""

    vocabulary: Vocabulary
    grammar: Any
    allowed: Int32 | None  # [words] bits of the tokens that may ever come; None: all


@dataclass(frozen=True)
class Refusal:
    """Why a sequence cannot go on; the message is a sentence for the caller."""

    kind: ErrorKind
    message: str


class Guide:
    """One sequence's way through its grammar. Used by one thread.

    Invariant: once started, the matcher has accepted the first `_num_accepted` tokens of the answer, and `mask` is what may follow them.
    """

    def __init__(self, key: str, compiling: Future[Compiled], stop_ids: Sequence[int], min_tokens: int, own: Int32 | None = None) -> None:
        """stop_ids: what may follow a complete answer; without any, it ends when it is complete. They wait for min_tokens if the grammar can go on.
        own: bits of the tokens that this sequence may say, stop ids aside; None: all."""
        self.refusal: Refusal | None = None
        self.over = False  # complete, and nothing may follow
        self.mask: Int32 = np.zeros(0, np.int32)  # [words] a bit per token of the vocabulary, the first in the lowest; 0: must not come
        self._key = key
        self._compiling = compiling
        self._stop_ids = stop_ids
        self._min_tokens = min_tokens
        self._own = own
        self._matcher: Any = None
        self._num_accepted = 0
        self._seconds = 0.0  # of a processor's time, so far
        self._state = CLEAN  # of the bytes so far (utf8.py)

    @property
    def compiled(self) -> bool:
        """The grammar is, or cannot be."""
        return self._compiling.done()

    @property
    def started(self) -> bool:
        return self._matcher is not None or self.refusal is not None

    def follow(self, answer: Int32) -> None:
        """Brings the guide up to date with an answer, of which it knows the beginning. Needs `compiled`."""
        if self.refusal is not None or (self._matcher is not None and len(answer) == self._num_accepted):
            return
        try:
            if self._matcher is None:
                self._start(_result(self._compiling))
            begun = time.thread_time()
            for token_id in answer[self._num_accepted :].tolist():
                self._accept(token_id)
            self._look_ahead()
            self._seconds += time.thread_time() - begun
            check_pace(self._seconds, self._num_accepted)  # ambiguous grammars take longer with every token
        except GrammarError as error:
            self.refusal = Refusal(error.kind, f"{self._key}: {error}")

    def check_last(self, token_id: int) -> None:
        """A token that ends the sequence is not followed, but may have come because nothing was left to choose from. Sets `refusal` then."""
        if not self._may_come(token_id):
            self.refusal = Refusal(ErrorKind.INVALID, f"{self._key}: {self._dead_end}")

    @property
    def _dead_end(self) -> str:
        return f"no token was left that it{'' if self._own is None else ', allowed_token_ids'} and bad_words allow"

    def _may_come(self, token_id: int) -> bool:
        return bool(self.mask[token_id >> 5] >> (token_id & 31) & 1)

    def _start(self, compiled: Compiled) -> None:
        self._vocabulary = compiled.vocabulary
        self._matcher = compiled.vocabulary.xgrammar.GrammarMatcher(compiled.grammar)
        self._allowed = compiled.allowed
        size = compiled.vocabulary.size
        self._stop_bits = bits([token_id for token_id in self._stop_ids if token_id < size], size)
        self.mask = np.full_like(self._stop_bits, -1)

    def _accept(self, token_id: int) -> None:
        state = advance(self._state, self._vocabulary.spelled[token_id])
        if state is None or not self._may_come(token_id) or not self._matcher.accept_token(token_id):
            raise GrammarError(self._dead_end)
        self._state = state
        self._num_accepted += 1
        self.mask = np.full_like(self.mask, -1)  # not known yet

    def _look_ahead(self) -> None:
        mask = np.zeros_like(self.mask)
        self._matcher.fill_next_token_bitmask(mask[None])
        mask &= self._vocabulary.following[self._state]
        if self._allowed is not None:
            mask &= self._allowed
        if self._own is not None:
            mask &= self._own
        complete = self._matcher.is_completed()
        unstopped = mask & ~self._stop_bits
        if self._num_accepted < self._min_tokens and unstopped.any():
            mask = unstopped
        elif complete:
            mask |= self._stop_bits
            self.over = not self._stop_bits.any() and (self._num_accepted > 0 or not mask.any())
        if not self.over and not mask.any():
            where = "" if self._own is None else " among allowed_token_ids"
            raise GrammarError(f"it allows no {'further ' if self._num_accepted else ''}token of this model{where}")
        self.mask = mask


class Grammars:
    """Compiles grammars, the same one once, and keeps those that were wanted last."""

    def __init__(
        self, tokenizer_path: Path | None, vocab_size: int, eos_ids: Collection[int], make_compiler: Callable[[VocabularyPlace], Compiler] = GrammarCompiler
    ) -> None:
        """tokenizer_path: a tokenizer.json; None: the model has none, and nothing can be compiled. vocab_size: of the logits."""
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "grammar")
        self._compilers = local()  # one a thread
        self._lock = Lock()
        self._waiting: dict[tuple[str, str, bool], WeakSet[Guide]] = {}  # for grammars whose compilation has not begun
        self._make_compiler = partial(make_compiler, VocabularyPlace(str(tokenizer_path), vocab_size, tuple(eos_ids)))
        self._compiled: OrderedDict[tuple[str, str, bool], Future[Compiled]] = OrderedDict()  # the last wanted last
        self._read = partial(read_vocabulary, tokenizer_path, vocab_size, eos_ids)
        self._vocabulary: Future[Vocabulary] | None = None

    def guide(self, grammar: Grammar, stop_ids: Sequence[int], min_tokens: int, allowed: Int32 | None = None) -> Guide:
        """A guide for a new sequence; its grammar may still have to be compiled. allowed: as Guide's `own`."""
        key = grammar.kind, grammar.text, grammar.compact
        with self._lock:
            if key not in self._compiled or _failed_by_chance(self._compiled[key]):
                if self._vocabulary is None or _failed_by_chance(self._vocabulary):
                    self._vocabulary = self._threads.submit(self._read)
                waiting = self._waiting[key] = WeakSet()
                self._compiled[key] = self._threads.submit(self._compile_wanted, key, waiting, grammar, self._vocabulary)
                self._forget_some()
            self._compiled.move_to_end(key)
            guide = Guide(grammar.key, self._compiled[key], stop_ids, min_tokens, allowed)
            if key in self._waiting:
                self._waiting[key].add(guide)
            return guide

    def _compile_wanted(self, key: tuple[str, str, bool], waiting: WeakSet[Guide], grammar: Grammar, reading: Future[Vocabulary]) -> Compiled:
        """Whoever asked for it may have left while others' were compiled."""
        with self._lock:
            newest = self._waiting.get(key) is waiting  # else it was forgotten, and asked for again
            if newest:
                del self._waiting[key]
            if not waiting:
                if newest:
                    self._compiled.pop(key, None)
                raise GrammarError("nobody waits for it any more")
        return self._compile(grammar, reading)

    def _compile(self, grammar: Grammar, reading: Future[Vocabulary]) -> Compiled:
        """On a thread. The process begins only after the vocabulary is known to be one."""
        vocabulary = reading.result()
        if not hasattr(self._compilers, "mine"):
            self._compilers.mine = self._make_compiler()
        verdict: Verdict = self._compilers.mine.compile(grammar)
        if verdict.refusal:
            raise GrammarError(verdict.refusal)
        allowed = {"all": None, "lines": vocabulary.clean_or_lines}[verdict.controls]
        return Compiled(vocabulary, vocabulary.xgrammar.CompiledGrammar.deserialize_json(verdict.serial, vocabulary.tokens), allowed)

    def _forget_some(self) -> None:
        """Drops what was not wanted for longest, until the bounds are kept. Who follows a grammar keeps it."""
        sizes = {key: _size(future) for key, future in self._compiled.items()}
        excess = sum(sizes.values()) - _MAX_CACHED_BYTES
        for key in list(sizes)[:-1]:
            if excess <= 0 and len(self._compiled) <= _MAX_CACHED:
                return
            excess -= sizes[key]
            del self._compiled[key]


def _result(compiling: Future[Compiled]) -> Compiled:
    try:
        return compiling.result()
    except GrammarError:
        raise
    except Exception as error:  # not the caller's fault, and no reason to fail with him
        log.exception("a grammar could not be compiled", exc_info=error)
        raise GrammarError("it cannot be compiled", ErrorKind.INTERNAL) from None


def _failed_by_chance(future: Future[Any]) -> bool:
    """Not because of the grammar or the model: for want of memory, say. Then it is tried again."""
    return future.done() and future.exception() is not None and not isinstance(future.exception(), GrammarError)


def _size(future: Future[Compiled]) -> int:
    if not future.done() or future.exception() is not None:
        return 0
    return int(future.result().grammar.memory_size_bytes)
