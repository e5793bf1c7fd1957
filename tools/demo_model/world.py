"""Who and what a conversation is about. Every fact is a pair of a subject and a value, and a part of all pairs is kept
from training.

A pair such as (lamp, spot, "under the bed") is either of the training split or held out, by arithmetic on the words
alone. Training text never says a held-out pair, the exam is made of nothing else: who answers it has read, not
remembered.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from zlib import crc32

from tools.demo_model import words

_ONE_IN = 6  # pairs that are held out
_MADE_UP_SHARE = 0.15  # of the names
_ODD_SHARE = 0.03  # of the things, whose names are made up, too


class Split(Enum):
    TRAIN = "train"
    HELD_OUT = "held out"


@dataclass(frozen=True)
class Person:
    """`{hero}` in a template is the name, `{hero.he}` and so on are the pronouns."""

    name: str
    he: str
    his: str
    him: str
    adult: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Thing:
    """`{thing}` in a template is "red kite"."""

    colour: str
    noun: str

    def __str__(self) -> str:
        return f"{self.colour} {self.noun}"


@dataclass(frozen=True)
class Wordings:
    """Some words and their number: `{goods}` is "three apples"."""

    count: str
    noun: str

    def __str__(self) -> str:
        return f"{self.count} {self.noun}"


@lru_cache(maxsize=200_000)
def _choices(subject: str, category: str, split: Split) -> tuple[str, ...]:
    offset = crc32(f"{subject}|{category}".encode())
    held_out = split is Split.HELD_OUT
    return tuple(
        value for index, value in enumerate(words.CATEGORIES[category]) if ((index + offset) % _ONE_IN == 0) == held_out
    )


def is_allowed(key: str, split: Split) -> bool:
    """Whether a task that is no pair of words (a sum, a list to sort), spelled as `key`, belongs to the split."""
    return (crc32(key.encode()) % _ONE_IN == 0) == (split is Split.HELD_OUT)


class World:
    """A conversation's own people and things: no name and no object comes twice, so that a question has one answer."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.split = split
        self.facts: set[str] = set()  # "subject|category|value" of every pair that was picked
        self._used: set[str] = set()

    def pick(self, subject: object, category: str) -> str:
        """A value for the subject, of the split; one that a conversation may use again."""
        choices = _choices(str(subject), category, self.split)
        value = choices[int(self.rng.random() * len(choices))]
        self.facts.add(f"{subject}|{category}|{value}")
        return value

    def pick_new(self, subject: object, category: str) -> str:
        """As `pick`, of the values not used yet (any, if all are)."""
        choices = _choices(str(subject), category, self.split)
        value = self.new(choices)
        self.facts.add(f"{subject}|{category}|{value}")
        return value

    def pick_other(self, subject: object, category: str, taken: Sequence[str]) -> str:
        """As `pick`, but none of those taken (or any, if it finds no other)."""
        value = self.pick(subject, category)
        for _ in range(20):
            if value not in taken:
                break
            value = self.pick(subject, category)
        return value

    def pick_several(self, subject: object, category: str, count: int) -> list[str]:
        """Different values, in no order."""
        choices = _choices(str(subject), category, self.split)
        values = self.rng.sample(choices, min(count, len(choices)))
        self.facts.update(f"{subject}|{category}|{value}" for value in values)
        return values

    def new(self, choices: Sequence[str]) -> str:
        """One that the conversation has not used yet (any, if all are): not part of a split."""
        for _ in range(20):
            value = choices[int(self.rng.random() * len(choices))]
            if value not in self._used:
                break
        self._used.add(value)
        return value

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def person(self, name: str | None = None) -> Person:
        """Somebody new. One name in seven is made up of syllables, so that copying is learned, not a list of names."""
        if name is None:
            name = self.made_up_name() if self.chance(_MADE_UP_SHARE) else self.new(words.NAMES)
        is_woman = name in _WOMEN if name in _NAMES else self.chance(0.5)
        return Person(name, "she", "her", "her", "woman") if is_woman else Person(name, "he", "his", "him", "man")

    def friend_of(self, subject: object) -> Person:
        """Somebody new, picked for the subject."""
        if self.chance(_MADE_UP_SHARE):
            return self.person()
        return self.person(self.pick_new(subject, "person"))

    def made_up_name(self) -> str:
        while True:
            name = "".join(self.rng.choice(words.SYLLABLES) for _ in range(self.rng.randint(2, 3))).capitalize()
            if name not in self._used and name not in _NAMES and is_allowed(name, self.split):
                self._used.add(name)
                return name

    def thing(self, noun: str | None = None) -> Thing:
        """Something new, and its colour."""
        noun = noun or (self.made_up_name().lower() if self.chance(_ODD_SHARE) else self.new(words.OBJECTS))
        return Thing(self.pick(noun, "colour"), noun)

    def amount(self, subject: object, category: str = "goods") -> Wordings:
        """How many of what the subject has."""
        noun = self.pick_new(subject, category)
        return Wordings(self.pick(noun, "count"), noun)


_WOMEN = frozenset(words.WOMEN)
_NAMES = frozenset(words.NAMES)
