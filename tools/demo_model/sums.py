"""Small arithmetic: sums as figures and in words, comparing, sorting, counting, what comes next."""

from __future__ import annotations

from collections.abc import Callable

from tools.demo_model import words
from tools.demo_model.chat import Answer, Exchange
from tools.demo_model.phrasing import capital, enumeration, number_word
from tools.demo_model.story_questions import in_other_words
from tools.demo_model.world import World, is_allowed


def sums(world: World, count: int) -> list[Exchange]:
    return [world.rng.choices(_TASKS, _SHARES)[0](world) for _ in range(count)]


def _numbers(world: World, name: str, draw: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """Drawn until the task is one of the split."""
    while True:
        numbers = draw()
        if is_allowed(f"{name} {numbers}", world.split):
            return numbers


def _exchange(world: World, kind: str, question: str, full: str, short: str) -> Exchange:
    return in_other_words(world, Exchange(question, Answer(kind, full, short)))


def _size(world: World) -> int:
    return world.rng.choice((10, 10, 20, 100, 100, 1000))


def addition(world: World) -> Exchange:
    top = _size(world)
    a, b = _numbers(world, "+", lambda: (world.rng.randrange(top), world.rng.randrange(top)))
    question = world.rng.choice(
        ("What is {} + {}?", "{} + {} = ?", "How much is {} plus {}?", "Add {} and {}.", "Calculate {} + {}.", "{}+{}")
    )
    return _exchange(world, "arithmetic add", question.format(a, b), f"{a} + {b} = {a + b}", str(a + b))


def subtraction(world: World) -> Exchange:
    top = _size(world)
    a, b = _numbers(
        world, "-", lambda: tuple(sorted((world.rng.randrange(top), world.rng.randrange(top)), reverse=True))
    )
    question = world.rng.choice(
        ("What is {} - {}?", "{} - {} = ?", "How much is {} minus {}?", "Calculate {} - {}.", "{}-{}")
    )
    return _exchange(world, "arithmetic subtract", question.format(a, b), f"{a} - {b} = {a - b}", str(a - b))


def multiplication(world: World) -> Exchange:
    a, b = _numbers(world, "*", lambda: (world.rng.randint(0, 12), world.rng.randint(0, 12)))
    question = world.rng.choice(
        ("What is {} * {}?", "{} x {} = ?", "How much is {} times {}?", "Multiply {} by {}.", "Calculate {} * {}.")
    )
    return _exchange(world, "arithmetic multiply", question.format(a, b), f"{a} * {b} = {a * b}", str(a * b))


def told_sum(world: World) -> Exchange:
    """A sum in words, about somebody."""
    goods, person = world.new(words.GOODS), world.person()
    a, b = _numbers(world, "told", lambda: (world.rng.randint(3, 20), world.rng.randint(1, 20)))
    if world.chance(0.5):
        what = world.rng.choice(("gets {b} more", "buys {b} more", "finds {b} more")).format(b=b)
        question, result = f"{person} has {a} {goods} and {what}. How many {goods} does {person} have now?", a + b
    else:
        a, b = max(a, b), min(a, b)
        what = world.rng.choice(
            ("gives {b} away", "loses {b}", "eats {b}" if goods in words.FRUITS else "sells {b}")
        ).format(b=b)
        question, result = f"{person} has {a} {goods} and {what}. How many {goods} are left?", a - b
    verb = "has" if "now" in question else "has kept"
    return _exchange(world, "arithmetic in words", question, f"{person} {verb} {result} {goods}.", str(result))


def comparison(world: World) -> Exchange:
    top = world.rng.choice((20, 100, 1000))
    a, b = _numbers(world, "<", lambda: tuple(world.rng.sample(range(top), 2)))
    word, result = world.rng.choice((("larger", max(a, b)), ("smaller", min(a, b)), ("bigger", max(a, b))))
    question = world.rng.choice((f"Which is {word}, {a} or {b}?", f"Which number is {word}: {a} or {b}?"))
    return _exchange(world, "comparing", question, f"{result} is {word}.", str(result))


def sorting(world: World) -> Exchange:
    count, top = world.rng.randint(3, 6), world.rng.choice((10, 100))
    numbers = _numbers(world, "sort", lambda: tuple(world.rng.sample(range(top), count)))
    order = world.rng.random() < 0.3
    question = world.rng.choice(
        ("Sort these numbers{how}: {list}", "Put these numbers in order{how}: {list}", "Sort {list}{how}")
    )
    how = (
        world.rng.choice((" from largest to smallest", ", largest first"))
        if order
        else world.rng.choice(("", " from smallest to largest"))
    )
    result = ", ".join(map(str, sorted(numbers, reverse=order)))
    return Exchange(
        question.format(how=how, list=", ".join(map(str, numbers))), Answer("sorting numbers", result, result)
    )


def extreme(world: World) -> Exchange:
    count, top = world.rng.randint(3, 6), world.rng.choice((10, 100))
    numbers = _numbers(world, "extreme", lambda: tuple(world.rng.sample(range(top), count)))
    word, result = world.rng.choice((("largest", max(numbers)), ("smallest", min(numbers))))
    question = f"What is the {word} of these numbers: {', '.join(map(str, numbers))}?"
    return _exchange(world, "comparing", question, f"The {word} number is {result}.", str(result))


def counting(world: World) -> Exchange:
    """How many words a list has."""
    category = world.rng.choice(("object", "animal", "person", "food", "colour"))
    items = world.pick_several("counted", category, world.rng.randint(2, 9))
    question = world.rng.choice(("How many words are in this list: {}?", "Count these: {}", "How many are there: {}?"))
    if category == "food":
        question = "How many things are in this list: {}?"
    count = number_word(len(items))
    return _exchange(world, "counting", question.format(", ".join(items)), f"There are {count}.", count)


def series(world: World) -> Exchange:
    start, step = _numbers(
        world, "series", lambda: (world.rng.randrange(30), world.rng.choice((1, 2, 3, 4, 5, 10, -1, -2, -5)))
    )
    start += 40 if step < 0 else 0
    shown = ", ".join(str(start + step * index) for index in range(4))
    question = world.rng.choice(("What comes next: {}?", "Which number comes next? {}", "Continue: {}"))
    return _exchange(
        world, "series", question.format(shown), f"The next number is {start + 4 * step}.", str(start + 4 * step)
    )


def calendar(world: World) -> Exchange:
    """Days and months before and after others."""
    names, word = world.rng.choice(((words.DAYS, "day"), (words.MONTHS, "month")))
    index = world.rng.randrange(len(names))
    side, shift = world.rng.choice((("after", 1), ("before", -1)))
    result = names[(index + shift) % len(names)]
    question = world.rng.choice(
        (f"Which {word} comes {side} {names[index]}?", f"What {word} is {side} {names[index]}?")
    )
    return _exchange(world, "calendar", question, f"{result} comes {side} {names[index]}.", result)


def parity(world: World) -> Exchange:
    (number,) = _numbers(world, "even", lambda: (world.rng.randrange(world.rng.choice((20, 100, 1000))),))
    result = "odd" if number % 2 else "even"
    return _exchange(world, "even or odd", f"Is {number} even or odd?", f"{number} is {result}.", capital(result))


def twice(world: World) -> Exchange:
    (number,) = _numbers(world, "twice", lambda: (world.rng.randint(1, 50),))
    if world.chance(0.5):
        return _exchange(
            world,
            "arithmetic multiply",
            f"What is twice {number}?",
            f"Twice {number} is {2 * number}.",
            str(2 * number),
        )
    return _exchange(
        world, "arithmetic divide", f"What is half of {2 * number}?", f"Half of {2 * number} is {number}.", str(number)
    )


def ages(world: World) -> Exchange:
    """Who of several people is the oldest, from one sentence."""
    count = world.rng.randint(2, 4)
    people = [world.person().name for _ in range(count)]
    numbers = _numbers(world, "ages", lambda: tuple(world.rng.sample(range(5, 90), count)))
    said = enumeration([f"{name} is {age}" for name, age in zip(people, numbers, strict=True)])
    word, age = world.rng.choice((("oldest", max(numbers)), ("youngest", min(numbers))))
    name = people[numbers.index(age)]
    return _exchange(world, "comparing", f"{said}. Who is the {word}?", f"{name} is the {word}.", f"{name}.")


_TASKS: tuple[Callable[[World], Exchange], ...] = (
    addition, subtraction, multiplication, told_sum, comparison, sorting, extreme, counting, series, calendar, parity, twice, ages,
)  # fmt: skip
_SHARES = (6, 5, 4, 3, 2, 2, 2, 2, 2, 1, 1, 1, 2)
