"""Conversations with tools: calls, what came back, and answers from that; also what needs no call, what no tool can
do, and what a question leaves out.

`python -m tools.demo_model.tool_use` prints a few.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.demo_model.calculators import calculators, some_sum
from tools.demo_model.chat import EOS, Answer, Dialogue, Exchange, Style, Turn, Weight, call_text, rendered, thought
from tools.demo_model.memory import facts
from tools.demo_model.papers import notes
from tools.demo_model.phrasing import enumeration, write
from tools.demo_model.smalltalk import SORRY, manner, talk
from tools.demo_model.template import offer
from tools.demo_model.tool_kinds import ACTIONS, LOOKUPS, any_action, any_lookup
from tools.demo_model.tools_offered import Kind, Offered, Value, offered, spaced
from tools.demo_model.wordplay import wordplay
from tools.demo_model.world import Split, World

_MOST_TOOLS = 5
_CALCULATOR_SHARE = 0.35
_THINKING_SHARE = 0.25
_FAILURES = ("not found", "unknown {noun}", "no such {noun}", "timeout", "the service is down", "permission denied")

Call = tuple[Offered, Mapping[str, Any]]  # the arguments by the parameters' keys


@dataclass(frozen=True)
class Step:
    """Calls at once, and what came back."""

    calls: tuple[Call, ...]
    results: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Task:
    """What a user asks, and what has to happen."""

    question: str
    steps: tuple[Step, ...]
    answer: Answer
    reason: str = ""  # what is thought before an answer without calls


def arguments_of(call: Call) -> dict[str, Any]:
    """The arguments by the names that the tool gives them."""
    tool, given = call
    return {tool.names[key]: value for key, value in given.items()}


def dialogue(rng: random.Random, split: Split, thinks: bool | None = None) -> Dialogue:
    """A conversation with tools. thinks: whether its last turn does; None: some."""
    world = World(rng, split)
    tools, sums = _tools(world)
    tasks = [_task(world, tools, sums) for _ in range(rng.choice((1, 1, 2, 2, 3, 4)))]
    style = manner(world).style if world.chance(0.4) else Style()
    descriptions = [tool.description for tool in tools]
    turns = [Turn("system", offer(descriptions, style.system or ""))]
    answers: list[tuple[int, str]] = []  # where they are, and the thought that precedes each
    for task in tasks:
        turns.append(Turn("user", task.question))
        for step in task.steps:
            answers.append((len(turns), _plan(step)))
            written = "\n".join(call_text(call[0].name, arguments_of(call)) for call in step.calls)
            turns.append(Turn("assistant", written, Weight.EXACT, step.kind))
            turns += [Turn("tool", result) for result in step.results]
        answers.append((len(turns), _reading(task)))
        said = style.words_of(Exchange(task.question, task.answer))
        turns.append(Turn("assistant", said, Weight.EXACT if task.answer.exact else Weight.FREE, task.answer.kind))
    if thinks or (thinks is None and world.chance(_THINKING_SHARE)):
        at, words = rng.choice(answers)
        last = turns[at]
        turns = [*turns[:at], Turn("assistant", thought(words, last.text), last.weight, f"{last.kind}, thinking")]
    return Dialogue(tuple(turns), tuple(descriptions), frozenset(world.facts))


def _plan(step: Step) -> str:
    names = [call[0].name for call in step.calls]
    return f"{names[0]} can tell." if len(names) == 1 else f"I ask {names[0]} {len(names)} times."


def _reading(task: Task) -> str:
    if not task.steps:
        return task.reason
    return f"It says: {' and '.join(task.steps[-1].results)}"


def _tools(world: World) -> tuple[list[Offered], list[Offered]]:
    """All that are offered, in any order, and those of them that calculate."""
    sums = calculators(world) if world.chance(_CALCULATOR_SHARE) else []
    found: dict[str, Offered] = {tool.name: tool for tool in sums}
    if len(found) < len(sums):
        return _tools(world)
    kinds = {tool.kind.key for tool in sums}
    most = world.rng.randint(0 if sums else 1, _MOST_TOOLS)
    for _ in range(most):
        kind = _kind(world)
        tool = offered(world, kind)
        if kind.key not in kinds and tool.name not in found and len(found) < _MOST_TOOLS:
            kinds.add(kind.key)
            found[tool.name] = tool
    return world.rng.sample(list(found.values()), len(found)), sums


def _kind(world: World) -> Kind:
    chance = world.rng.random()
    if chance < 0.4:
        return any_lookup(world)
    if chance < 0.65:
        return world.rng.choice(LOOKUPS)
    return world.rng.choice(ACTIONS) if chance < 0.88 else any_action(world)


def _task(world: World, tools: Sequence[Offered], sums: Sequence[Offered]) -> Task:
    chance = world.rng.random()
    if chance < 0.12:
        return _talk(world)
    if chance < 0.18:
        return _unfit(world, tools)
    tool = world.rng.choice(tools)
    if tool in sums:
        return _calculation(world, list(sums))
    if chance < 0.22 and tool.kind.is_lookup:
        return _left_out(world, tool)
    price = next((each for each in tools if each.kind.key == "price"), None)
    if price is not None and any(each.kind.key == "calculator expression" for each in sums) and world.chance(0.4):
        return _bill(world, price, next(each for each in sums if each.kind.key == "calculator expression"))
    if tool.kind.is_lookup and world.chance(0.15):
        return _two_at_once(world, tool)
    return _one_call(world, tool)


# ---- tasks


def _calculation(world: World, tools: list[Offered]) -> Task:
    found, call = some_sum(world, tools)
    result, problem = _result(world, call, found.result, 0.03)
    answer = Answer("tools: sum", found.full, str(found.result))
    return Task(found.question, (Step((call,), (result,), "tools: call of a calculator"),), problem or answer)


def _one_call(world: World, tool: Offered) -> Task:
    kind = tool.kind
    given, phrases = _drawn(world, tool)
    shown = {key: enumeration(value) if isinstance(value, list) else value for key, value in given.items()}
    question = write(world.rng, kind.ask, shown)
    for phrase in phrases:
        question = f"{question[:-1]} {phrase}{question[-1]}" if question[-1] in ".?!" else f"{question} {phrase}"
    value = kind.result(world, kind.key)
    result, problem = _result(world, (tool, given), value, 0.06)
    sort = "unseen sort" if kind.key.startswith("any ") else "known sort"
    answer = _answer(world, tool, shown, value, "tools: answer")
    return Task(question, (Step(((tool, given),), (result,), f"tools: call of a {sort}"),), problem or answer)


def _drawn(world: World, tool: Offered) -> tuple[dict[str, Any], list[str]]:
    """Arguments by key, and what is said of the optional ones."""
    given: dict[str, Any] = {}
    phrases = []
    for parameter in tool.kind.parameters:
        if parameter.phrase:
            if not world.chance(0.35):
                continue
            value = parameter.draw(world, f"{tool.kind.key} {parameter.key}")
            phrases.append(parameter.phrase.format(v=value))
        else:
            value = parameter.draw(world, f"{tool.kind.key} {parameter.key}")
        given[parameter.key] = value
    return given, phrases


def _answer(world: World, tool: Offered, shown: Mapping[str, Any], value: Value, kind: str) -> Answer:
    if isinstance(value, dict) and len(value) > 1:
        told = enumeration([f"the {spaced(name)} is {each}" for name, each in value.items()])
        full = f"For {next(iter(shown.values()))}, {told}."
        return Answer(kind, full)
    found = enumeration([str(each) for each in value]) if isinstance(value, list) else value
    full = write(world.rng, tool.kind.said, {**shown, "result": found})
    return Answer(kind, full, f"{found}" if tool.kind.short else None)


def _result(world: World, call: Call, value: Value, failing: float) -> tuple[str, Answer | None]:
    """What the tool says: as text or JSON; and, where it fails, what to say then."""
    tool = call[0]
    if world.chance(failing):
        problem = world.rng.choice(_FAILURES).format(noun=tool.noun)
        said = world.rng.choice((f"error: {problem}", f"Error: {problem}", json.dumps({"error": problem})))
        return said, Answer("tools: failure", f"I am sorry, that did not work: {problem}.")
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False), None
    chance = world.rng.random()
    if chance < 0.5:
        return str(value), None
    noun = tool.kind.key.removeprefix("any ").replace(" ", "_")
    key = world.rng.choice(("result", "value", "answer", noun if tool.kind.is_lookup else "result"))
    return json.dumps({key: value}, ensure_ascii=False), None


def _two_at_once(world: World, tool: Offered) -> Task:
    kind = tool.kind
    of = "in" if " in {x}" in kind.said else "of"
    noun = kind.key.removeprefix("any ")
    drawn = list(dict.fromkeys(kind.parameters[0].draw(world, f"{kind.key} x") for _ in range(8)))[:2]
    if len(drawn) < 2:  # the split has but one such value
        return _one_call(world, tool)
    first, second = drawn
    ask = world.rng.choice(
        (
            "What is the {n} {o} {a} and {o} {b}?",
            "Tell me the {n} {o} {a} and of {b}.",
            "What is the {n} {o} {a} and {b}?",
        )
    )
    question = ask.format(n=noun, o=of, a=first, b=second).replace(" and of ", f" and {of} ")
    values = [kind.result(world, kind.key) for _ in range(2)]
    values = [world.rng.choice([*value.values()]) if isinstance(value, dict) else value for value in values]
    calls: tuple[Call, ...] = tuple((tool, {"x": value}) for value in drawn)
    results = [_result(world, call, value, 0)[0] for call, value in zip(calls, values, strict=True)]
    said = f"The {noun} {of} {first} is {values[0]} and the {noun} {of} {second} is {values[1]}."
    step = Step(calls, tuple(results), "tools: two calls at once")
    return Task(question, (step,), Answer("tools: answer from two results", said, f"{values[0]} and {values[1]}"))


def _bill(world: World, price: Offered, calculator: Offered) -> Task:
    """A price is looked up, then multiplied."""
    goods, count, cost = world.pick("tool bill", "goods"), world.rng.randint(2, 40), world.rng.randint(2, 400)
    question = write(
        world.rng,
        "[What do {n} {x} cost?|How much are {n} {x}?|What is the price of {n} {x}?]",
        {"n": count, "x": goods},
    )
    look, work = (price, {"x": goods}), (calculator, {"x": f"{count} * {cost}"})
    steps = (
        Step((look,), (_result(world, look, cost, 0)[0],), "tools: first of two steps"),
        Step((work,), (_result(world, work, count * cost, 0)[0],), "tools: second of two steps"),
    )
    return Task(
        question,
        steps,
        Answer("tools: answer after two steps", f"{count} {goods} cost {count * cost}.", str(count * cost)),
    )


def _left_out(world: World, tool: Offered) -> Task:
    noun = tool.kind.key.removeprefix("any ")
    question = write(world.rng, "[What is the {n}?|Tell me the {n}.|I need the {n}.|Look up the {n}.]", {"n": noun})
    asked = Answer("tools: left out", f"Which {tool.noun} do you mean?")
    return Task(question, (), asked, f"The {tool.noun} is missing.")


def _unfit(world: World, tools: Sequence[Offered]) -> Task:
    """A question that another tool could answer."""
    kinds = {tool.kind.key for tool in tools}
    while True:
        kind = world.rng.choice((any_lookup(world), world.rng.choice(LOOKUPS)))
        if (
            kind.key not in kinds
            and not (kind.key == "time" and "now" in kinds)
            and not (kind.key == "meaning" and "search" in kinds)
        ):
            break
    question = write(world.rng, kind.ask, {"x": kind.parameters[0].draw(world, f"{kind.key} x")})
    return Task(question, (), Answer("tools: none fits", SORRY), "No tool can tell.")


def _talk(world: World) -> Task:
    """Something that needs no tool."""
    chance = world.rng.random()
    if chance < 0.4:
        exchange = talk(world, 1, None)[0][0]
    elif chance < 0.7:
        exchange = wordplay(world, 1)[0]
    elif chance < 0.85:
        exchange = facts(world, 1)[0].telling
    else:
        exchange = notes(world, 1, 2)[0]
    return Task(exchange.user, (), exchange.answer, "No tool is needed.")


if __name__ == "__main__":
    for seed in range(12):
        shown = rendered(dialogue(random.Random(f"shown {seed}"), Split.TRAIN).turns)
        print(shown.replace(EOS, f"{EOS}\n"), end="\n\n")
