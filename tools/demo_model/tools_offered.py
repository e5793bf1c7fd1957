"""Tools that conversations offer: what they are called, what they take, how users ask for them, what they find and how
that is said. A tool's name, its arguments' names and its description are drawn anew each time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tools.demo_model import words
from tools.demo_model.phrasing import write
from tools.demo_model.world import World, is_allowed

_BEGINNINGS = (*"bcdfghjklmnprstvwyz", "ch", "sh", "th", "st", "br", "cl", "fr", "gr", "pl", "tr", "sc", "qu", "", "")
_VOWELS = (*"aeiou" * 3, "ee", "oo", "ai", "ea", "ou", "y")
_ENDS = (*"nrstlmdk", "rry", "ng", "ck", "sh", "st", "ll", "w", "x", "", "", "", "")

Value = Any  # of JSON
Draw = Callable[[World, str], Value]  # (world, the subject for which it is drawn)


@dataclass(frozen=True)
class Parameter:
    key: str  # its name in templates
    names: str  # what a tool may call it
    draw: Draw
    type: str = "string"
    enum: tuple[str, ...] = ()
    phrase: str = ""  # said when it is given; "": always given, and said in the question
    about: str = ""


@dataclass(frozen=True)
class Kind:
    """A sort of tools. Templates are phrasing's; `{x}` is the first parameter's value."""

    key: str
    verbs: str
    nouns: str
    about: str
    ask: str
    said: str  # `{result}` is what the tool found
    result: Draw
    parameters: tuple[Parameter, ...] = ()
    is_lookup: bool = False  # of one thing about a subject: two subjects can be asked for at once
    short: bool = True  # the result alone is an answer, too


@dataclass(frozen=True)
class Offered:
    """A tool of a conversation."""

    kind: Kind
    description: Mapping[str, Any]
    names: Mapping[str, str]  # of its arguments, by the parameters' keys

    @property
    def name(self) -> str:
        return str(self.description["function"]["name"])

    @property
    def noun(self) -> str:
        """What its first argument is called, in words."""
        return spaced(next(iter(self.names.values()), "thing"))


def spaced(name: str) -> str:
    """ "item_name", "itemName" → "item name"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower()


# ---- what values are drawn from


def of(category: str) -> Draw:
    """A word of a category; one in seven is made up, so that copying is learned."""

    def draw(world: World, subject: str) -> Value:
        if world.chance(0.2):
            return strange_word(world).capitalize() if world.chance(0.6) else world.made_up_name()
        if world.chance(0.08):
            first = world.rng.choice(("New", "San", "Old", "Port", "Saint", "North", strange_word(world).capitalize()))
            return f"{first} {strange_word(world).capitalize()}"
        return world.pick(f"tool {subject}", category)

    return draw


def strange_word(world: World) -> str:
    """A word of any letters: made-up names have 43 syllables, which can be learned by heart, and these cannot."""
    while True:
        syllables = (
            world.rng.choice(_BEGINNINGS) + world.rng.choice(_VOWELS) + world.rng.choice(_ENDS)
            for _ in range(world.rng.randint(1, 3))
        )
        word = "".join(syllables)
        if len(word) > 2 and is_allowed(word, world.split):
            return word


def strictly(category: str) -> Draw:
    return lambda world, subject: world.pick(f"tool {subject}", category)


def one_of(*values: Value) -> Draw:
    return lambda world, subject: world.rng.choice(values)


def number(least: int, most: int) -> Draw:
    def draw(world: World, subject: str) -> Value:
        while True:
            value = world.rng.randint(least, most)
            if most - least < 100 or is_allowed(f"tool {subject} {value}", world.split):
                return value

    return draw


def some_words(least: int, most: int) -> Draw:
    return lambda world, subject: " ".join(
        world.rng.choice(words.PLAIN_WORDS) for _ in range(world.rng.randint(least, most))
    )


def several(category: str) -> Draw:
    return lambda world, subject: world.pick_several(f"tool {subject}", category, world.rng.randint(1, 4))


def clock(world: World, subject: str) -> Value:
    return f"{world.rng.randrange(24)}:{world.rng.randrange(60):02}"


def date(world: World, subject: str) -> Value:
    return f"{world.rng.randint(1, 28)} {world.rng.choice(words.MONTHS)}"


def letters(world: World, subject: str) -> Value:
    return "".join(world.rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(world.rng.randint(2, 5)))


def code(world: World, subject: str) -> Value:
    return f"{letters(world, subject)}{world.rng.choice(('-', ''))}{world.rng.randint(1, 999)}"


# ---- a tool of a kind

_MORE = "[|||||| Use this tool for that.| Returns JSON.| Takes the {p}.| Use it when the user asks.]"


def offered(world: World, kind: Kind) -> Offered:
    """The kind's tool as this conversation has it: names of the split, a schema, perhaps descriptions."""
    names: dict[str, str] = {}
    camel = world.chance(0.15)
    for parameter in kind.parameters:
        name = world.rng.choice([name for name in parameter.names.split() if name not in names.values()])
        names[parameter.key] = _cased(name, camel)
    first = spaced(next(iter(names.values()), "thing"))
    about = write(world.rng, kind.about + _MORE, {"p": first}) if world.chance(0.9) else ""
    properties = {names[each.key]: _schema(world, each) for each in kind.parameters}
    required = [names[each.key] for each in kind.parameters if not each.phrase]
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required or world.chance(0.5):
        parameters["required"] = required
    function: dict[str, Any] = {"name": _name(world, kind, camel)}
    if about:
        function["description"] = about
    return Offered(kind, {"type": "function", "function": function | {"parameters": parameters}}, names)


def _schema(world: World, parameter: Parameter) -> dict[str, Any]:
    kind = parameter.type
    schema: dict[str, Any] = {"type": "array", "items": {"type": kind[1:-1]}} if kind[0] == "[" else {"type": kind}
    if parameter.enum:
        schema["enum"] = list(parameter.enum)
    elif parameter.phrase and world.chance(0.3):
        schema = {"anyOf": [schema, {"type": "null"}]}
    if parameter.about and world.chance(0.35):
        schema["description"] = parameter.about
    return schema


def _name(world: World, kind: Kind, camel: bool) -> str:
    for _ in range(60):
        verb = "" if kind.is_lookup and world.chance(0.2) else world.rng.choice(kind.verbs.split())
        noun = world.rng.choice(kind.nouns.split())
        suffix = world.rng.choice(("",) * 8 + ("_tool", "_info", "_now", "_v2"))
        name = f"{verb}_{noun}{suffix}".strip("_")
        if is_allowed(f"tool name {name}", world.split):
            break
    return _cased(name, camel)


def _cased(name: str, camel: bool) -> str:
    if not camel:
        return name
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)
