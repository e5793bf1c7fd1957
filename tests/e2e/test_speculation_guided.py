"""Answers that follow a grammar, with drafts: each place has its own mask, so that tokens and ends are those of steps
without any.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_backend.arrays import Int32
from paged_backend.engine.engine import Engine
from paged_backend.grammar import follower_process
from paged_backend.grammar.follower_process import Followed, Look, ToFollower
from tests.structured_engine import PROMPT, TOKENIZER, Ended, FollowerHere, load_speaker, run, save_speaker

PEOPLE = {
    "type": "object",
    "properties": {
        "people": {
            "type": "array",
            "minItems": 3,
            "maxItems": 5,
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0}},
                "required": ["name", "age"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["people"],
    "additionalProperties": False,
}
COMPACT = {"structured_outputs": {"json": PEOPLE, "disable_any_whitespace": True}}
CALL = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<call>",
        "content": {"type": "json_schema", "json_schema": PEOPLE},
        "end": "</call>",
    },
}
KINDS: tuple[dict[str, Any], ...] = (
    COMPACT | {"temperature": 0},
    COMPACT | {"seed": 11, "temperature": 2.0, "top_k": 60, "logprobs": 1},
    COMPACT | {"seed": 12, "ignore_eos": True},
    {"guided_json": PEOPLE, "seed": 13, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"guided_regex": "(yes, please; )*no", "temperature": 0, "frequency_penalty": -2.0, "max_tokens": 40},
    {"guided_regex": "(ab){3,9}", "seed": 14, "min_tokens": 8, "ignore_eos": True},
    {"guided_regex": "(aa)+", "bad_words": ["a"]},
    {"guided_regex": "x(abcabc)+", "seed": 15, "stop_token_ids": [70]},
    {"guided_choice": ["not at all, not at all", "not even not even now"], "ignore_eos": True},
    {"structured_outputs": {"structural_tag": json.dumps(CALL)}, "seed": 16, "max_tokens": 60},
    {"guided_regex": "(the )+", "allowed_token_ids": list(range(4, 120)), "max_tokens": 30, "frequency_penalty": -1.0},
    COMPACT | {"temperature": 0, "max_tokens": 17},
    {"max_tokens": 40, "temperature": 0, "frequency_penalty": -2.0, "ignore_eos": True},
)


@pytest.fixture(autouse=True)
def time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look at drafts, however slow the machine is."""
    monkeypatch.setattr(follower_process, "_LOOK_SECONDS", 5.0)
    monkeypatch.setattr(follower_process, "_MASK_SECONDS", 5.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaker(tmp_path_factory.mktemp("speaker"))


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Ended]:
    engine = load_speaker(folder, tmp_path_factory.mktemp("plain"), speculation="off")
    found = run(engine, KINDS)
    assert engine.stats().drafts_proposed == 0
    return found


def load(folder: Path, exports: Path, steps_ahead: int = 0, **options: Any) -> Engine:
    given = {"speculation": "ngram", "num_speculative_tokens": 5, "debug_checks": True}
    engine = load_speaker(folder, exports, **(given | options))
    engine._steps_ahead = steps_ahead
    return engine


def ends(found: list[Ended]) -> list[tuple[list[int], str]]:
    return [(one.token_ids, one.reason) for one in found]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_pages": 48, "page_size": 8, "max_model_len": 256, "max_num_sequences": 8},
        {"speculation": "auto"},
        {"speculation": "draft"},
    ],
    ids=["ngram", "few pages", "auto", "draft"],
)
def test_tokens_and_ends_are_those_without_drafts(
    folder: Path, tmp_path: Path, expected: list[Ended], steps_ahead: int, options: dict[str, Any]
) -> None:
    """Whoever guesses for others: forms are guessed on the host."""
    if options.get("speculation") == "draft":
        options = options | {"draft_model": str(folder)}
    engine = load(folder, tmp_path, steps_ahead, **options)
    assert ends(run(engine, KINDS)) == ends(expected)
    stats = engine.stats()
    assert stats.pages_held == 0 and stats.drafts_proposed >= stats.drafts_accepted
    assert options.get("speculation") == "auto" or stats.drafts_accepted > 50


