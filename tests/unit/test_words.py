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


def is_misused(word: str, file: str, name: str) -> bool:
    if word not in [part.removesuffix("s") for part in name.lower().split("_")]:
        return False
    return not re.fullmatch(MEANINGS[word], name.lower()) or file not in ONLY_IN.get(word, {file})


@cache
def suspects() -> dict[Path, set[str]]:
    """By file, what may be the name of something, or in a comment or text, and has a word that means something else."""
    found = {}
    for wing in WINGS:
        for path in (ROOT / wing).rglob("*.py"):
            file, used = str(path.relative_to(ROOT)), set(re.findall(r"\w+", path.read_text()))
            found[path] = {name for name in used if any(is_misused(word, file, name) for word in MEANINGS)}
    return found


@cache
def names_in(path: Path) -> set[str]:
    with path.open() as source:
        return {token.string for token in tokenize.generate_tokens(source.readline) if token.type == tokenize.NAME}


@pytest.mark.parametrize("word", MEANINGS)
def test_a_word_has_one_meaning_in_names(word: str) -> None:
    others = set()
    for path, names in suspects().items():
        file = str(path.relative_to(ROOT))
        if mine := {name for name in names if is_misused(word, file, name)}:
            others |= {(file, name) for name in mine & names_in(path)}
    assert not others, f"{word} means something else in {sorted(others)}"
