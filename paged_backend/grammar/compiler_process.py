"""Compiles grammars where they can harm nobody: `python -m paged_backend.grammar.compiler_process VOCABULARY`, a child of the engine (compiler.py).

A short expression may take minutes and gigabytes, and the library does not stop when asked: this process is killed instead. Its memory is bounded, and before
a grammar is let go it is followed for a while, because for some the compilation is quick and the first mask is not.
VOCABULARY is JSON; grammars come on stdin, verdicts go to stdout, each a msgpack message after its length (4 bytes, little-endian).
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from paged_backend.errors import ErrorKind
from paged_backend.grammar.json_schema import unenforced
from paged_backend.grammar.options import Grammar
from paged_backend.grammar.schema_patterns import Marks, marked
from paged_backend.grammar.vocabulary import GrammarError, Vocabulary, read_vocabulary

MAX_BYTES = 2**30  # that a compilation may take, beyond what the vocabulary has
_FOLLOW_SECONDS = 0.25  # of a processor's time, to follow a grammar as far as n tokens: this, and n times that
_TOKEN_SECONDS = 0.01
_MAX_REASON_CHARS = 300
_PROBED_TOKENS = 64
_PR_SET_PDEATHSIG = 1


class VocabularyPlace(msgspec.Struct, frozen=True):
    """What to read a vocabulary from."""

    tokenizer_path: str
    size: int
    eos_ids: tuple[int, ...]


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A grammar in the library's serial form, or why there is none."""

    serial: str = ""
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
        elif grammar.kind == "regex":
            compiled = compiler.compile_regex(grammar.text)
        elif "::=" in grammar.text:
            compiled = compiler.compile_grammar(grammar.text)
        else:
            compiled = compiler.compile_lark(grammar.text)
        _probe(compiled, vocabulary)
        return Verdict(serial=compiled.serialize_json(), controls=controls)
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
    plain = vocabulary.xgrammar.Grammar.from_json_schema(msgspec.json.encode(rewritten).decode(), any_whitespace=not grammar.compact)
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


def send(stream: IO[bytes], message: msgspec.Struct) -> None:
    encoded = msgspec.msgpack.encode(message)
    stream.write(len(encoded).to_bytes(4, "little") + encoded)
    stream.flush()


def _bound_memory() -> None:
    """RLIMIT_DATA, not RLIMIT_AS: libraries reserve addresses that they never use."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmData:\s+(\d+) kB", status)
    assert found is not None
    limit = int(found[1]) * 1024 + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    verdicts = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries that print must not spoil a verdict
    place = msgspec.json.decode(sys.argv[1], type=VocabularyPlace)
    vocabulary = read_vocabulary(Path(place.tokenizer_path), place.size, place.eos_ids)
    _bound_memory()
    send(verdicts, Verdict())  # ready
    grammars = sys.stdin.buffer
    while len(head := grammars.read(4)) == 4:
        send(verdicts, compile_here(msgspec.msgpack.decode(grammars.read(int.from_bytes(head, "little")), type=Grammar), vocabulary))
    return 0


if __name__ == "__main__":
    os._exit(main())
