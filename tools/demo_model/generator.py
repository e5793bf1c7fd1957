"""Writes the conversations that the demo model is trained and examined on. Same seed, same text.

`python -m tools.demo_model.generator` prints a few.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from tools.demo_model.chat import Answer, Conversation, Exchange, rendered
from tools.demo_model.memory import TRAITS, Told, correction, facts, introduction
from tools.demo_model.memory import unknown as untold
from tools.demo_model.papers import json_record, letter, notes, paper, people_table
from tools.demo_model.records import records
from tools.demo_model.smalltalk import Manner, about_itself, greeting, manner, nothing_told, talk, unknown
from tools.demo_model.stories import Story, given, plain, told, write_story
from tools.demo_model.story_questions import questions
from tools.demo_model.sums import sums
from tools.demo_model.wordplay import wordplay
from tools.demo_model.world import Split, World

CHARACTERS_A_TOKEN = 3.3  # about; decides only how long a long conversation is
_LONG = (450, 1850)  # tokens

Part = Callable[[World, str | None], list[Exchange]]


@dataclass(frozen=True)
class Mix:
    """How often each form of conversation comes."""

    forms: tuple[str, ...]
    shares: tuple[float, ...]


EARLY = Mix(  # short: where looking things up is learned
    ("sketch", "notes", "given", "paper", "tasks", "talk", "memory", "told", "letter"),
    (20, 6, 4, 3, 4, 1, 3, 1, 1),
)
MAIN = Mix(
    ("told", "given", "paper", "letter", "notes", "tasks", "talk", "memory", "long", "mixed", "book"),
    (10, 14, 9, 4, 4, 22, 7, 10, 12, 8, 3),
)


def conversations(seed: int | str, split: Split, mix: Mix = MAIN) -> Iterator[Conversation]:
    """Yields conversations without end. Streams of different seeds are independent."""
    rng = random.Random(f"{split.value} {seed}")
    while True:
        yield conversation(rng, split, rng.choices(mix.forms, mix.shares)[0])


def conversation(rng: random.Random, split: Split, form: str) -> Conversation:
    """One conversation of a form that MAIN or EARLY names, or "ten turns"."""
    world = World(rng, split)
    if form == "book":
        text = plain(world, [write_story(world, rng.randint(1, 3)) for _ in range(rng.randint(1, 2))])
        return Conversation(text=text, facts=frozenset(world.facts))
    bearing = manner(world)
    exchanges = _FORMS[form](world, bearing)
    if world.chance(0.08) and form != "long":
        exchanges.insert(0, greeting(world) if world.chance(0.7) else nothing_told(world))
    return Conversation(tuple(exchanges), bearing.style, facts=frozenset(world.facts))


# ---- parts of conversations


def _story_told(world: World, bearing: Manner, most: int = 5) -> list[Exchange]:
    story = write_story(world, world.rng.choice((1, 1, 1, 2)))
    return [told(world, story), *questions(world, story, world.rng.randint(0, most))]


def _story_given(world: World, bearing: Manner, most: int = 7) -> list[Exchange]:
    story = write_story(world, world.rng.choice((1, 1, 1, 2, 3)))
    return given(world, story, questions(world, story, world.rng.randint(1, most)))


def _paper(world: World, bearing: Manner) -> list[Exchange]:
    return paper(world, world.rng.randint(1, 7))


def _letter(world: World, bearing: Manner) -> list[Exchange]:
    return letter(world, world.rng.randint(1, 6))


def _notes(world: World, bearing: Manner) -> list[Exchange]:
    return notes(world, world.rng.randint(1, 6), world.rng.randint(3, 9))


def _sketch(world: World, bearing: Manner) -> list[Exchange]:
    """A fact or two and a question: the shortest conversation in which something must be looked up."""
    return notes(world, world.rng.randint(1, 2), world.rng.randint(1, 3))


def _tasks(world: World, bearing: Manner) -> list[Exchange]:
    some = [
        each for make in (sums, wordplay, records) if world.chance(0.6) for each in make(world, world.rng.randint(1, 5))
    ]
    world.rng.shuffle(some)
    return some or sums(world, 3)


def _talk(world: World, bearing: Manner) -> list[Exchange]:
    groups = [
        *talk(world, world.rng.randint(1, 5), bearing.name),
        *([unknown(world)] for _ in range(world.rng.randint(0, 4))),
    ]
    if bearing.name:
        groups += [[about_itself(world, bearing.name)], sums(world, 1)]
    world.rng.shuffle(groups)
    return [each for group in groups for each in group]


def _filler(world: World, bearing: Manner) -> list[Exchange]:
    """Talk about something else."""
    make = world.rng.choice((_story_told, _tasks, _tasks, _talk))
    return make(world, bearing)


def _memory(world: World, bearing: Manner) -> list[Exchange]:
    """Facts about the user, other talk, the facts asked for: two to ten exchanges and more."""
    found = facts(world, world.rng.randint(1, 5))
    exchanges: list[Exchange] = []
    if len(found) > 1 and world.chance(0.3):
        exchanges.append(introduction(world, found))
    else:
        for each in found:
            exchanges.append(each.telling)
            if world.chance(0.35):
                exchanges += world.rng.choice((sums, wordplay, records))(world, 1)
    if world.chance(0.12):
        _correct(world, found, exchanges)
    exchanges += [each for _ in range(world.rng.randint(0, 2)) for each in _filler(world, bearing)[:4]]
    return exchanges + _recalls(world, found)


def _correct(world: World, found: list[Told], exchanges: list[Exchange]) -> None:
    """The user takes one fact back and says another instead."""
    index = world.rng.randrange(len(found))
    trait = next(
        (trait for trait in TRAITS if found[index].recall.answer.full.startswith(trait.full.split("{")[0])), None
    )
    other = trait and correction(world, found[index], trait)
    if other:
        found[index] = other
        exchanges.append(other.telling)


def _recalls(world: World, found: list[Told]) -> list[Exchange]:
    asked = [each.recall for each in world.rng.sample(found, len(found))]
    if world.chance(0.25):
        asked.insert(world.rng.randrange(len(asked) + 1), untold(world, found))
    return asked


def _ten_turns(world: World, bearing: Manner) -> list[Exchange]:
    """Ten exchanges: four facts about the user, two of something else, the four facts again."""
    found = facts(world, 6)[:4]
    between = [sums(world, 1)[0], talk(world, 1, bearing.name)[0][0]]
    return [*(each.telling for each in found), *between, *(each.recall for each in world.rng.sample(found, len(found)))]


def _mixed(world: World, bearing: Manner) -> list[Exchange]:
    return [each for _ in range(world.rng.randint(2, 4)) for each in world.rng.choice(_MIXABLE)(world, bearing)]


def _long(world: World, bearing: Manner) -> list[Exchange]:
    """Stories, a table and facts about the user first, then other talk, and at the end what was said at the
    beginning.
    """
    length = world.rng.uniform(*_LONG) * CHARACTERS_A_TOKEN
    exchanges, late = _sources(world)
    late_length = sum(len(each.user) + len(each.answer.full) for each in late)
    while sum(len(each.user) + len(each.answer.full) for each in exchanges) + late_length < length:
        exchanges += _filler(world, bearing)
    return exchanges + world.rng.sample(late, len(late))


def _sources(world: World) -> tuple[list[Exchange], list[Exchange]]:
    """What is told at the beginning of a long conversation, and what is asked at its end."""
    exchanges: list[Exchange] = []
    late: list[Exchange] = []
    sorts = world.rng.choices(("given", "told", "table", "user"), (3, 3, 2, 2), k=world.rng.randint(1, 2))
    for sort in dict.fromkeys(sorts):
        if sort == "user":
            found = facts(world, world.rng.randint(1, 4))
            exchanges += [each.telling for each in found]
            late += _recalls(world, found)
        elif sort == "table":
            sheet = world.rng.choice((people_table, json_record))(world)
            asked = [
                each for each in sheet.exchanges if each.answer.evidence and not each.answer.kind.endswith("compare")
            ]
            exchanges.append(
                Exchange(sheet.text, Answer("read", f"I have read the {sheet.sort}. What would you like to know?"))
            )
            late += world.rng.sample(asked, min(len(asked), world.rng.randint(1, 5)))
        else:
            story = write_story(world, world.rng.choice((1, 1, 2)))
            asked = questions(world, story, world.rng.randint(2, 8))
            soon = len(asked) // 3
            exchanges += given(world, story, asked[:soon]) if sort == "given" else [told(world, story), *asked[:soon]]
            late += [_back_to(world, story, each) for each in asked[soon:] if each.answer.kind != "story hero"]
    return exchanges, late


def _back_to(world: World, story: Story, exchange: Exchange) -> Exchange:
    """The question with a word on which story it is about."""
    if any(name in exchange.user for name in story.people) and world.chance(0.5):
        return exchange
    question = exchange.user
    if not question.startswith(("In ", "Answer", *story.people)):
        question = question[0].lower() + question[1:]
    opening = world.rng.choice(
        ("In the story about {}, {}", "Back to the story about {}: {}", "About {}: {}", "In the story of {}, {}")
    )
    return replace(exchange, user=opening.format(story.hero, question))


_FORMS: dict[str, Callable[[World, Manner], list[Exchange]]] = {
    "told": _story_told, "given": _story_given, "paper": _paper, "letter": _letter, "notes": _notes, "tasks": _tasks, "talk": _talk, "memory": _memory,
    "long": _long, "mixed": _mixed, "ten turns": _ten_turns, "sketch": _sketch,
}  # fmt: skip
_MIXABLE = (_story_told, _story_given, _paper, _letter, _tasks, _talk, _memory)


if __name__ == "__main__":
    for shown in islice(conversations(0, Split.TRAIN), 12):
        print(
            shown.text
            or rendered(shown.turns).replace("<|user|>", "\n<|user|>").replace("<|assistant|>", "\n<|assistant|>"),
            end="\n\n",
        )
