"""Calculators as tools, in four forms, and the sums that users bring to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tools.demo_model import words
from tools.demo_model.tools_offered import Kind, Offered, Parameter, number, offered
from tools.demo_model.world import World, is_allowed

_NUMBER = number(0, 9999)
_A = Parameter("a", "a x first left number1 first_number", _NUMBER, "number", about="The first number")
_B = Parameter("b", "b y second right number2 second_number", _NUMBER, "number", about="The second number")
_WORDS = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
_ABOUT = "[Calculates|Computes|Evaluates|Works out] [an arithmetic expression|a sum|what an expression is worth]."


def _kind(key: str, verbs: str, nouns: str, about: str, *parameters: Parameter) -> Kind:
    return Kind(f"calculator {key}", verbs, nouns, about, "", "", _NUMBER, parameters)


_EXPRESSION = _kind("expression", "calculate compute evaluate run", "expression calculator sum math arithmetic term", _ABOUT,
                    Parameter("x", "expression sum term formula input calculation", _NUMBER, about="For example 2 + 3"))  # fmt: skip
_OPERATION = Parameter("op", "operation operator op", _NUMBER, enum=tuple(_WORDS.values()))
_SIGN = Parameter("sign", "operation operator op", _NUMBER, enum=tuple(_WORDS))
_OPERANDS = _kind("operands", "calculate compute run", "calculator sum math arithmetic two_numbers",
                  "[Calculates|Computes] with two numbers.", _A, _B, _OPERATION)  # fmt: skip
_SIGNED = _kind("signs", "calculate compute run", "calculator sum math arithmetic two_numbers",
                "[Calculates|Computes] with two numbers.", _A, _B, _SIGN)  # fmt: skip
_SINGLE = {
    "+": _kind("add", "add sum plus", "numbers two_numbers values", "[Adds|Add] two numbers.", _A, _B),
    "-": _kind("subtract", "subtract minus", "numbers two_numbers values", "[Subtracts|Subtract] two numbers.", _A, _B),
    "*": _kind("multiply", "multiply times", "numbers two_numbers values", "[Multiplies|Multiply] two numbers.", _A, _B),
    "/": _kind("divide", "divide", "numbers two_numbers values", "[Divides|Divide] two numbers.", _A, _B),
}  # fmt: skip
_TOTAL = _kind("total", "add_up sum total", "numbers list values", "[Adds up|Sums] [numbers|a list of numbers].",
               Parameter("numbers", "numbers values items list", _NUMBER, "[number]"))  # fmt: skip


@dataclass(frozen=True)
class Sum:
    """Numbers and signs between them, and how it is asked and answered."""

    question: str
    expression: str  # "17 + 25"
    result: int
    full: str

    @property
    def parts(self) -> list[str]:
        return self.expression.split(" ")


def calculators(world: World) -> list[Offered]:
    """One calculator, or a tool for each of some operations."""
    if world.chance(0.2):
        return [offered(world, _SINGLE[sign]) for sign in world.rng.sample(list(_SINGLE), world.rng.randint(2, 4))]
    kind = world.rng.choice((_EXPRESSION, _EXPRESSION, _EXPRESSION, _OPERANDS, _SIGNED, _TOTAL))
    return [offered(world, kind)]


def call_for(tools: list[Offered], found: Sum) -> tuple[Offered, Mapping[str, Any]] | None:
    """The call that works the sum out, its arguments by the parameters' keys; None: these calculators cannot."""
    parts = found.parts
    numbers = [int(part) for part in parts[::2]]
    for tool in tools:
        form = tool.kind.key.removeprefix("calculator ")
        if form == "expression":
            return tool, {"x": found.expression}
        if form == "total" and set(parts[1::2]) == {"+"}:
            return tool, {"numbers": numbers}
        if len(numbers) != 2:
            continue
        arguments = {"a": numbers[0], "b": numbers[1]}
        if form == "operands":
            return tool, arguments | {"op": _WORDS[parts[1]]}
        if form == "signs":
            return tool, arguments | {"sign": parts[1]}
        if form == _WORDS[parts[1]]:
            return tool, arguments
    return None


def some_sum(world: World, tools: list[Offered]) -> tuple[Sum, tuple[Offered, Mapping[str, Any]]]:
    """A sum that one of the tools can do, and its call."""
    while True:
        found = _sum(world)
        if (call := call_for(tools, found)) is not None:
            return found, call


def _sum(world: World) -> Sum:
    rng = world.rng
    if world.chance(0.3):
        return _told(world)
    while True:
        sign = rng.choice("++--**/")
        top = rng.choice((10, 100, 100, 1000, 10000))
        a, b = rng.randrange(top), rng.randrange(1, top if world.chance(0.6) else 100)
        if sign == "/":
            a, b = a * b, b
        expression, result = f"{a} {sign} {b}", {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        if world.chance(0.15) and sign in "+-":
            c, other = rng.randrange(top), rng.choice("+-")
            expression, result = f"{expression} {other} {c}", result + (c if other == "+" else -c)
        if is_allowed(f"sum {expression}", world.split):
            break
    shown = expression
    if world.chance(0.35):
        spelled = {"+": "plus", "-": "minus", "*": rng.choice(("times", "x")), "/": "divided by"}
        shown = " ".join(spelled.get(part, part) for part in expression.split(" "))
    elif world.chance(0.15):
        shown = expression.replace(" ", "")
    question = rng.choice(
        ("What is {}?", "How much is {}?", "Calculate {}.", "{} = ?", "{}", "Work out {}.", "What's {}?")
    )
    return Sum(question.format(shown), expression, result, f"{expression} = {result}")


def _told(world: World) -> Sum:
    """A sum in words."""
    rng = world.rng
    goods, person = world.new(words.GOODS), world.person()
    while True:
        a, b = rng.randint(3, rng.choice((30, 900))), rng.randint(2, rng.choice((20, 400)))
        if is_allowed(f"told sum {a} {b}", world.split):
            break
    form = rng.choice("+-*/")
    if form == "+":
        question = f"{person} has {a} {goods} and {rng.choice(('gets', 'buys', 'finds'))} {b} more. How many {goods} does {person} have now?"
        return Sum(question, f"{a} + {b}", a + b, f"{person} has {a + b} {goods}.")
    if form == "-":
        a, b = max(a, b), min(a, b)
        question = f"{person} has {a} {goods} and {rng.choice(('loses', 'sells'))} {b}. How many {goods} are left?"
        return Sum(question, f"{a} - {b}", a - b, f"{person} has kept {a - b} {goods}.")
    if form == "*":
        question = f"There are {a} boxes with {b} {goods} in each. How many {goods} are there?"
        return Sum(question, f"{a} * {b}", a * b, f"There are {a * b} {goods}.")
    question = f"{b} people share {a * b} {goods}. How many {goods} does each of them get?"
    return Sum(question, f"{a * b} / {b}", a, f"Each gets {a} {goods}.")
