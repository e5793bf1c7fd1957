"""Conversations in which the last answer is thought about first: sums step by step, counting letters, days, who is the
oldest; and what is thought before everything else.

`python -m tools.demo_model.thinking` prints a few.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from tools.demo_model import words
from tools.demo_model.chat import EOS, Answer, Dialogue, Exchange, Style, Turn, Weight, rendered, thought
from tools.demo_model.generator import conversation
from tools.demo_model.phrasing import enumeration
from tools.demo_model.smalltalk import PUZZLED, SORRY, UNTOLD, manner
from tools.demo_model.tools_offered import strange_word
from tools.demo_model.world import Split, World, is_allowed

_OTHER_FORMS = (("given", "notes", "letter", "paper", "memory", "talk", "tasks", "told"), (4, 3, 2, 2, 3, 3, 3, 1))
_OTHER_SHARE = 0.3


@dataclass(frozen=True)
class Problem:
    """A question, the way to its answer, and the answer."""

    question: str
    steps: str
    answer: Answer


def dialogue(rng: random.Random, split: Split) -> Dialogue:
    """A conversation whose last turn thinks: about a problem, or in few words about something else."""
    if rng.random() < _OTHER_SHARE:
        return _of_other_things(rng, split)
    world = World(rng, split)
    style = manner(world).style if world.chance(0.3) else Style()
    turns = [] if style.system is None else [Turn("system", style.system)]
    problems = [problem(world) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    for each in problems:
        turns.append(Turn("user", each.question))
        said = style.words_of(Exchange(each.question, each.answer))
        # without its thoughts an earlier answer is not to be learned: it stands there, as a history has it
        turns.append(Turn("assistant", said, Weight.NONE, each.answer.kind))
    turns[-1] = Turn("assistant", thought(problems[-1].steps, turns[-1].text), Weight.EXACT, problems[-1].answer.kind)
    return Dialogue(tuple(turns), facts=frozenset(world.facts))


def _of_other_things(rng: random.Random, split: Split) -> Dialogue:
    found = conversation(rng, split, rng.choices(*_OTHER_FORMS)[0])
    turns, last = found.turns, found.exchanges[-1].answer
    turns[-1] = Turn("assistant", thought(_glance(last), turns[-1].text), turns[-1].weight, f"thinking: {last.kind}")
    return Dialogue(tuple(turns), facts=found.facts)


def _glance(answer: Answer) -> str:
    """What is thought of a question with nothing to work out."""
    if answer.full in (SORRY, PUZZLED, UNTOLD):
        return "Nobody has told me that."
    if answer.evidence is not None:
        return f"It was said: {answer.evidence}"
    return "That is simple."


def problem(world: World) -> Problem:
    return world.rng.choices(_TASKS, _SHARES)[0](world)


def _numbers(world: World, name: str, *ranges: tuple[int, int]) -> list[int]:
    """Drawn until they are of the split."""
    while True:
        drawn = [world.rng.randint(least, most) for least, most in ranges]
        if is_allowed(f"thought {name} {drawn}", world.split):
            return drawn


def _places(number: int) -> list[int]:
    """347 → [300, 40, 7]."""
    digits = str(number)
    return [int(digit) * 10 ** (len(digits) - 1 - at) for at, digit in enumerate(digits) if digit != "0"]


def _added(a: int, b: int, sign: str = "+") -> str:
    """a + b or a - b, b place by place."""
    steps = []
    for place in _places(b):
        after = a + place if sign == "+" else a - place
        steps.append(f"{a} {sign} {place} = {after}")
        a = after
    return ". ".join(steps)


def _asked(world: World, expression: str) -> str:
    said = world.rng.choice(("What is {}?", "How much is {}?", "Calculate {}.", "{} = ?", "{}", "Work out {}."))
    spelled = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
    if world.chance(0.3):
        expression = " ".join(spelled.get(part, part) for part in expression.split(" "))
    return said.format(expression)


def _equation(kind: str, expression: str, result: int) -> Answer:
    return Answer(f"thinking: {kind}", f"{expression} = {result}", str(result))


def product(world: World) -> Problem:
    tops = world.rng.choice(((9, 99), (99, 99), (9, 999)))
    a, b = _numbers(world, "*", *((2, top) for top in tops))
    a, b = (b, a) if world.chance(0.5) else (a, b)
    expression = f"{a} * {b}"
    return Problem(_asked(world, expression), _multiplied(a, b), _equation("product", expression, a * b))


def _multiplied(a: int, b: int) -> str:
    """Place by place of both; the partial products are added up."""
    parts, total = [], 0
    for x in _places(a):
        for y in _places(b):
            parts.append(f"{x} * {y} = {x * y}")
            if total:
                parts.append(f"{total} + {x * y} = {total + x * y}")
            total += x * y
    return ". ".join(parts)


def addition(world: World) -> Problem:
    top = world.rng.choice((99, 999, 9999))
    a, b = _numbers(world, "+", (10, top), (10, top))
    return Problem(_asked(world, f"{a} + {b}"), _added(a, b), _equation("addition", f"{a} + {b}", a + b))


def subtraction(world: World) -> Problem:
    top = world.rng.choice((99, 999, 9999))
    b, a = sorted(_numbers(world, "-", (10, top), (10, top)))
    return Problem(_asked(world, f"{a} - {b}"), _added(a, b, "-"), _equation("subtraction", f"{a} - {b}", a - b))


def division(world: World) -> Problem:
    """Tens of the divisor are taken away first, then ones."""
    divisor, quotient = _numbers(world, "/", (2, 12), (2, 99))
    number, steps, left = divisor * quotient, [], divisor * quotient
    for place in _places(quotient):
        steps.append(f"{place} * {divisor} = {place * divisor}")
        left -= place * divisor
        steps.append(f"{left} are left")
    if len(_places(quotient)) > 1:
        steps.append(f"{' + '.join(map(str, _places(quotient)))} = {quotient}")
    expression = f"{number} / {divisor}"
    return Problem(_asked(world, expression), ". ".join(steps), _equation("division", expression, quotient))


def several(world: World) -> Problem:
    """Three to five numbers, from left to right."""
    count = world.rng.randint(3, 5)
    numbers = _numbers(world, "several", (1, 99), *[(1, 60)] * (count - 1))
    expression, total, steps = str(numbers[0]), numbers[0], []
    for number in numbers[1:]:
        sign = "-" if number <= total and world.chance(0.4) else "+"
        after = total - number if sign == "-" else total + number
        steps.append(f"{total} {sign} {number} = {after}")
        expression, total = f"{expression} {sign} {number}", after
    return Problem(_asked(world, expression), ". ".join(steps), _equation("several numbers", expression, total))


def shopping(world: World) -> Problem:
    """What several things cost together, and perhaps what is left."""
    person, (first, second) = world.person(), world.rng.sample(words.GOODS, 2)
    a, x, b, y = _numbers(world, "shop", (2, 9), (2, 12), (2, 9), (2, 12))
    total = a * x + b * y
    question = f"{person} buys {a} {first} for {x} coins each and {b} {second} for {y} coins each."
    steps = f"{a} * {x} = {a * x}. {b} * {y} = {b * y}. {a * x} + {b * y} = {total}"
    if world.chance(0.5):
        answer = Answer("thinking: story sum", f"{person} pays {total} coins.", f"{total}")
        return Problem(f"{question} How many coins does {person} pay?", steps, answer)
    purse = total + world.rng.randint(1, 60)
    answer = Answer("thinking: story sum", f"{person} has {purse - total} coins left.", f"{purse - total}")
    return Problem(
        f"{person} has {purse} coins. {question} How many coins are left?",
        f"{steps}. {purse} - {total} = {purse - total}",
        answer,
    )


def boxes(world: World) -> Problem:
    person, goods = world.person(), world.new(words.GOODS)
    a, b, c = _numbers(world, "boxes", (2, 9), (3, 30), (1, 40))
    total = a * b
    question = f"{person} has {a} boxes with {b} {goods} in each"
    if c < total and world.chance(0.5):
        verb = world.rng.choice(("sells", "loses", "gives away"))
        steps, result, question = f"{total} - {c} = {total - c}", total - c, f"{question} and {verb} {c} {goods}."
    else:
        steps, result, question = f"{total} + {c} = {total + c}", total + c, f"{question} and finds {c} more {goods}."
    answer = Answer("thinking: story sum", f"{person} has {result} {goods}.", f"{result}")
    return Problem(f"{question} How many {goods} does {person} have?", f"{_multiplied(a, b)}. {steps}", answer)


def letter_count(world: World) -> Problem:
    """How often a letter comes in a word."""
    word = strange_word(world) if world.chance(0.5) else world.rng.choice(words.PLAIN_WORDS)
    if world.chance(0.25):
        word += world.rng.choice(words.PLAIN_WORDS)
    letter = world.rng.choice(word) if world.chance(0.85) else world.rng.choice("abcdefghijklmnoprstuvw")
    count, steps = 0, []
    for each in word:
        count += each == letter
        steps.append(f"{each} {count}")
    times = {1: "once", 2: "twice"}.get(count, f"{count} times") if count else "not once"
    question = world.rng.choice(
        (
            "How many times is the letter {l} in {w}?",
            "How many {l} are in {w}?",
            "How often does {l} come in {w}?",
            "How many {l}'s are in the word {w}?",
            "Count the letter {l} in {w}.",
        )
    ).format(l=letter, w=word)
    return Problem(
        question,
        ", ".join(steps),
        Answer("thinking: letters", f"The letter {letter} comes {times} in {word}.", str(count)),
    )


def length(world: World) -> Problem:
    word = strange_word(world) if world.chance(0.5) else world.rng.choice(words.PLAIN_WORDS)
    steps = ", ".join(f"{each} {at}" for at, each in enumerate(word, 1))
    question = world.rng.choice(
        ("How many letters has the word {}?", "How many letters are in {}?", "How long is the word {}?")
    ).format(word)
    return Problem(
        question, steps, Answer("thinking: letters", f"The word {word} has {len(word)} letters.", str(len(word)))
    )


def weekday(world: World) -> Problem:
    day, (days,) = world.rng.randrange(7), _numbers(world, "days", (2, 27))
    side = world.rng.choice(("after", "before"))
    steps, left = [], days
    while left >= 7:
        steps.append(f"{left} - 7 = {left - 7}")
        left -= 7
    step = 1 if side == "after" else -1
    steps += [f"{count} {words.DAYS[(day + step * count) % 7]}" for count in range(left + 1)]
    found = words.DAYS[(day + step * days) % 7]
    question = world.rng.choice(("Which day is {n} days {s} {d}?", "What day is it {n} days {s} {d}?")).format(
        n=days, s=side, d=words.DAYS[day]
    )
    return Problem(
        question, ". ".join(steps), Answer("thinking: days", f"{days} days {side} {words.DAYS[day]} is {found}.", found)
    )


def oldest(world: World) -> Problem:
    """Who of several people is the oldest or the youngest: one is kept, and compared with the next."""
    people = [world.person().name for _ in range(world.rng.randint(2, 5))]
    while True:
        ages = world.rng.sample(range(5, 90), len(people))
        if is_allowed(f"thought ages {ages}", world.split):
            break
    said = enumeration([f"{name} is {age}" for name, age in zip(people, ages, strict=True)])
    is_oldest = world.chance(0.5)
    best, steps = 0, [f"{people[0]} {ages[0]}"]
    for at in range(1, len(people)):
        if (ages[at] > ages[best]) == is_oldest:
            best = at
        steps.append(f"{people[at]} {ages[at]}: {people[best]} {ages[best]}")
    word, name = "oldest" if is_oldest else "youngest", people[best]
    return Problem(
        f"{said}. Who is the {word}?",
        ". ".join(steps),
        Answer("thinking: comparing", f"{name} is the {word}.", f"{name}."),
    )


def chain(world: World) -> Problem:
    """Who is taller than whom, in any order; the ends of the chain are asked for."""
    people = [world.person().name for _ in range(world.rng.randint(3, 5))]
    more, most, least = world.rng.choice(
        (("taller", "tallest", "smallest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest"))
    )
    pairs = list(itertools.pairwise(people))
    said = [f"{a} is {more} than {b}." for a, b in world.rng.sample(pairs, len(pairs))]
    word, name = world.rng.choice(((most, people[0]), (least, people[-1])))
    answer = Answer("thinking: chain", f"{name} is the {word}.", f"{name}.")
    return Problem(f"{' '.join(said)} Who is the {word}?", " > ".join(people), answer)


def share(world: World) -> Problem:
    """Percentages by tens."""
    tens, number = _numbers(world, "percent", (1, 9), (1, 90))
    number *= 10
    steps = f"10 percent of {number} is {number // 10}. {tens} * {number // 10} = {tens * number // 10}"
    answer = Answer(
        "thinking: percent", f"{tens * 10} percent of {number} is {tens * number // 10}.", str(tens * number // 10)
    )
    return Problem(f"What is {tens * 10} {world.rng.choice(('percent', '%'))} of {number}?", steps, answer)


_TASKS: tuple[Callable[[World], Problem], ...] = (
    product, addition, subtraction, division, several, shopping, boxes, letter_count, length, weekday, oldest, chain, share,
)  # fmt: skip
_SHARES = (6, 3, 3, 3, 3, 2, 2, 3, 1, 2, 2, 2, 1)


if __name__ == "__main__":
    for seed in range(24):
        shown = rendered(dialogue(random.Random(f"shown {seed}"), Split.TRAIN).turns)
        print(shown.replace(EOS, f"{EOS}\n"), end="\n\n")
