"""Drafts of an answer that follows a grammar: a look finds what following them would, and changes nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from paged_backend.arrays import Int32
from paged_backend.grammar import follower_process
from paged_backend.grammar.compiler_process import compile_here
from paged_backend.grammar.follower_process import Begin, Follow, Followed, GrammarFollower, Look, may_come
from paged_backend.grammar.options import Grammar
from paged_backend.grammar.vocabulary import Vocabulary, read_vocabulary
from tests.structured_engine import EOS, TOKENIZER, VOCAB

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "tags": {"type": "array", "maxItems": 3}},
        "required": ["name", "tags"],
        "additionalProperties": False,
    }
)
GRAMMARS = {
    "json": Grammar("guided_json", "json", SCHEMA),
    "compact": Grammar("guided_json", "json", SCHEMA, compact=True),
    "regex": Grammar("guided_regex", "regex", "(yes, please; ){1,4}(é|è)+[à-ü]?"),
    "choice": Grammar("guided_regex", "regex", "(not at all|not even now)"),
    "ebnf": Grammar("guided_grammar", "grammar", 'root ::= "the " root | "the end"'),
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return read_vocabulary(path, VOCAB, (EOS,))


@pytest.fixture(autouse=True)
def time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is."""
    monkeypatch.setattr(follower_process, "_LOOK_SECONDS", 5.0)
    monkeypatch.setattr(follower_process, "_MASK_SECONDS", 5.0)


class Ways:
    """A follower with two ways through one grammar: looks are taken from the first alone."""

    def __init__(self, vocabulary: Vocabulary, grammar: Grammar, folder: Path, min_tokens: int, stops: bool) -> None:
        verdict = compile_here(grammar, vocabulary)
        assert not verdict.refusal
        path = folder / "grammar"
        path.write_text(verdict.serialised)
        self._follower = GrammarFollower(vocabulary)
        stop_ids = (EOS,) if stops else ()
        begins = [Begin(way, 0, str(path), verdict.controls, stop_ids, min_tokens, b"", b"") for way in (0, 1)]
        self.followed, self.expected = (self._take(begin) for begin in begins)

    def follow(self, token_id: int) -> None:
        token_ids = np.array([token_id], np.int32).tobytes()
        self.followed, self.expected = (self._take(Follow(way, token_ids)) for way in (0, 1))

    def follow_first(self, token_ids: list[int]) -> None:
        self.followed = self._take(Follow(0, np.array(token_ids, np.int32).tobytes()))

    def follow_second(self, token_id: int) -> Followed:
        return self._take(Follow(1, np.array([token_id], np.int32).tobytes()))

    def look(self, guesses: list[int], most: int) -> tuple[list[int], Int32]:
        found = self._take(Look(0, np.array(guesses, np.int32).tobytes(), most))
        assert not found.refusal and not found.over
        drafts = np.frombuffer(found.drafts, np.int32).tolist()
        return drafts, np.frombuffer(found.mask, np.int32).reshape(len(drafts), VOCAB // 32)

    def _take(self, message: Begin | Follow | Look) -> Followed:
        followed = self._follower.take(message)
        assert followed is not None
        return followed


def allowed(mask: bytes) -> list[int]:
    found: list[int] = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).tolist()
    return found


