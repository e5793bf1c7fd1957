"""Grammars that are kept for the next request: which, how many, and what they allow."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from paged_backend.errors import ErrorKind
from paged_backend.grammar import grammars as room
from paged_backend.grammar.compiler_process import Verdict
from paged_backend.grammar.grammars import Grammars
from paged_backend.grammar.guide import Guide
from paged_backend.grammar.options import Grammar
from paged_backend.grammar.vocabulary import read_vocabulary
from tests.structured_engine import (
    EOS,
    TOKENIZER,
    VOCAB,
    CompilerHere,
    WorkshopHere,
    save_speaker,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaker(tmp_path_factory.mktemp("speaker"))


def grammars(folder: Path, compiler: type[CompilerHere] = CompilerHere) -> Grammars:
    return Grammars(folder / "tokenizer.json", VOCAB, (EOS,), lambda place: WorkshopHere(place, compiler))


def follow(kept: Grammars, guide: Guide, *token_ids: int) -> Guide:
    """Until it is known what may come after these tokens."""
    while not guide.knows(len(token_ids)):
        kept.follower.ask(guide, np.array(token_ids, np.int32))
        kept.follower.collect()
        time.sleep(0.001)
    return guide


def test_a_grammar_is_compiled_once_and_forgotten_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_MAX_CACHED", 2)
    compiled: list[str] = []
    compile_now = CompilerHere.compile
    monkeypatch.setattr(
        CompilerHere,
        "compile",
        lambda self, grammar, seconds: (compiled.append(grammar.text), compile_now(self, grammar, seconds))[1],
    )
    kept = grammars(folder)

    def want(text: str, key: str = "guided_regex") -> Guide:
        guide = kept.guide(Grammar(key, "regex", text), (EOS,), 0)
        guide._compiling.result()
        return guide

    for text in ("a", "b", "a", "c", "a", "b"):
        want(text)
    assert compiled == ["a", "b", "c", "b"]
    assert len(kept._compiled) == 2
    want("b", key="structured_outputs.regex")
    assert len(compiled) == 4


def test_what_failed_for_another_reason_than_the_grammar_is_tried_again(folder: Path) -> None:
    tries: list[str] = []

    class Exhausted(CompilerHere):
        def compile(self, grammar: Grammar, seconds: float) -> Verdict | None:
            tries.append(grammar.text)
            if len(tries) == 1:
                raise OSError(12, "no memory for another process")
            return super().compile(grammar, seconds)

    compiled = grammars(folder, Exhausted)
    refusals = []
    for text in ("a+", "a+", "a+", "a{1,", "a{1,"):
        guide = compiled.guide(Grammar("guided_regex", "regex", text), (EOS,), 0)
        follow(compiled, guide)
        refusals.append(None if guide.refusal is None else guide.refusal.kind)
    assert refusals == [ErrorKind.INTERNAL, None, None, ErrorKind.INVALID, ErrorKind.INVALID]
    assert tries == ["a+", "a+", "a{1,"]


def test_a_grammar_of_callers_who_left_is_not_compiled(folder: Path) -> None:
    """Each may take many seconds, and others wait behind it."""
    go_on, tries = threading.Event(), []

    class Slow(CompilerHere):
        def compile(self, grammar: Grammar, seconds: float) -> Verdict | None:
            tries.append(grammar.text)
            assert go_on.wait(20)
            return super().compile(grammar, seconds)

    compiled = grammars(folder, Slow)
    first = [compiled.guide(Grammar("guided_regex", "regex", text), (EOS,), 0) for text in ("a+", "b+", "c+")]
    while len(tries) < 2:  # as many as there are threads
        time.sleep(0.01)
    left = [compiled.guide(Grammar("guided_regex", "regex", f"d{number}"), (EOS,), 0) for number in range(20)]
    stays = compiled.guide(Grammar("guided_regex", "regex", "d7"), (EOS,), 0)
    del left
    gc.collect()
    go_on.set()
    while not (stays.compiled and all(guide.compiled for guide in first)):
        time.sleep(0.01)
    assert sorted(tries) == ["a+", "b+", "c+", "d7"]
    again = compiled.guide(Grammar("guided_regex", "regex", "d3"), (EOS,), 0)
    assert follow(compiled, again).refusal is None


def test_large_grammars_are_forgotten_by_their_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_MAX_CACHED_BYTES", 1)
    kept = grammars(folder)
    for text in ("a", "b", "c"):
        guide = kept.guide(Grammar("guided_regex", "regex", text), (EOS,), 0)
        guide._compiling.result()
    assert [text for _, text, _ in kept._compiled] == ["c"]
    assert follow(kept, guide, TOKENIZER.token_to_id("c")).refusal is None


def test_a_mask_allows_what_the_grammar_allows_and_no_padding(folder: Path) -> None:
    kept = grammars(folder)
    guide = follow(kept, kept.guide(Grammar("guided_regex", "regex", "t.*"), (EOS,), 0))
    allowed = np.flatnonzero(np.unpackbits(guide.mask.view(np.uint8), bitorder="little")).tolist()
    assert allowed and all(TOKENIZER.decode([token_id]).startswith("t") for token_id in allowed)
    follow(kept, guide, TOKENIZER.token_to_id("t"))
    bits = np.unpackbits(guide.mask.view(np.uint8), bitorder="little")
    assert bits[EOS] and not bits[TOKENIZER.token_to_id("<s>")] and not bits[TOKENIZER.get_vocab_size() :].any()


def test_bytes_that_are_no_text_never_come(folder: Path) -> None:
    kept = grammars(folder)
    guide = kept.guide(Grammar("guided_regex", "regex", ".*"), (EOS,), 0)
    spelled = read_vocabulary(folder / "tokenizer.json", VOCAB, (EOS,)).spelled
    lead, surrogate, letter = (list(spelled).index(bytes([byte])) for byte in (0xED, 0xA0, 0x9F))
    follow(kept, guide, lead)
    bits = np.unpackbits(guide.mask.view(np.uint8), bitorder="little")
    assert bits[letter] and not bits[surrogate] and not bits[EOS]
