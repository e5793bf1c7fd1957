"""What a user says about himself, and asks for later."""

from __future__ import annotations

from dataclasses import dataclass

from tools.demo_model import words
from tools.demo_model.chat import Answer, Exchange
from tools.demo_model.phrasing import write
from tools.demo_model.smalltalk import UNTOLD
from tools.demo_model.story_questions import in_other_words
from tools.demo_model.world import World


@dataclass(frozen=True)
class Trait:
    """Something about the user. `{x}` is the value, `{s}` what it is about."""

    category: str  # of the value
    said: str
    reply: str
    question: str
    full: str
    short: str
    key: str  # of what it belongs to, for the split


TRAITS: tuple[Trait, ...] = (
    Trait("person", "[My name is {x}.|I am {x}.|Hello, my name is {x}.|I'm {x}.|You can call me {x}.|Hi, I am {x}!]", "Nice to meet you, {x}.",
          "[What is my name?|Do you remember my name?|What's my name?|Who am I?]", "Your name is {x}.", "{x}", "name"),
    Trait("age", "I am {x} years old.", "{x} is a good age.", "[How old am I?|What is my age?]", "You are {x} years old.", "{x}", "user's age"),
    Trait("city", "[I live in {x}.|My home is in {x}.|I come from {x}.]", "{x} must be a nice place.", "[Where do I live?|Which city do I live in?]",
          "You live in {x}.", "in {x}", "user's city"),
    Trait("job", "[I work as a {x}.|I am a {x}.|My job is to be a {x}.]", "That must be interesting work.",
        "[What is my job?|What do I work as?|What is my work?]",
          "You are a {x}.", "a {x}", "user's job"),
    Trait("colour", "[My favourite colour is {x}.|I like {x} best of all colours.]", "{x} is a lovely colour.",
        "[What is my favourite colour?|Which colour do I like best?]",
          "Your favourite colour is {x}.", "{x}", "user's colour"),
    Trait("food", "[My favourite food is {x}.|I love {x}.|I like to eat {x}.]", "That sounds delicious.", "[What is my favourite food?|What do I like to eat?]",
          "You like {x}.", "{x}", "user's food"),
    Trait("hobby", "[My hobby is {x}.|I like {x} in my free time.]", "That is a fine hobby.", "[What is my hobby?|What do I like to do in my free time?]",
          "Your hobby is {x}.", "{x}", "user's hobby"),
    Trait("woman", "[My sister is called {x}.|I have a sister, {x}.|My sister's name is {x}.]", "{x} is a nice name.",
        "[What is my sister's name?|What is my sister called?]",
          "Your sister is called {x}.", "{x}", "sister"),
    Trait("man", "[My brother is called {x}.|I have a brother named {x}.]", "{x} is a nice name.", "[What is my brother's name?|What is my brother called?]",
          "Your brother is called {x}.", "{x}", "brother"),
    Trait("pet", "[My {s} is called {x}.|I have a {s} named {x}.|I have a {s}. Its name is {x}.]", "{x} is a good name for a {s}.",
          "[What is my {s} called?|What is the name of my {s}?]", "Your {s} is called {x}.", "{x}", "animal"),
    Trait("count", "[I have {x} {s}s.|There are {x} {s}s in my house.]", "{x} {s}s, that is a lot of company.",
        "[How many {s}s do I have?|How many {s}s have I got?]",
          "You have {x} {s}s.", "{x}", "cat dog duck rabbit pony turtle frog parrot bird hen"),
    Trait("spot", "[I have put my {s} {x}.|My {s} is {x}.|I left my {s} {x}.]", "I will remember that.", "[Where is my {s}?|Where did I put my {s}?]",
          "Your {s} is {x}.", "{x}", "object"),
    Trait("colour", "[My {s} is {x}.|I have a {x} {s}.]", "A {x} {s}, how nice.", "What colour is my {s}?", "Your {s} is {x}.", "{x}",
          "car house bicycle door boat jacket bag tent"),
    Trait("room_number", "[My room number is {x}.|I am in room {x}.]", "I will remember room {x}.", "[What is my room number?|Which room am I in?]",
          "Your room number is {x}.", "{x}", "user's room"),
    Trait("month", "[My birthday is in {x}.|I was born in {x}.]", "{x} is a good month for a birthday.",
        "[When is my birthday?|In which month is my birthday?]",
          "Your birthday is in {x}.", "in {x}", "user's birthday"),
    Trait("day", "[My next {s} is on {x}.|I have a {s} on {x}.]", "I will remember that.", "[When is my {s}?|On which day is my {s}?]", "Your {s} is on {x}.",
          "on {x}", "lesson meeting party concert exam holiday match"),
    Trait("instrument", "I play the {x}.", "How nice. I would like to hear it.", "[What do I play?|Which instrument do I play?]", "You play the {x}.",
        "the {x}",
          "user's instrument"),
    Trait("drink", "[My favourite drink is {x}.|I always drink {x} in the morning.]", "That is a good choice.",
        "[What is my favourite drink?|What do I like to drink?]",
          "You like {x}.", "{x}", "user's drink"),
)  # fmt: skip


