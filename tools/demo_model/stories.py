"""Stories: a cast, an opening, one or more plots and an ending; told when asked for. story_questions.py asks about
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tools.demo_model import words
from tools.demo_model.chat import Answer, Exchange
from tools.demo_model.fables import FABLE_ENDINGS, FABLE_OPENINGS, FABLES
from tools.demo_model.openings import ENDINGS, FACTS, OPENINGS, WHEN
from tools.demo_model.phrasing import article, write
from tools.demo_model.plots import PLOTS, Ask, Line
from tools.demo_model.world import Person, Thing, World

Slots = dict[str, object]

_FABLE_SHARE = 0.25


@dataclass(frozen=True)
class Askable:
    """A question about a line that was written, and the values of its slots."""

    ask: Ask
    slots: Slots
    evidence: str


@dataclass
class Story:
    """A text, and all that can be asked about it."""

    hero: str  # its name
    paragraphs: list[list[str]] = field(default_factory=list)  # lines
    askables: list[Askable] = field(default_factory=list)
    # (category, whose): what an absent question must not be about
    told: set[tuple[str, str]] = field(default_factory=set)
    people: list[str] = field(default_factory=list)
    topics: dict[str, str] = field(default_factory=dict)  # what one can ask to be told about: "animal", "object", "job"
    separator: str = "\n\n"
    sort: str = "story"  # or "letter"

    @property
    def text(self) -> str:
        return self.separator.join(" ".join(lines) for lines in self.paragraphs)

    def add(self, world: World, line: Line, slots: Slots, when: str = "") -> None:
        """Writes a line into the last paragraph."""
        text = write(world.rng, line.text.replace("<when>", when), slots)
        if not text:
            return
        self.paragraphs[-1].append(text)
        for ask in line.asks:
            self.askables.append(Askable(ask, slots, text))
            if ask.about:
                self.told.add(whose(ask, slots))

    def knows(self, line: Line, slots: Slots) -> bool:
        """Whether the story has said already what the line would say."""
        return any(ask.about and whose(ask, slots) in self.told for ask in line.asks)


def whose(ask: Ask, slots: Slots) -> tuple[str, str]:
    return ask.category, str(slots.get(ask.about, ask.about))


def cast(world: World, hero: Person | None = None) -> Slots:
    """One value for every slot of plots.py; nobody and nothing that the conversation has met before, but for the hero
    if given.
    """
    rng = world.rng
    hero = hero or world.person()
    friend, third = world.friend_of(hero), world.friend_of(hero)
    thing, other, last = world.thing(), world.thing(), world.thing()
    animal = world.new(words.ANIMALS)
    case = world.new(words.CASES)
    spots: list[str] = []
    for each in (thing, other, last):
        spots.append(world.pick_other(each.noun, "spot", spots))
    plant = world.pick(hero, "plant")
    slots: Slots = {
        "hero": hero,
        "friend": friend,
        "third": third,
        "thing": thing,
        "other": other,
        "last": last,
        "animal": animal,
        "plant": plant,
    }
    slots |= {
        "spot": spots[0],
        "spot2": spots[1],
        "spot3": spots[2],
        "case": Thing(world.pick(case, "colour"), case),
        "pet": world.pick_new(animal, "pet"),
    }
    slots |= {
        "job2": world.pick(friend, "job"),
        "goods": world.amount(hero),
        "crop": world.amount(hero, "crop"),
        "yard": world.pick(animal, "yard"),
        "season": rng.choice(words.SEASONS),
    }
    of_hero = (
        "job",
        "house",
        "near",
        "town",
        "trait",
        "food",
        "age",
        "skill",
        "drink",
        "destination",
        "feeling",
        "vehicle",
    )
    slots |= {category: world.pick(hero, category) for category in of_hero}
    slots |= {
        category: world.pick(friend, category)
        for category in ("day", "hour", "city", "ingredient", "reason", "weather", "count")
    }
    slots["price"] = world.pick(thing.noun, "price")
    return slots


def animal_cast(world: World) -> Slots:
    """One value for every slot of fables.py."""
    kind = world.new(words.ANIMALS)
    kind2, kind3 = world.new(words.ANIMALS), world.new(words.ANIMALS)
    thing, nick = world.thing(), world.pick_new(kind, "pet")
    nick3 = world.pick_new(kind3, "pet")
    slots: Slots = {
        "nick": nick,
        "kind": kind,
        "kind2": kind2,
        "kind3": kind3,
        "nick3": nick3,
        "thing": thing,
        "spot": world.pick(thing.noun, "spot"),
    }
    slots |= {
        "yard": world.pick(kind, "yard"),
        "yard2": world.pick(kind2, "yard"),
        "goods": world.amount(kind),
        "crop": world.amount(kind, "crop"),
    }
    slots |= {category: world.pick(nick, category) for category in ("trait", "food", "feeling", "weather")}
    slots |= {category: world.pick(kind3, category) for category in ("day", "destination", "count")}
    slots["season"] = world.rng.choice(words.SEASONS)
    return slots


def write_story(world: World, num_chapters: int = 1) -> Story:
    """A new story, of people or of animals (which have one chapter)."""
    story = _fable(world) if world.chance(_FABLE_SHARE) else _tale(world, num_chapters)
    if world.chance(0.4):
        story.separator = " "
    return story


def _tale(world: World, num_chapters: int) -> Story:
    slots = cast(world)
    job, story = slots["job"], Story(str(slots["hero"]))
    story.people = [str(slots[role]) for role in ("hero", "friend", "third")]
    story.paragraphs.append([])
    opening = world.rng.choice(OPENINGS)
    for line in opening:
        story.add(world, line, slots)
    if any("{job}" in line.text for line in opening):
        story.topics["job"] = str(job)
    plots = world.rng.sample(PLOTS, num_chapters)
    for chapter, plot in enumerate(plots):
        if chapter:
            slots = {**cast(world, hero=slots["hero"]), "job": job}  # type: ignore[arg-type]
            story.people += [str(slots["friend"]), str(slots["third"])]
            story.paragraphs.append([])
        roles = [role for role in ("hero", "friend", "third") if any(f"{{{role}" in line.text for line in plot)]
        _add_facts(world, story, [slots[role] for role in roles], world.rng.choice((0, 0, 1, 1, 2)))
        for line in plot:
            story.add(world, line, slots, WHEN[chapter > 0])
        if not chapter and any("{thing" in line.text for line in plot):
            story.topics["object"] = str(slots["thing"].noun)  # type: ignore[attr-defined]
    story.add(world, world.rng.choice(ENDINGS), slots)
    return story


def _add_facts(world: World, story: Story, people: list[Person], count: int) -> None:
    """Facts about people of the story, in words of their own."""
    for line in world.rng.sample(FACTS, count):
        person = world.rng.choice(people)
        own: Slots = {
            **cast(world, hero=person),
            "worn": world.thing(world.new(words.WORN)),
            "third": world.pick_new(person, "woman"),
        }
        if not story.knows(line, own):
            story.add(world, line, own)


def _fable(world: World) -> Story:
    slots = animal_cast(world)
    story = Story(str(slots["nick"]), topics={"animal": str(slots["kind"])}, people=[str(slots["nick"])])
    story.paragraphs.append([])
    for line in world.rng.choice(FABLE_OPENINGS):
        story.add(world, line, slots)
    plot = world.rng.choice(FABLES)
    if world.chance(0.5):
        story.paragraphs.append([])
    for line in plot:
        story.add(world, line, slots, WHEN[0])
    if any("{thing" in line.text for line in plot):
        story.topics["object"] = str(slots["thing"].noun)  # type: ignore[attr-defined]
    story.add(world, world.rng.choice(FABLE_ENDINGS), slots)
    return story


# ---- asked for

_PLEAS = (
    "Tell me a story{about}.", "Please tell me a story{about}.", "Can you tell me a story{about}?", "Write a short story{about}.", "I want a story{about}.",
    "Make up a story{about}.", "Write a story{about}, please.", "Tell me a short story{about}.", "A story{about}, please!", "Tell me another story{about}.",
    "tell me a story{about}",
)  # fmt: skip


def request_for(world: World, story: Story) -> str:
    """What a user says who wants this story, or any."""
    topics = [article(topic) for name, topic in story.topics.items() if name != "job"]
    names = (
        [f"{article(story.topics['job'])} {world.rng.choice(('called', 'named'))} {story.hero}"]
        if "job" in story.topics
        else []
    )
    about = [topic for topic in (*topics, world.rng.choice([*names, story.hero])) if world.chance(0.5)]
    if not about:
        return world.rng.choice(_PLEAS).format(about="")
    world.rng.shuffle(about)
    return world.rng.choice(_PLEAS).format(about=f" about {' and '.join(about[:2])}")


def told(world: World, story: Story) -> Exchange:
    """The assistant tells the story."""
    request = request_for(world, story)
    wanted = [word for word in (story.hero, *story.topics.values()) if word in request]
    return Exchange(request, Answer("story", story.text, exact=False, check=("story", *wanted)))


_GIVEN = (
    "Here is a story:\n\n{text}", "Read this story.\n\n{text}", "{text}", "Please read this and answer my questions.\n\n{text}", "Story:\n{text}",
    "This is a story. I will ask you about it.\n\n{text}",
)  # fmt: skip


def given(world: World, story: Story, questions: list[Exchange]) -> list[Exchange]:
    """The user gives the story, with the first question or before it."""
    return handed(world, world.rng.choice(_GIVEN).format(text=story.text), story.sort, questions)


def handed(world: World, text: str, sort: str, questions: list[Exchange]) -> list[Exchange]:
    """The user hands over a text, with the first question or before it."""
    if questions and world.chance(0.6):
        first = questions[0]
        words = f"{first.user}\n\n{text}" if world.chance(0.15) else f"{text}\n\n{first.user}"
        return [Exchange(words, first.answer, first.in_short), *questions[1:]]
    return [Exchange(text, Answer("read", f"I have read the {sort}. What would you like to know?")), *questions]


def plain(world: World, stories: Iterable[Story]) -> str:
    """The stories as a book has them."""
    return "\n\n".join(story.text for story in stories)
