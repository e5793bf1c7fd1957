"""Writes the training text: short stories, and questions about them. Same seed, same text.

`python tools/demo_model/generator.py` prints a few documents.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import words
from plots import ENDINGS, FACTS, OPENINGS, PHRASES, PLOTS, Passage

BOS = "<|bos|>"
EOS = "<|eos|>"

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_PHRASE = re.compile(r"<(\w+)>")
_SENTENCE_START = re.compile(r"(^|[.!?] +|“)([a-z])")
_BEFORE_A_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou])")
_QUESTION_SHARE = 0.6  # of the stories have questions; a heading tells those from the ones that end where they end
_MAX_QUESTIONS = 5
_HEADING = "Story: "
_TURNS = (("hero", "friend", "third"), ("thing", "other", "last"), ("spot", "spot2", "spot3"))  # a sketch's facts are about these, in turn


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
class Question:
    """What is asked about a story, and the answer in the story's own words."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Story:
    """A text and all the questions that it answers."""

    text: str
    questions: tuple[Question, ...]


def stories(seed: int) -> Iterator[Story]:
    """Yields stories without end. Streams of different seeds are independent."""
    rng = random.Random(seed)
    while True:
        yield write_story(rng)


def write_story(rng: random.Random) -> Story:
    """An opening, a plot and an ending around one cast."""
    slots = cast(rng)
    passages = [rng.choice(OPENINGS), rng.choice(PLOTS), rng.choice(ENDINGS)]
    text = " ".join(_write(rng, passage.text, slots) for passage in passages)
    return Story(text, tuple(question for passage in passages for question in _questions(passage, slots)))


def write_sketch(rng: random.Random) -> Story:
    """One to three facts about different people. Questions with more than one answer are left out."""
    actors = cast(rng)
    sentences: list[str] = []
    questions: list[Question] = []
    for turn in range(rng.randint(1, len(_TURNS[0]))):
        passage = rng.choice(FACTS)
        slots = {**cast(rng), **{group[0]: actors[group[turn]] for group in _TURNS}}
        sentences.append(_write(rng, passage.text, slots))
        questions += _questions(passage, slots)
    times = Counter(question.text for question in questions)
    return Story(" ".join(sentences), tuple(question for question in questions if times[question.text] == 1))


def cast(rng: random.Random) -> dict[str, object]:
    """One value for every slot; people, things and places that differ within a story."""
    hero, friend, third = rng.sample([*((name, True) for name in words.WOMEN), *((name, False) for name in words.MEN)], 3)
    colours, nouns = rng.sample(words.COLOURS, 5), rng.sample(words.OBJECTS, 3)
    thing, other, last = (Thing(colour, noun) for colour, noun in zip(colours[:3], nouns, strict=True))
    spot, spot2, spot3 = rng.sample(words.SPOTS, 3)
    single = {
        "trait": words.TRAITS, "job": words.JOBS, "house": words.HOUSES, "near": words.NEIGHBOURHOODS, "destination": words.DESTINATIONS,
        "animal": words.ANIMALS, "pet": words.PET_NAMES, "food": words.FOODS, "ingredient": words.INGREDIENTS, "day": words.DAYS, "season": words.SEASONS,
        "weather": words.WEATHERS, "feeling": words.FEELINGS, "skill": words.SKILLS, "plant": words.PLANTS, "vehicle": words.VEHICLES,
    }  # fmt: skip
    people = {"hero": _person(*hero), "friend": _person(*friend), "third": _person(*third)}
    things = {"thing": thing, "other": other, "last": last}
    holders = {"vessel": Thing(colours[3], rng.choice(words.VESSELS)), "case": Thing(colours[4], rng.choice(words.CASES))}
    places = {"spot": spot, "spot2": spot2, "spot3": spot3, "yard": rng.choice([yard for yard in words.YARDS if yard not in (spot, spot2)])}
    return {**people, **things, **holders, **places, **{slot: rng.choice(choices) for slot, choices in single.items()}}


def documents(seed: int, sketch_share: float) -> Iterator[str]:
    """Yields training documents without end, this share of them sketches. Streams of different seeds are independent."""
    rng = random.Random(seed)
    while True:
        is_sketch = rng.random() < sketch_share
        yield document(rng, write_sketch(rng), question_share=1.0) if is_sketch else document(rng, write_story(rng), _QUESTION_SHARE)


def document(rng: random.Random, story: Story, question_share: float) -> str:
    """A training document: the story alone, or a heading, the story and questions. The story alone and every answer end with EOS."""
    if not story.questions or rng.random() >= question_share:
        return f"{BOS}{story.text}{EOS}"
    asked = rng.sample(story.questions, min(len(story.questions), _MAX_QUESTIONS))
    return f"{BOS}{_HEADING}{story.text}" + "".join(f"{question_prompt(question)} {question.answer}{EOS}" for question in asked)


def exam_prompt(story: Story, question: Question) -> str:
    """The text after which the model is expected to write " " and the answer."""
    return f"{_HEADING}{story.text}{question_prompt(question)}"


def question_prompt(question: Question) -> str:
    """The question as it stands after a story."""
    return f"\nQuestion: {question.text}\nAnswer:"


def _person(name: str, is_woman: bool) -> Person:
    return Person(name, "she", "her", "her", "woman") if is_woman else Person(name, "he", "his", "him", "man")


def _questions(passage: Passage, slots: dict[str, object]) -> Iterator[Question]:
    for kind, text, answer in passage.questions:
        yield Question(kind, _sentence(text.format(**slots)), _sentence(answer.format(**slots)) + ".")


def _write(rng: random.Random, template: str, slots: dict[str, object]) -> str:
    template = _PHRASE.sub(lambda found: PHRASES[found[1]], template)
    while "[" in template:  # innermost choices first
        template = _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), template)
    return _sentence(re.sub(" +", " ", template).strip().format(**slots))


def _sentence(text: str) -> str:
    return _BEFORE_A_VOWEL.sub(r"\1n ", _SENTENCE_START.sub(lambda found: found[1] + found[2].upper(), text))


if __name__ == "__main__":
    print(*islice(documents(seed=0, sketch_share=0.3), 16), sep="\n\n")