@dataclass(frozen=True)
class Told:
    """A trait with its value: how it is said, and how it is asked for."""

    telling: Exchange
    recall: Exchange


def tell(world: World, trait: Trait) -> Told:
    """The trait with a value of the split."""
    slots: dict[str, object] = {"s": "", "x": ""}
    if "{s}" in trait.said:
        plain = trait.key not in ("animal", "object")
        slots["s"] = world.rng.choice(trait.key.split()) if plain else world.new(words.CATEGORIES[trait.key])
    if trait.category in ("person", "woman", "man"):
        slots["x"] = world.made_up_name() if world.chance(0.15) else world.pick_new(trait.key, trait.category)
    else:
        slots["x"] = world.pick(slots["s"] or trait.key, trait.category)
    said = write(world.rng, trait.said, slots)
    short = write(world.rng, trait.short, slots)
    recall = Answer("user's facts", write(world.rng, trait.full, slots), f"{short}.", evidence=said)
    telling = Exchange(said, Answer("told", write(world.rng, trait.reply, slots)))
    return Told(telling, in_other_words(world, Exchange(write(world.rng, trait.question, slots), recall)))


def facts(world: World, count: int) -> list[Told]:
    """Different facts about the user."""
    chosen = world.rng.sample(TRAITS, count)
    seen: set[str] = set()
    found = []
    for trait in chosen:
        told = tell(world, trait)
        if told.recall.answer.full.rsplit(" ", 1)[0] not in seen:  # "Your lamp is …" must not be a colour and a place
            seen.add(told.recall.answer.full.rsplit(" ", 1)[0])
            found.append(told)
    return found


def introduction(world: World, told: list[Told]) -> Exchange:
    """Several facts in one turn."""
    reply = (
        world.rng.choice(("Thank you for telling me.", "It is good to know you."))
        if len(told) > 1
        else told[0].telling.answer.full
    )
    return Exchange(" ".join(each.telling.user for each in told), Answer("told", reply, exact=False, check=("talk",)))


def unknown(world: World, told: list[Told]) -> Exchange:
    """A question about something that the user has not said."""
    said = {each.recall.answer.full.split(" ")[1] for each in told}
    free = [
        trait
        for trait in TRAITS
        if "{s}" not in trait.question and trait.full.split(" ")[1] not in said | {"are", "like", "live", "play"}
    ]
    question = write(world.rng, world.rng.choice(free).question, {"x": "", "s": ""})
    return in_other_words(world, Exchange(question, Answer("user's facts absent", UNTOLD, UNTOLD)))


def correction(world: World, told: Told, trait: Trait) -> Told | None:
    """The same fact with another value, said later: from then on it counts."""
    other = tell(world, trait)
    if "{s}" in trait.said or other.recall.answer.full == told.recall.answer.full:
        return None
    said = world.rng.choice(
        ("No, wait. {}", "Sorry, that was wrong. {}", "Actually, {}", "That has changed. {}")
    ).format(other.telling.user)
    recall = Exchange(
        other.recall.user,
        Answer("user's facts corrected", other.recall.answer.full, other.recall.answer.short, other.telling.user),
        other.recall.in_short,
    )
    return Told(Exchange(said, Answer("told", "Thank you, I will remember that.")), recall)
