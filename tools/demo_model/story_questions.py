"""What is asked about a story, and what is answered."""

from __future__ import annotations

from collections import Counter

from tools.demo_model import words
from tools.demo_model.chat import Answer, Exchange, asked_briefly
from tools.demo_model.phrasing import capital, sentence, write
from tools.demo_model.plots import Ask
from tools.demo_model.stories import Askable, Slots, Story
from tools.demo_model.world import World

_BRIEF = (
    "In one word: {q}",
    "{Q} Answer briefly.",
    "{Q} Just the answer, please.",
    "{Q} In a few words, please.",
    "Answer in as few words as you can: {q}",
)
_QUESTION_WORDS = (
    "Wh",
    "How",
    "Is ",
    "Do",
    "Did",
    "Are ",
    "In ",
    "On ",
    "At ",
    "To ",
    "For ",
    "Add ",
    "Calculate ",
    "Against ",
    "Can ",
)
_ABSENT = (  # category and what it is about, as in plots.py; the question
    ("age", "hero", "How old was {hero}?"),
    ("drink", "hero", "What was {hero}'s favourite drink?"),
    ("person", "sister", "What was the name of {hero}'s sister?"),
    ("brother", "hero", "What was the name of {hero}'s brother?"),
    ("shoes", "hero", "What colour were {hero}'s shoes?"),
    ("none", "", "What colour was the {absent}?"),
    ("none", "", "Where was the {absent}?"),
    ("none", "", "Who found the {absent}?"),
    ("none", "", "Where did {stranger} live?"),
    ("none", "", "What was {stranger}'s work?"),
    ("none", "", "What did {stranger} buy?"),
    ("none", "", "How old was {stranger}?"),
)


_ABOUT = Ask(
    "hero",
    "[Who is the story about?|What is the story about?|Who is the main character?]",
    "The story is about {hero}.",
    "{hero}",
)


def questions(world: World, story: Story, count: int) -> list[Exchange]:
    """Up to `count` different questions about the story, each with one right answer."""
    keys = [_key(askable) for askable in story.askables]
    times = Counter(keys)
    single = [askable for askable, key in zip(story.askables, keys, strict=True) if times[key] == 1]
    chosen = world.rng.sample(single, min(count, len(single)))
    if chosen and story.sort == "story" and world.chance(0.1):
        chosen[0] = Askable(
            _ABOUT, {"hero": story.hero}, next(line for line in story.paragraphs[0] if story.hero in line)
        )
    return [_absent(world, story) if world.chance(0.1) else _asked(world, story, askable) for askable in chosen]


def _key(askable: Askable) -> str:
    """The question in its first wording."""
    return write(_FIRST, askable.ask.question, askable.slots)  # type: ignore[arg-type]


class _FirstWording:
    """Stands in for a random generator where the first of all choices is to be taken."""

    def random(self) -> float:
        return 0.0


_FIRST = _FirstWording()


def _asked(world: World, story: Story, askable: Askable) -> Exchange:
    ask, slots = askable.ask, askable.slots
    question, full = write(world.rng, ask.question, slots), write(world.rng, ask.full, slots)
    short = capital(write(world.rng, ask.short, slots)) + "."
    kind = f"{story.sort} {'person' if ask.category in ('pet', 'animal') else ask.category}"
    answer = Answer(kind, full, short, askable.evidence)
    if ask.category == "person" and short[:-1] in story.people and len(story.people) > 1 and world.chance(0.2):
        pair = [short[:-1], world.rng.choice([name for name in story.people if name != short[:-1]])]
        world.rng.shuffle(pair)
        question = f"{question[:-1]}, {pair[0]} or {pair[1]}?"
    elif world.chance(0.08):
        return _is_it_true(world, story, askable, full)
    return in_other_words(world, Exchange(question, answer))


def in_other_words(world: World, exchange: Exchange) -> Exchange:
    """Now and then the question with a request for a short answer, or in a sloppier hand."""
    chance = world.rng.random()
    question = exchange.user
    if chance < 0.12 and exchange.answer.short is not None:
        return asked_briefly(
            exchange, world.rng.choice(_BRIEF).format(q=question[0].lower() + question[1:], Q=question)
        )
    if chance < 0.2 and question.startswith(_QUESTION_WORDS):
        return Exchange(question[0].lower() + question[1:], exchange.answer)
    if chance < 0.26:
        return Exchange(question.rstrip("? "), exchange.answer)
    return exchange


def _is_it_true(world: World, story: Story, askable: Askable, full: str) -> Exchange:
    """A statement to be judged: the true one, or one with another value in it."""
    category, short = askable.ask.category, write(_FIRST, askable.ask.short, askable.slots).lower()  # type: ignore[arg-type]
    names = [name for name in story.people if name.lower() != short]
    values = [
        value
        for value in words.CATEGORIES.get(category, [])
        if value.lower() == short or short.endswith(f" {value.lower()}")
    ]
    wrong = full
    if category == "person" and names and full.count(capital(short)) == 1:
        wrong = full.replace(capital(short), world.rng.choice(names))
    elif values and full.count(values[0]) == 1 and category != "person":
        wrong = sentence(
            full.replace(
                values[0], world.rng.choice([value for value in words.CATEGORIES[category] if value != values[0]])
            )
        )
    is_true = wrong == full or world.chance(0.5)
    said = full if is_true else wrong
    if not said.startswith((*story.people, "“")):
        said = said[0].lower() + said[1:]
    answer = Answer(
        f"{story.sort} true or not",
        "Yes, that is true." if is_true else f"No. {full}",
        "Yes." if is_true else "No.",
        askable.evidence,
    )
    return Exchange(f"Is it true that {said[:-1]}?", answer)


def _absent(world: World, story: Story) -> Exchange:
    """A question that the story does not answer."""
    not_said = f"The {story.sort} does not say."
    slots: Slots = {"hero": story.hero}
    free = [
        question
        for category, about, question in _ABSENT
        if (category, story.hero if about == "hero" else about) not in story.told
    ]
    question = world.rng.choice(free)
    if "{absent}" in question:
        slots["absent"] = world.new(words.OBJECTS)
    if "{stranger}" in question:
        slots["stranger"] = world.person()
    return in_other_words(
        world, Exchange(write(world.rng, question, slots), Answer(f"{story.sort} absent", not_said, not_said))
    )
