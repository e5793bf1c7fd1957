"""Templates for sentences, and the small rules of English that they need.

`[a|b]` is one of several wordings (they nest, and one may be empty); `{slot}` is a value, `{slot.his}` an attribute of
it. A template is parsed once.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from functools import lru_cache

from tools.demo_model.words import NUMBER_WORDS

_TOKEN = re.compile(r"[\[\]|]|\{\w+(?:\.\w+)?\}|[^\[\]|{}]+")
_SENTENCE_START = re.compile(r"(?:^|[.!?] +|[“\n])[a-z]")
_BEFORE_A_VOWEL = re.compile(r"\b([Aa]) (?=(?!uni)[aeiouAEIOU])")
_SPACES = re.compile(" {2,}")
_CACHED_TEMPLATES = 8192

Part = str | tuple[str, str] | list["Parts"]  # words, (slot, attribute), or wordings
Parts = list[Part]


@lru_cache(_CACHED_TEMPLATES)
def _parsed(template: str) -> Parts:
    tokens = _TOKEN.findall(template)
    assert "".join(tokens) == template, template
    parts, end = _sequence(tokens, 0)
    assert end == len(tokens), template
    return parts


def _sequence(tokens: list[str], at: int) -> tuple[Parts, int]:
    """Parts up to a "|" or "]" or the end, and where that is."""
    parts: Parts = []
    while at < len(tokens) and tokens[at] not in "|]":
        token = tokens[at]
        if token == "[":
            wordings: list[Parts] = []
            while tokens[at] != "]":
                wording, at = _sequence(tokens, at + 1)
                wordings.append(wording)
            parts.append(wordings)
        elif token[0] == "{":
            slot, _, attribute = token[1:-1].partition(".")
            parts.append((slot, attribute))
        else:
            parts.append(token)
        at += 1
    return parts, at


def _fill(parts: Parts, rng: random.Random, slots: Mapping[str, object], written: list[str]) -> None:
    for part in parts:
        if isinstance(part, str):
            written.append(part)
        elif isinstance(part, tuple):
            value = slots[part[0]]
            written.append(str(getattr(value, part[1]) if part[1] else value))
        else:
            _fill(part[int(rng.random() * len(part))], rng, slots, written)


def write(rng: random.Random, template: str, slots: Mapping[str, object]) -> str:
    """A template's text: one wording of each choice, slots filled, capitals and articles put right."""
    written: list[str] = []
    _fill(_parsed(template), rng, slots, written)
    return sentence("".join(written))


def sentence(text: str) -> str:
    """Sentences begin with capitals, "a" before a vowel is "an", and spaces are single."""
    text = _SPACES.sub(" ", text).strip()
    return _BEFORE_A_VOWEL.sub(r"\1n ", _SENTENCE_START.sub(_last_upper, text))


def _last_upper(found: re.Match[str]) -> str:
    return found[0][:-1] + found[0][-1].upper()


def enumeration(words: list[str]) -> str:
    """ "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def number_word(number: int) -> str:
    """ "three" up to twelve, digits beyond."""
    return NUMBER_WORDS[number] if number < len(NUMBER_WORDS) else str(number)


def article(noun: str) -> str:
    """ "a lamp", "an owl"."""
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith("uni") else f"a {noun}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
