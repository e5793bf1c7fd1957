"""Compiles grammars where they harm nobody: in a process of its own, forked by nursery.py.

A short expression may take minutes and gigabytes, and the library does not stop when asked: this process is killed
instead. Its memory is bounded, and before a grammar is let go it is followed for a while, because for some the
compilation is quick and the first mask is not.
"""

from __future__ import annotations

import random
import re
import socket
import time
from typing import Any

import msgspec
import numpy as np

from paged_backend.errors import ErrorKind
from paged_backend.grammar.json_schema import unenforced
from paged_backend.grammar.options import Grammar
from paged_backend.grammar.schema_patterns import Marks, marked
from paged_backend.grammar.structural_tags import compile_tag
from paged_backend.grammar.vocabulary import GrammarError, Vocabulary

MAX_BYTES = 2**30  # that a compilation may take, beyond what the vocabulary has
_FOLLOW_SECONDS = 0.25  # of a processor's time, to follow a grammar as far as n tokens: this, and n times that
_TOKEN_SECONDS = 0.01
_MAX_REASON_CHARS = 300
_PROBED_TOKENS = 64


class VocabularyPlace(msgspec.Struct, frozen=True):
    """What to read a vocabulary from."""

    tokenizer_path: str
    size: int
    eos_ids: tuple[int, ...]


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A grammar in the library's serial form, or why there is none."""

    serialised: str = ""
    num_bytes: int = 0  # that it takes in memory
    controls: str = "all"  # the control characters that may come: "all", "lines" (line breaks)
    refusal: str = ""
    kind: ErrorKind = ErrorKind.INVALID


def compile_here(grammar: Grammar, vocabulary: Vocabulary) -> Verdict:
    """Raises nothing that is the grammar's fault."""
    compiler = vocabulary.xgrammar.GrammarCompiler(vocabulary.tokens, max_threads=1, cache_enabled=False)
    controls = "all"
    try:
        if grammar.kind == "json":
            compiled = _compile_schema(grammar, compiler, vocabulary)
            controls = "lines"
        elif grammar.kind == "structural_tag":
            compiled = compile_tag(grammar.text, compiler, vocabulary)
            controls = "lines"
        elif grammar.kind == "regex":
            compiled = compiler.compile_regex(grammar.text)
        elif "::=" in grammar.text:
            compiled = compiler.compile_grammar(grammar.text)
        else:
            compiled = compiler.compile_lark(grammar.text)
        _probe(compiled, vocabulary)
        return Verdict(
            serialised=compiled.serialize_json(), num_bytes=int(compiled.memory_size_bytes), controls=controls
        )
    except MemoryError:
        return Verdict(refusal=too_large())
    except GrammarError as error:
        return Verdict(refusal=str(error))
    except (RuntimeError, ValueError, TypeError) as error:  # the library's own are among them
        return Verdict(refusal=too_large() if "bad_alloc" in str(error) else _reason(error))


def too_large() -> str:
    return f"it cannot be compiled with {MAX_BYTES // 2**20} MiB of memory"


def check_pace(seconds: float, num_tokens: int) -> None:
    """
    Raises:
        GrammarError: so many seconds of a processor's time are too many for so many tokens: they are everybody's.
    """
    if seconds > _FOLLOW_SECONDS + _TOKEN_SECONDS * num_tokens:
        raise GrammarError(f"it is too slow to follow: {num_tokens} tokens took {seconds:.2f} s")


def _compile_schema(grammar: Grammar, compiler: Any, vocabulary: Vocabulary) -> Any:
    schema, marks = _checked_schema(grammar.text), Marks()
    rewritten = marked(schema, marks.mark)
    if not marks:
        return compiler.compile_json_schema(grammar.text, any_whitespace=not grammar.compact)
    plain = vocabulary.xgrammar.Grammar.from_json_schema(
        msgspec.json.encode(rewritten).decode(), any_whitespace=not grammar.compact
    )
    return compiler.compile_grammar(marks.resolve(str(plain)))


def _checked_schema(text: str) -> Any:
    try:
        schema = msgspec.json.decode(text)
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None
    except msgspec.DecodeError as error:
        raise GrammarError(f"not valid JSON: {error}") from None
    found = unenforced(schema)
    if found is not None:
        raise GrammarError(found)
    return schema


def _probe(compiled: Any, vocabulary: Vocabulary) -> None:
    """Follows a grammar at random: what is slow now would hold up an engine."""
    matcher = vocabulary.xgrammar.GrammarMatcher(compiled)
    mask = np.zeros((1, -(-vocabulary.size // 32)), np.int32)
    randomly, spent = random.Random(0), 0.0
    for num_tokens in range(_PROBED_TOKENS):
        begun = time.thread_time()
        matcher.fill_next_token_bitmask(mask)
        spent += time.thread_time() - begun
        check_pace(spent, num_tokens)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if not len(allowed):
            return
        begun = time.thread_time()
        matcher.accept_token(int(randomly.choice(allowed)))
        spent += time.thread_time() - begun


def _reason(error: Exception) -> str:
    """What the library says, without the place in its source; it may quote a whole schema, or repeat itself."""
    lines = [re.sub(r"(^|(?<=: ))\[[\d:]+\] \S+:\d+: ", "", line).strip() for line in str(error).splitlines()]
    reason = " ".join(dict.fromkeys(line for line in lines if line)) or type(error).__name__
    return reason if len(reason) <= _MAX_REASON_CHARS else f"{reason[:_MAX_REASON_CHARS]}…"


def compile_for(connection: socket.socket, vocabulary: Vocabulary) -> None:
    """Answers each grammar with a verdict, until the engine closes the connection. Messages are msgpack, each after its
    length (4 bytes, little-endian).
    """
    stream = connection.makefile("rwb")
    while len(head := stream.read(4)) == 4:
        grammar = msgspec.msgpack.decode(stream.read(int.from_bytes(head, "little")), type=Grammar)
        body = msgspec.msgpack.encode(compile_here(grammar, vocabulary))
        stream.write(len(body).to_bytes(4, "little") + body)
        stream.flush()