def walk(vocabulary: Vocabulary, grammar: Grammar, folder: Path, seed: int) -> Iterator[tuple[Ways, random.Random]]:
    """Along a random answer, until it ends."""
    randomly = random.Random(seed)
    ways = Ways(vocabulary, grammar, folder, min_tokens=seed % 3 * 4, stops=seed % 2 == 0)
    for _ in range(60):
        yield ways, randomly
        assert ways.followed == ways.expected
        choices = [token_id for token_id in allowed(ways.expected.mask) if token_id != EOS]
        if ways.expected.over or not choices:
            return
        ways.follow(randomly.choice(choices))


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
@pytest.mark.parametrize("seed", range(4))
def test_a_look_leaves_the_way_where_it_was(
    vocabulary: Vocabulary, grammar: Grammar, tmp_path: Path, seed: int
) -> None:
    for ways, randomly in walk(vocabulary, grammar, tmp_path, seed):
        for _ in range(2):
            ways.look([randomly.choice([*allowed(ways.expected.mask), randomly.randrange(VOCAB)])] * 3, 6)


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
def test_the_masks_behind_drafts_are_those_of_an_answer_that_has_them(
    vocabulary: Vocabulary, grammar: Grammar, tmp_path: Path
) -> None:
    num_drafts = 0
    for seed in range(6):
        ways = Ways(vocabulary, grammar, tmp_path, min_tokens=seed, stops=seed % 2 == 0)
        randomly, known = random.Random(seed), ways.expected
        for _ in range(12):
            choices = [one for one in allowed(known.mask) if one != EOS]
            if known.over or not choices:
                break
            drafts, masks = ways.look([randomly.choice(choices), randomly.randrange(VOCAB)], 6)
            for draft, mask in zip(drafts, masks, strict=True):
                assert draft != EOS and may_come(np.frombuffer(known.mask, np.int32), draft)
                known = ways.follow_second(draft)
                assert known.mask == mask.tobytes() and not known.over and not known.refusal
                num_drafts += 1
            ways.follow_first(drafts)
            assert ways.followed == known
            choices = [one for one in allowed(known.mask) if one != EOS] or choices
            ways.follow(randomly.choice(choices))
            known = ways.expected
            if known.refusal:
                break
    assert num_drafts > 20


def test_what_the_grammar_leaves_no_choice_of_is_a_draft(vocabulary: Vocabulary, tmp_path: Path) -> None:
    ways = Ways(vocabulary, GRAMMARS["compact"], tmp_path, 0, stops=True)
    drafts, _ = ways.look([], 40)
    assert TOKENIZER.decode(drafts, skip_special_tokens=False).startswith('{"name": ')
    assert len(ways.look([], 3)[0]) == 3


def test_guesses_go_before_it_as_far_as_they_may_come(vocabulary: Vocabulary, tmp_path: Path) -> None:
    ways = Ways(vocabulary, GRAMMARS["ebnf"], tmp_path, 0, stops=False)
    spelled = [TOKENIZER.token_to_id("Ġ" if char == " " else char) for char in "the the x"]
    assert ways.look(spelled, 9)[0][:8] == spelled[:8]
    assert ways.look(spelled[-1:], 9)[0] == ways.look([], 9)[0]


def test_an_answer_that_would_be_over_has_no_draft_of_its_last_token(vocabulary: Vocabulary, tmp_path: Path) -> None:
    ways = Ways(vocabulary, GRAMMARS["choice"], tmp_path, 0, stops=False)
    spelled = [TOKENIZER.token_to_id("Ġ" if char == " " else char) for char in "not at all"]
    assert ways.look(spelled, 40)[0] == spelled[:-1]


@pytest.mark.parametrize(("name", "seconds"), [("_MASK_SECONDS", -1.0), ("_LOOK_SECONDS", 0.0)])
def test_slow_masks_are_no_masks_of_drafts(
    vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seconds: float
) -> None:
    monkeypatch.setattr(follower_process, name, seconds)
    ways = Ways(vocabulary, GRAMMARS["compact"], tmp_path, 0, stops=True)
    assert ways.look([], 4)[0] == []


def test_a_fault_of_the_library_behind_a_draft_is_no_fault_of_the_answer(
    vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = Ways(vocabulary, GRAMMARS["compact"], tmp_path, 0, stops=True)
    way = ways._follower._ways[0]
    ahead = way._look_ahead
    monkeypatch.setattr(way, "_look_ahead", _raise)
    assert ways.look([], 4)[0] == []
    monkeypatch.setattr(way, "_look_ahead", ahead)
    for token_id in TOKENIZER.encode('{"').ids:
        ways.follow(token_id)
    assert ways.followed == ways.expected and not ways.followed.refusal
    assert ways.look([], 4)[0] == []  # once is enough


def _raise() -> tuple[Int32, bool]:
    raise RuntimeError("std::bad_alloc")