@pytest.mark.one_in(2)
@pytest.mark.parametrize("quality", [1.0, 0.5])
@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_guesses_right_and_wrong_change_no_token(
    folder: Path, tmp_path: Path, expected: list[Ended], steps_ahead: int, quality: float
) -> None:
    """The guesses are the answer itself, or any token: of those that the grammar forbids nothing is a draft."""
    engine = load(folder, tmp_path, steps_ahead)
    scheduler, randomly = engine._scheduler, np.random.default_rng(0)
    texts = [[*PROMPT, *one.token_ids] for one in expected]
    table, speculation = scheduler._running.table, scheduler.speculation
    asked = speculation._guesses

    def guesses(row: int) -> tuple[Int32, int]:
        _, most = asked(row)
        sequence, known = table.sequences[row], int(table.num_known[row])
        assert sequence is not None
        following = np.array(texts[sequence.request_id][known : known + most], np.int32)
        wrong = randomly.random(len(following)) >= quality
        return np.where(wrong, randomly.integers(0, 260, len(following)), following).astype(np.int32), most

    speculation._guides.guesses = guesses
    assert ends(run(engine, KINDS)) == ends(expected)
    stats = engine.stats()
    assert stats.drafts_accepted > 50 * quality**2
    assert quality == 1.0 or stats.drafts_proposed > stats.drafts_accepted + 10


def test_a_step_waits_for_no_draft(folder: Path, tmp_path: Path, expected: list[Ended]) -> None:
    """What a look has found comes too late each time."""

    class Late(FollowerHere):
        """Looks are answered when what comes after them is."""

        def __init__(self, inner: FollowerHere) -> None:
            super().__init__(inner._follower._vocabulary)
            self._late: list[tuple[bool, Followed]] = []

        def send(self, message: ToFollower) -> None:
            super().send(message)
            self._late += [(isinstance(message, Look), one) for one in super().replies()]

        def replies(self) -> list[Followed]:
            ready = max((place + 1 for place, (looks, _) in enumerate(self._late) if not looks), default=0)
            found, self._late = self._late[:ready], self._late[ready:]
            return [one for _, one in found]

    engine = load(folder, tmp_path)
    follower = engine._scheduler.speculation._guides._follower
    open_link = follower._open_link
    follower._open_link = lambda: Late(open_link())  # type: ignore[arg-type]
    assert ends(run(engine, KINDS)) == ends(expected)
    # The row without a grammar has some; and where a grammar was compiled later than others, its first mask hastens
    # what was found for those. In time there are more than 600.
    assert engine.stats().drafts_proposed < 150


def test_what_a_grammar_leaves_no_choice_of_needs_no_text(folder: Path, tmp_path: Path) -> None:
    """The keys of a schema come in fewer steps the first time already."""
    engine = load(folder, tmp_path)
    guides = engine._scheduler.speculation._guides
    asked = guides.guesses
    guides.guesses = lambda row: (np.empty(0, np.int32), asked(row)[1])
    found = run(engine, [COMPACT | {"temperature": 0, "max_tokens": 60}])
    stats = engine.stats()
    assert len(found[0].token_ids) == 60 and stats.drafts_accepted > 0.8 * stats.drafts_proposed > 10


def test_wrong_drafts_pause_and_are_tried_again(folder: Path, tmp_path: Path) -> None:
    letters = {"guided_regex": "[a-z]{300}", "temperature": 0}
    plain = run(load(folder, tmp_path / "plain", speculation="off"), [letters])[0].token_ids
    engine = load(folder, tmp_path / "drafting")
    asked, a = engine._scheduler.speculation._guides.guesses, TOKENIZER.token_to_id("a")

    def guesses(row: int) -> tuple[Int32, int]:
        most = asked(row)[1]
        num_known = int(engine._scheduler._running.table.num_known[row]) - len(PROMPT)
        following = np.array(plain[num_known : num_known + most], np.int32)
        return following if num_known > 12 else np.full_like(following, a), most

    engine._scheduler.speculation._guides.guesses = guesses
    assert a not in plain[:13]
    assert run(engine, [letters])[0].token_ids == plain
    stats = engine.stats()
    assert stats.drafts_accepted > 20 and 0 < stats.drafts_proposed - stats.drafts_accepted < 10


def test_a_caller_who_wants_no_drafts_has_none(folder: Path, tmp_path: Path, expected: list[Ended]) -> None:
    engine = load(folder, tmp_path)
    assert ends(run(engine, [KINDS[0] | {"speculation": "off"}])) == ends(expected[:1])
    assert engine.stats().drafts_proposed == 0
