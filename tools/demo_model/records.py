"""Lists and JSON on request, and JSON out of a text."""

from __future__ import annotations

import json
from collections.abc import Callable

from tools.demo_model import words
from tools.demo_model.chat import Answer, Exchange
from tools.demo_model.phrasing import article, capital, enumeration, number_word
from tools.demo_model.world import World

_PERSON_KEYS = ("age", "job", "town", "city", "hobby", "food", "drink", "sport", "instrument", "animal", "colour")
_SAYINGS = {
    "age": "is {} years old", "job": "works as a {}", "town": "lives in {}", "city": "was born in {}", "hobby": "likes {}", "food": "loves {}",
    "drink": "drinks {}",
    "sport": "trains {}", "instrument": "plays the {}", "animal": "has a {}", "colour": "likes the colour {}",
}  # fmt: skip


def records(world: World, count: int) -> list[Exchange]:
    return [world.rng.choices(_TASKS, _SHARES)[0](world) for _ in range(count)]


def named(world: World) -> Exchange:
    """So many of a kind, as a list or in a sentence."""
    topic = world.rng.choice(sorted(words.TOPICS))
    count = world.rng.randint(2, 7)
    items = world.rng.sample(words.TOPICS[topic], count)
    number = number_word(count) if world.chance(0.7) else str(count)
    form = world.rng.choice(("bullets", "bullets", "numbers", "sentence", "json"))
    asked = {
        "bullets": "",
        "numbers": " as a numbered list",
        "sentence": " in one sentence",
        "json": " as a JSON list",
    }[form]
    question = world.rng.choice(
        (
            "Name {n} {t}{f}.",
            "List {n} {t}{f}.",
            "Give me {n} {t}{f}.",
            "Write down {n} {t}{f}.",
            "Can you name {n} {t}{f}?",
        )
    )
    text = {
        "bullets": "\n".join(f"- {item}" for item in items), "numbers": "\n".join(f"{at}. {item}" for at, item in enumerate(items, 1)),
        "sentence": f"{capital(enumeration(items))}.", "json": json.dumps(items),
    }[form]  # fmt: skip
    check = ("list", topic, str(count), form)
    return Exchange(
        question.format(n=number, t=topic, f=asked),
        Answer("list", text, exact=False, verbatim=form == "json", check=check),
    )


def _value(world: World, name: str, key: str) -> str | int:
    value = world.pick(name, key)
    return int(value) if key == "age" else value


def record(world: World) -> Exchange:
    """A JSON record of what the request says."""
    name = world.person().name
    keys = world.rng.sample(_PERSON_KEYS, world.rng.randint(1, 4))
    wanted: dict[str, str | int] = {"name": name, **{key: _value(world, name, key) for key in keys}}
    said = enumeration([f"{key} {value}" for key, value in wanted.items()])
    question = world.rng.choice(
        (
            "Write a JSON record with {}.",
            "Make a JSON object with {}.",
            "Give me JSON with {}.",
            "Write this as JSON: {}",
        )
    )
    return _json("JSON from a request", question.format(said), wanted)


def extraction(world: World) -> Exchange:
    """A JSON record out of a text, with the keys that are asked for, in the order in which they are asked for."""
    names = [world.person().name for _ in range(world.rng.choice((1, 1, 1, 2)))]
    keys = world.rng.sample(_PERSON_KEYS, world.rng.randint(1, 5))
    full = [{"name": name, **{key: _value(world, name, key) for key in keys}} for name in names]
    text = " ".join(_described(world, each) for each in full)
    asked = ["name", *world.rng.sample(keys, world.rng.randint(1, len(keys)))]
    wanted = [{key: each[key] for key in asked} for each in full]
    form = "a JSON list of records" if len(full) > 1 else "a JSON record"
    question = world.rng.choice(
        (
            "{t}\n\nWrite {w} with the keys {k}.",
            "Make {w} with the keys {k} from this text: {t}",
            "Extract {k} as {w}:\n{t}",
        )
    )
    return _json(
        "JSON from a text",
        question.format(t=text, w=form, k=enumeration(asked)),
        wanted if len(full) > 1 else wanted[0],
    )


def _described(world: World, record: dict[str, str | int]) -> str:
    """Sentences that say what the record says, in another order than it."""
    name = str(record["name"])
    he = world.person(name).he if name in words.NAMES else None
    parts = [_SAYINGS[key].format(value) for key, value in record.items() if key != "name"]
    world.rng.shuffle(parts)
    parts = [part.replace(" a a", " an a").replace(" a o", " an o") for part in parts]
    half = world.rng.randint(1, len(parts))
    sentences = [f"{name} {enumeration(parts[:half])}."]
    if parts[half:]:
        sentences.append(f"{capital(he) if he else name} {enumeration(parts[half:])}.")
    return " ".join(sentences)


def invented(world: World) -> Exchange:
    """A JSON record with the keys asked for and values of the model's own."""
    keys = ["name", *world.rng.sample(_PERSON_KEYS, world.rng.randint(1, 4))]
    name = world.person().name
    made = {"name": name, **{key: _value(world, name, key) for key in keys[1:]}}
    question = world.rng.choice(
        (
            "Make up a JSON record of a person with the keys {}.",
            "Invent a person and write {} as JSON.",
            "Write a JSON record with {}.",
        )
    )
    answer = Answer("JSON invented", json.dumps(made), exact=False, verbatim=True, check=("json", *keys))
    return Exchange(question.format(enumeration(keys)), answer)


def thing_record(world: World) -> Exchange:
    """A JSON record of a thing that a sentence describes, a true or false among its values."""
    thing, is_new = world.thing(), world.chance(0.5)
    price, spot = int(world.pick(thing.noun, "price")), world.pick(thing.noun, "spot")
    age = "new" if is_new else "old"
    text = world.rng.choice((
        f"The {thing} is {age}, costs {price} coins and lies {spot}.", f"There is {article(f'{age} {thing}')} {spot}. It costs {price} coins.",
    ))  # fmt: skip
    values: dict[str, str | int | bool] = {
        "object": thing.noun,
        "colour": thing.colour,
        "price": price,
        "place": spot,
        "new": is_new,
    }
    asked = world.rng.sample(sorted(values), world.rng.randint(2, 5))
    question = world.rng.choice(("{t} Write this as JSON with {k}.", "Write a JSON record with the keys {k}: {t}"))
    return _json("JSON from a text", question.format(t=text, k=enumeration(asked)), {key: values[key] for key in asked})


def list_to_json(world: World) -> Exchange:
    """Words or amounts as JSON."""
    if world.chance(0.5):
        items = world.pick_several("listed", world.rng.choice(("object", "animal", "person")), world.rng.randint(2, 6))
        return _json("JSON from a request", f"Write this list as JSON: {', '.join(items)}", items)
    amounts = {}
    for _ in range(world.rng.randint(1, 4)):
        noun = world.pick_new("listed", "goods")
        amounts[noun] = words.NUMBER_WORDS.index(world.pick(noun, "count"))
    said = enumeration([f"{number_word(count)} {noun}" for noun, count in amounts.items()])
    return _json("JSON from a request", f"Write this as a JSON object: {said}", amounts)


def _json(kind: str, question: str, value: object) -> Exchange:
    text = json.dumps(value, ensure_ascii=False)
    return Exchange(question, Answer(kind, text, text, verbatim=True))


_TASKS: tuple[Callable[[World], Exchange], ...] = (named, record, extraction, invented, thing_record, list_to_json)
_SHARES = (4, 2, 3, 1, 1, 1)
