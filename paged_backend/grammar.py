"""Structured output: grammars are compiled on threads of their own and kept; each sequence that follows one has a guide, which knows what may come next.

The library is xgrammar (Dong et al., 2024, arXiv:2411.15100), an optional extra: without it requests that ask for a form are refused. It lets go of the
interpreter while it compiles.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from paged_backend.batch import Int32
from paged_backend.json_schema import unenforced
from paged_backend.structured import Grammar
from paged_backend.token_bytes import read_token_bytes

_NUM_THREADS = 2
_MAX_CACHED = 512  # grammars
_MAX_CACHED_BYTES = 512 * 2**20
_MAX_REASON_CHARS = 300
_FREE_TEXT = ('"pattern"', '"patternProperties"', '"propertyNames"', '"format"')  # what may let a line break into a string
_NOT_INSTALLED = "structured output is not installed in this server: pip install 'paged-backend[structured]'"

log = logging.getLogger("paged")


class GrammarError(Exception):
    """Why a grammar cannot be followed; a clause for the caller."""


@dataclass(frozen=True)
class _Vocabulary:
    """The model's tokens for the library, and which of them JSON must not have: they hold a control character, which the library lets into strings."""

    xgrammar: Any  # the module
    compiler: Any
    size: int
    clean: Int32  # [words] bits of the tokens without control characters
    clean_or_lines: Int32  # [words] and of those whose only ones are line breaks


@dataclass(frozen=True)
class Compiled:
    """A grammar, ready to be followed."""

    xgrammar: Any
    grammar: Any
    vocab_size: int
    allowed: Int32 | None  # [words] bits of the tokens that may ever come; None: all


class Guide:
    """One sequence's way through its grammar. Used by one thread.

    Invariant: once started, the matcher has accepted the first `_num_accepted` tokens of the answer, and `mask` is what may follow them.
    """

    def __init__(self, key: str, compiling: Future[Compiled], stop_ids: Sequence[int], min_tokens: int) -> None:
        """stop_ids: what may follow a complete answer; without any, it ends when it is complete. They wait for min_tokens if the grammar can go on."""
        self.refusal: str | None = None  # why the sequence cannot go on; a sentence for the caller
        self.over = False  # complete, and nothing may follow
        self.mask: Int32 = np.zeros(0, np.int32)  # [words] a bit per token of the vocabulary, the first in the lowest; 0: must not come
        self._key = key
        self._compiling = compiling
        self._stop_ids = stop_ids
        self._min_tokens = min_tokens
        self._matcher: Any = None
        self._num_accepted = 0

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
            for token_id in answer[self._num_accepted :].tolist():
                if not self._matcher.accept_token(token_id):
                    raise GrammarError("no token was left that it and bad_words allow")
            self._num_accepted = len(answer)
            self._look_ahead()
        except GrammarError as error:
            self.refusal = f"{self._key}: {error}"

    def _start(self, compiled: Compiled) -> None:
        self._matcher = compiled.xgrammar.GrammarMatcher(compiled.grammar)
        self._allowed = compiled.allowed
        self._stop_bits = _bits([token_id for token_id in self._stop_ids if token_id < compiled.vocab_size], compiled.vocab_size)
        self.mask = np.zeros_like(self._stop_bits)

    def _look_ahead(self) -> None:
        mask = np.zeros_like(self.mask)
        self._matcher.fill_next_token_bitmask(mask[None])
        if self._allowed is not None:
            mask &= self._allowed
        complete = self._matcher.is_completed()
        unstopped = mask & ~self._stop_bits
        if self._num_accepted < self._min_tokens and unstopped.any():
            mask = unstopped
        elif complete:
            mask |= self._stop_bits
            self.over = not self._stop_bits.any() and (self._num_accepted > 0 or not mask.any())
        if not self.over and not mask.any():
            raise GrammarError("it allows no token of this model" if self._num_accepted == 0 else "it allows no further token of this model")
        self.mask = mask


