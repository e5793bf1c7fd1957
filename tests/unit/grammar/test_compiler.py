"""The process that compiles grammars: it says what compiling here says, and what it cannot finish is refused while everything else goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paged_backend.grammar import compiler as grammar_compiler
from paged_backend.grammar import compiler_process as grammar_process
from paged_backend.grammar.compiler import GrammarCompiler
from paged_backend.grammar.compiler_process import VocabularyPlace, compile_here
from paged_backend.grammar.options import Grammar
from paged_backend.grammar.vocabulary import read_vocabulary
from tests.structured_engine import EOS, TOKENIZER, VOCAB

BOMB = Grammar("guided_regex", "regex", "((((a|b){0,99}){0,99}){0,99}){0,99}")  # compiled in milliseconds, and then no end of its masks
HUGE = Grammar("guided_json", "json", json.dumps({"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(3000)}}))
PLAIN = Grammar("guided_regex", "regex", "[a-z]{3}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> VocabularyPlace:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return VocabularyPlace(str(path), VOCAB, (EOS,))


@pytest.fixture(scope="module")
def compiler(place: VocabularyPlace) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(place)
    yield made
    made.close()


@pytest.mark.parametrize(
    "grammar",
    [
        PLAIN,
        Grammar("guided_json", "json", '{"type":"object"}', compact=True),
        Grammar("guided_json", "json", '{"type":"string","pattern":"^a"}'),
        Grammar("guided_json", "json", "{"),
        Grammar("guided_grammar", "grammar", "root ::= foo"),
        Grammar("guided_grammar", "grammar", 'start: "a"+'),
    ],
    ids=lambda grammar: grammar.text,
)
def test_the_process_says_what_compiling_here_says(compiler: GrammarCompiler, place: VocabularyPlace, grammar: Grammar) -> None:
    assert compiler.compile(grammar) == compile_here(grammar, read_vocabulary(Path(place.tokenizer_path), place.size, place.eos_ids))


def test_a_grammar_that_takes_too_long_is_refused_and_the_next_one_compiled(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compiler.compile(PLAIN).refusal  # it runs
    monkeypatch.setattr(grammar_compiler, "COMPILE_SECONDS", 0.5)
    begun = time.monotonic()
    assert compiler.compile(HUGE).refusal == "it takes more than 0.5 s to compile"
    assert time.monotonic() - begun < 3
    monkeypatch.undo()
    assert not compiler.compile(PLAIN).refusal


def test_a_grammar_that_is_compiled_soon_and_followed_slowly_is_refused(compiler: GrammarCompiler) -> None:
    assert compiler.compile(BOMB).refusal.startswith("it is too slow to follow: ")
    assert not compiler.compile(PLAIN).refusal


def test_a_grammar_that_takes_too_much_memory_is_refused_and_the_next_one_compiled(compiler: GrammarCompiler) -> None:
    assert compiler.compile(HUGE).refusal == "it cannot be compiled with 1024 MiB of memory"
    assert not compiler.compile(PLAIN).refusal


def test_a_process_that_dies_is_replaced(compiler: GrammarCompiler) -> None:
    assert not compiler.compile(PLAIN).refusal
    process = compiler._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not compiler.compile(PLAIN).refusal


def test_a_grammar_whose_masks_are_slow_is_refused(place: VocabularyPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_process, "_FOLLOW_SECONDS", -9.0)
    refusal = compile_here(PLAIN, read_vocabulary(Path(place.tokenizer_path), place.size, place.eos_ids)).refusal
    assert refusal.startswith("it is too slow to follow: 0 tokens took 0.00 s")


def test_a_process_that_cannot_start_is_our_failure(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="did not start"):
        GrammarCompiler(VocabularyPlace(str(tmp_path / "nothing.json"), VOCAB, ())).compile(PLAIN)
