"""Words that could mean several things mean one in this code's names: docs/architecture.md, "Words"."""

from __future__ import annotations

import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WINGS = ("paged_backend", "kernels", "client")
# word -> what a name that has it may be called: a token's place in the pool, or a place for an adapter; a page with a
# reference count of at least 1; a message of a conversation
MEANINGS = {
    "slot": r"slots?|slot_mapping|num_held_slots|slots_settled|__slots__"
    r"|(_?(no|num|row|token|max)_)?_?adapter_?slots?\w*",
    "held": r"held|num_held|_?pages_held\w*|held_pages|num_held_slots|_?held(_glyph)?",
    "turn": r"turns?",
    # a speculative token; the model that makes them, and what config.json calls its vocabulary
    "draft": r"_?(num_|max_|most_|next_|with_|right_)?drafts?"
    r"(_of|_proposed|_accepted|_checked|_from_text|_must_pay)?|draft_model|draft_vocab_size",
    "berth": r"(?!)",
    "told": r"(?!)",
    "serial": r"(?!)",
}
ONLY_IN = {"turn": {"client/chat.py"}}


@cache
def names() -> set[tuple[str, str]]:
    """(file, name) of every identifier."""
    found = set()
    for wing in WINGS:
        for path in (ROOT / wing).rglob("*.py"):
            with path.open() as source:
                found |= {
                    (str(path.relative_to(ROOT)), token.string)
                    for token in tokenize.generate_tokens(source.readline)
                    if token.type == tokenize.NAME
                }
    return found


@pytest.mark.parametrize("word", MEANINGS)
def test_a_word_has_one_meaning_in_names(word: str) -> None:
    using = {
        (file, name) for file, name in names() if word in [part.removesuffix("s") for part in name.lower().split("_")]
    }
    others = {
        (file, name)
        for file, name in using
        if not re.fullmatch(MEANINGS[word], name.lower()) or file not in ONLY_IN.get(word, {file})
    }
    assert not others, f"{word} means something else in {sorted(others)}"