class Grammars:
    """Compiles grammars, the same one once, and keeps those that were wanted last."""

    def __init__(self, tokenizer_path: Path | None, vocab_size: int, eos_ids: Collection[int]) -> None:
        """tokenizer_path: a tokenizer.json; None: the model has none, and nothing can be compiled. vocab_size: of the logits."""
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "grammar")
        self._compiled: OrderedDict[tuple[str, str, bool], Future[Compiled]] = OrderedDict()  # the last wanted last
        self._read = partial(_read_vocabulary, tokenizer_path, vocab_size, eos_ids)
        self._vocabulary: Future[_Vocabulary] | None = None

    def warm(self) -> Future[_Vocabulary]:
        """Begins to read the vocabulary, if nobody has."""
        if self._vocabulary is None:
            self._vocabulary = self._threads.submit(self._read)
        return self._vocabulary

    def guide(self, grammar: Grammar, stop_ids: Sequence[int], min_tokens: int) -> Guide:
        """A guide for a new sequence; its grammar may still have to be compiled."""
        key = grammar.kind, grammar.text, grammar.compact
        if key not in self._compiled:
            self._compiled[key] = self._threads.submit(_compile, grammar, self.warm())
            self._forget_some()
        self._compiled.move_to_end(key)
        return Guide(grammar.key, self._compiled[key], stop_ids, min_tokens)

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
        raise GrammarError("it cannot be compiled") from None


def _size(future: Future[Compiled]) -> int:
    if not future.done() or future.exception() is not None:
        return 0
    return int(future.result().grammar.memory_size_bytes)


def _read_vocabulary(tokenizer_path: Path | None, vocab_size: int, eos_ids: Collection[int]) -> _Vocabulary:
    if tokenizer_path is None:
        raise GrammarError("this model has no tokenizer")
    try:
        import xgrammar
    except ImportError as error:
        raise GrammarError(_NOT_INSTALLED) from error
    spelled = read_token_bytes(tokenizer_path, vocab_size, eos_ids)
    tokens = xgrammar.TokenizerInfo(spelled, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=[])
    return _Vocabulary(
        xgrammar=xgrammar,
        compiler=xgrammar.GrammarCompiler(tokens, max_threads=1, cache_enabled=False),
        size=vocab_size,
        clean=_bits([token_id for token_id, text in enumerate(spelled) if min(text, default=32) >= 32], vocab_size),
        clean_or_lines=_bits([token_id for token_id, text in enumerate(spelled) if min(text.replace(b"\n", b""), default=32) >= 32], vocab_size),
    )


def _compile(grammar: Grammar, loading: Future[_Vocabulary]) -> Compiled:
    vocabulary = loading.result()
    compiler = vocabulary.compiler
    allowed = None
    try:
        if grammar.kind == "json":
            _check_schema(grammar.text)
            compiled = compiler.compile_json_schema(grammar.text, any_whitespace=not grammar.compact)
            allowed = vocabulary.clean if any(word in grammar.text for word in _FREE_TEXT) else vocabulary.clean_or_lines
        elif grammar.kind == "regex":
            compiled = compiler.compile_regex(grammar.text)
        elif "::=" in grammar.text:
            compiled = compiler.compile_grammar(grammar.text)
        else:
            compiled = compiler.compile_lark(grammar.text)
    except (RuntimeError, ValueError, TypeError) as error:  # the library's own are among them
        raise GrammarError(_reason(error)) from None
    return Compiled(vocabulary.xgrammar, compiled, vocabulary.size, allowed)


def _check_schema(text: str) -> None:
    try:
        schema = msgspec.json.decode(text)
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None
    except msgspec.DecodeError as error:
        raise GrammarError(f"not valid JSON: {error}") from None
    found = unenforced(schema)
    if found is not None:
        raise GrammarError(found)


def _reason(error: Exception) -> str:
    """What the library says, without the place in its source; it may quote a whole schema, or repeat itself."""
    lines = [re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", line).strip() for line in str(error).splitlines()]
    reason = " ".join(dict.fromkeys(line for line in lines if line)) or type(error).__name__
    return reason if len(reason) <= _MAX_REASON_CHARS else f"{reason[:_MAX_REASON_CHARS]}…"


def _bits(token_ids: Sequence[int], vocab_size: int) -> Int32:
    """int32 [words]: a bit per token, the first in the lowest."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
