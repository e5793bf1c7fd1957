"""Texts that a user hands over: letters, lists, tables, notes, timetables, JSON; and questions about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from tools.demo_model import words
from tools.demo_model.chat import Answer, Exchange
from tools.demo_model.openings import FACTS
from tools.demo_model.phrasing import article, capital, enumeration, number_word
from tools.demo_model.plots import Ask, Line
from tools.demo_model.stories import Story, cast, handed
from tools.demo_model.story_questions import in_other_words, questions
from tools.demo_model.world import World


@dataclass
class Paper:
    """A text and what can be asked about it, each question once."""

    sort: str  # what the user calls it
    text: str
    exchanges: list[Exchange] = field(default_factory=list)

    def ask(self, kind: str, question: str, full: str, short: str, evidence: str | None) -> None:
        self.exchanges.append(Exchange(question, Answer(f"{self.sort} {kind}", full, f"{capital(short)}.", evidence)))


def paper(world: World, num_questions: int) -> list[Exchange]:
    """A text of any sort, handed over, and questions."""
    return hand_over(world, world.rng.choices(_SORTS, _SHARES)[0](world), num_questions)


def hand_over(world: World, found: Paper, num_questions: int) -> list[Exchange]:
    asked = [
        in_other_words(world, exchange)
        for exchange in world.rng.sample(found.exchanges, min(num_questions, len(found.exchanges)))
    ]
    opening = world.rng.choice(
        (
            f"Here is a {found.sort}:\n{{}}",
            "{}",
            "Look at this:\n{}",
            f"My {found.sort}:\n{{}}",
            f"I have a {found.sort} for you.\n\n{{}}",
        )
    )
    return handed(world, opening.replace("{}", found.text), found.sort, asked)


_LETTER: tuple[Line, ...] = (
    Line("I hope that you are well. The weather here in {city} is {weather}.", (
        Ask("city", "Which city does {friend} write from?", "{friend} writes from {city}.", "{city}"),
        Ask("weather", "What is the weather like where {friend} is?", "The weather is {weather}.", "{weather}"),
    )),
    Line("I will come to see you on {day} at {hour}.", (
        Ask("day", "On which day will {friend} come?", "{friend} will come on {day}.", "on {day}"),
        Ask("hour", "At what time will {friend} come?", "{friend} will come at {hour}.", "at {hour}"),
    )),
    Line("Last week I bought a {thing} for {price} coins.", (
        Ask("object", "What did {friend} buy?", "{friend} bought a {thing}.", "a {thing}"),
        Ask("price", "How many coins did {friend} pay?", "{friend} paid {price} coins.", "{price} coins"),
        Ask("colour", "What colour is the {thing.noun}?", "The {thing.noun} is {thing.colour}.", "{thing.colour}"),
    )),
    Line("I have left your {other} {spot2}.", (
        Ask("spot", "Where is {hero}'s {other.noun}?", "{hero}'s {other.noun} is {spot2}.", "{spot2}"),
    )),
    Line("Please bring {goods}, because we want to cook {food}.", (
        Ask("count", "How many {goods.noun} should {hero} bring?", "{hero} should bring {goods}.", "{goods.count}"),
        Ask("goods", "What should {hero} bring?", "{hero} should bring {goods}.", "{goods}"),
        Ask("food", "What do they want to cook?", "They want to cook {food}.", "{food}"),
    )),
    Line("My {animal} {pet} sends you greetings.", (
        Ask("pet", "What is {friend}'s {animal} called?", "{friend}'s {animal} is called {pet}.", "{pet}"),
        Ask("animal", "What kind of animal is {pet}?", "{pet} is a {animal}.", "a {animal}"),
    )),
    Line("{third} has moved to {town} and works as a {job2} there.", (
        Ask("town", "Where has {third} moved?", "{third} has moved to {town}.", "to {town}"),
        Ask("job", "What does {third} work as?", "{third} works as a {job2}.", "a {job2}"),
    )),
)  # fmt: skip
_LETTER_ENDS = (
    Ask("person", "[Who wrote the letter?|Who is the letter from?]", "{friend} wrote the letter.", "{friend}"),
    Ask("person", "[Who got the letter?|Whom is the letter for?]", "The letter is for {hero}.", "{hero}"),
)


def letter(world: World, num_questions: int) -> list[Exchange]:
    """A letter, told like a story with a head and a foot."""
    slots = cast(world)
    story = Story(str(slots["hero"]), sort="letter", people=[str(slots[role]) for role in ("hero", "friend", "third")])
    story.paragraphs = [[], [], []]
    story.paragraphs[0] = [f"Dear {slots['hero']},"]
    body = Story(story.hero, [[]], story.askables)
    for line in world.rng.sample(_LETTER, world.rng.randint(2, 6)):
        body.add(world, line, slots)
    story.paragraphs[1] = body.paragraphs[0]
    signature = world.rng.choice(("Yours, {}", "Best wishes, {}", "Love, {}", "Your friend {}")).format(slots["friend"])
    story.paragraphs[2] = [signature]
    ends = Story(story.hero, [[]], story.askables)
    ends.add(world, Line(signature, _LETTER_ENDS[:1]), slots)
    ends.add(world, Line(f"Dear {slots['hero']},", _LETTER_ENDS[1:]), slots)
    text = world.rng.choice(
        ("Here is a letter:\n\n{}", "I got this letter.\n\n{}", "{}", "Read this letter, please.\n\n{}")
    ).format(story.text)
    return handed(world, text, "letter", questions(world, story, num_questions))


def notes(world: World, num_questions: int, num_people: int) -> list[Exchange]:
    """Facts about several people, a line each, without a plot."""
    people = [world.person() for _ in range(num_people)]
    story = Story(str(people[0]), separator="\n", sort="text", people=[str(person) for person in people])
    bullet = world.rng.choice(("- ", "", "* "))
    for person in people:
        story.paragraphs.append([])
        story.add(
            world, world.rng.choice(FACTS), {**cast(world, hero=person), "worn": world.thing(world.new(words.WORN))}
        )
        story.paragraphs[-1][0] = bullet + story.paragraphs[-1][0]
    return handed(world, f"{world.rng.choice(('Notes:', 'Some facts:', 'Here are my notes.', 'Remember this:'))}\n{story.text}", "text",
                  questions(world, story, num_questions))  # fmt: skip


def people_table(world: World) -> Paper:
    """A line for each person: work, town, age."""
    people = [world.person().name for _ in range(world.rng.randint(3, 7))]
    rows = {
        name: (world.pick_new(name, "job"), world.pick_new(name, "town"), world.pick_new(name, "age"))
        for name in people
    }
    form = world.rng.choice(("{}: {}, {}, {}", "{} | {} | {} | {}", "- {} ({}) from {}, age {}", "{}, {}, {}, {}"))
    lines = {name: form.format(name, *row) for name, row in rows.items()}
    found = Paper("list", "\n".join(lines.values()))
    for name, (job, town, age) in rows.items():
        found.ask("job", f"What is {name}'s work?", f"{name} is {article(job)}.", job, lines[name])
        found.ask("town", f"Where does {name} live?", f"{name} lives in {town}.", f"in {town}", lines[name])
        found.ask("age", f"How old is {name}?", f"{name} is {age} years old.", age, lines[name])
        whole = [value for row in rows.values() for value in row]
        for value, who, full in (
            (town, f"Who lives in {town}?", f"{name} lives in {town}."),
            (age, f"Who is {age} years old?", f"{name} is {age} years old."),
            (job, f"Who is the {job}?", f"{name} is the {job}."),
        ):
            if whole.count(value) == 1:
                found.ask("person", who, full, name, lines[name])
    by_age = sorted(people, key=lambda name: int(rows[name][2]))
    for word, name, next_one in (("youngest", by_age[0], by_age[1]), ("oldest", by_age[-1], by_age[-2])):
        if rows[name][2] != rows[next_one][2]:
            found.ask("compare", f"Who is the {word}?", f"{name} is the {word}.", name, lines[name])
    found.ask(
        "counting",
        "How many people are on the list?",
        f"There are {number_word(len(people))} people on the list.",
        number_word(len(people)),
        None,
    )
    found.ask("all", "Who is on the list?", f"{enumeration(people)} are on the list.", enumeration(people), None)
    stranger = world.person().name
    found.ask("absent", f"How old is {stranger}?", "The list does not say.", "The list does not say", None)
    found.ask("absent", f"Where does {stranger} live?", "The list does not say.", "The list does not say", None)
    return found


def shopping_list(world: World) -> Paper:
    """How many of what, a line each."""
    amounts = [world.amount(name) for name in [world.person().name for _ in range(world.rng.randint(2, 7))]]
    bullet = world.rng.choice(("- ", "* ", "", "[ ] "))
    found = Paper("shopping list", "\n".join(f"{bullet}{amount}" for amount in amounts))
    nouns = [amount.noun for amount in amounts]
    for amount in (amount for amount in amounts if nouns.count(amount.noun) == 1):
        found.ask(
            "count",
            f"How many {amount.noun} are on the list?",
            f"There are {amount} on the list.",
            amount.count,
            str(amount),
        )
    missing = world.pick_new("list", "goods")
    if missing not in nouns:
        found.ask(
            "absent", f"Are there any {missing} on the list?", f"No, there are no {missing} on the list.", "no", None
        )
    if nouns.count(nouns[0]) == 1:
        found.ask(
            "yes",
            f"Are there any {nouns[0]} on the list?",
            f"Yes, there are {amounts[0]} on the list.",
            "yes",
            str(amounts[0]),
        )
    count = number_word(len(amounts))
    found.ask("counting", "How many lines does the list have?", f"The list has {count} lines.", count, None)
    found.ask("first", "What comes first on the list?", f"The {nouns[0]} come first.", nouns[0], None)
    found.ask("last", "What comes last on the list?", f"The {nouns[-1]} come last.", nouns[-1], None)
    return found


def inventory(world: World) -> Paper:
    """Rooms and the things in them."""
    rooms = world.rng.sample(words.ROOMS, world.rng.randint(2, 5))
    things = {
        room: [world.thing(world.pick_new(room, "object")) for _ in range(world.rng.randint(1, 3))] for room in rooms
    }
    mark = world.rng.choice((": ", " - ", " has: "))
    lines = {room: f"{capital(room)}{mark}{', '.join(map(str, content))}" for room, content in things.items()}
    found = Paper("inventory", "\n".join(lines.values()))
    nouns = [thing.noun for content in things.values() for thing in content]
    for room, content in things.items():
        for thing in content:
            if nouns.count(thing.noun) == 1:
                found.ask(
                    "room",
                    f"Where is the {thing.noun}?",
                    f"The {thing.noun} is in the {room}.",
                    f"in the {room}",
                    lines[room],
                )
                found.ask(
                    "colour",
                    f"What colour is the {thing.noun}?",
                    f"The {thing.noun} is {thing.colour}.",
                    thing.colour,
                    lines[room],
                )
        listed = enumeration([article(str(thing)) for thing in content])
        verb = "are" if len(content) > 1 else "is"
        found.ask("all", f"What is in the {room}?", f"In the {room} there {verb} {listed}.", listed, lines[room])
        found.ask("counting", f"How many things are in the {room}?", f"There {verb} {number_word(len(content))} in the {room}.", number_word(len(content)),
                  lines[room])  # fmt: skip
    absent = world.new(words.OBJECTS)
    if absent not in nouns:
        found.ask(
            "absent", f"Where is the {absent}?", "The inventory does not say.", "The inventory does not say", None
        )
    return found


def timetable(world: World) -> Paper:
    """What happens on which day, and at what time."""
    days = sorted(world.rng.sample(range(7), world.rng.randint(3, 6)))
    rows = [
        (words.DAYS[day], world.pick_new(words.DAYS[day], "subject"), world.pick(words.DAYS[day], "hour"))
        for day in days
    ]
    lines = {day: f"{day}: {subject} at {hour}" for day, subject, hour in rows}
    found = Paper("timetable", "\n".join(lines.values()))
    for day, subject, hour in rows:
        if [row[1] for row in rows].count(subject) == 1:
            found.ask("day", f"On which day is {subject}?", f"{capital(subject)} is on {day}.", f"on {day}", lines[day])
            found.ask(
                "hour", f"At what time is {subject}?", f"{capital(subject)} is at {hour}.", f"at {hour}", lines[day]
            )
        found.ask("subject", f"What is on {day}?", f"On {day} there is {subject}.", subject, lines[day])
    free = [day for day in words.DAYS if day not in lines]
    found.ask(
        "absent",
        f"What is on {world.rng.choice(free)}?",
        "The timetable does not say.",
        "The timetable does not say",
        None,
    )
    return found


def json_record(world: World) -> Paper:
    """A JSON object, or a list of them, and what its keys hold."""
    names = [world.person().name for _ in range(world.rng.choice((1, 1, 2, 3)))]
    keys = world.rng.sample(
        ("job", "town", "age", "colour", "animal", "hobby", "city", "food"), world.rng.randint(2, 5)
    )
    records = [
        {"name": name, **{key: int(world.pick(name, key)) if key == "age" else world.pick(name, key) for key in keys}}
        for name in names
    ]
    found = Paper(
        "JSON record" if len(records) == 1 else "JSON list", json.dumps(records[0] if len(records) == 1 else records)
    )
    for name, record in zip(names, records, strict=True):
        evidence = json.dumps(record)
        for key in keys:
            value = str(record[key])
            found.ask(key, f"What is the {key} of {name}?", f"The {key} of {name} is {value}.", value, evidence)
            if sum(other[key] == record[key] for other in records) == 1:
                found.ask("person", f"Whose {key} is {value}?", f"The {key} of {name} is {value}.", name, evidence)
    found.ask(
        "keys",
        "Which keys are there?",
        f"The keys are {enumeration(['name', *keys])}.",
        enumeration(["name", *keys]),
        None,
    )
    if len(records) > 1:
        found.ask(
            "counting",
            "How many records are there?",
            f"There are {number_word(len(records))} records.",
            number_word(len(records)),
            None,
        )
    missing = next(key for key in ("job", "town", "age", "colour", "animal", "hobby") if key not in keys)
    found.ask(
        "absent",
        f"What is the {missing} of {names[0]}?",
        f"The {found.sort} does not say.",
        f"The {found.sort} does not say",
        None,
    )
    return found


_SORTS: tuple[Callable[[World], Paper], ...] = (people_table, shopping_list, inventory, timetable, json_record)
_SHARES = (3, 2, 2, 1, 2)
