"""`paged demo --tools` without a server: its functions, and its loop with OpenAI's own library before the gateway; the
model behind that is a script.
"""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import openai
from rich.console import Console

from paged_backend.errors import EngineError
from paged_client import demo_tools
from paged_client.chat_tools import tool_of
from paged_client.demo_agent import FUNCTIONS, Agent, Shown, gateway_before
from paged_client.question import Question
from tests.unit.client.gateway_calls import Call
from tests.unit.client.test_openai_tools import THINKS, Model
from tests.unit.client.test_real_clients import serving


@pytest.mark.parametrize(
    ("expression", "value"),
    [("1234 * 567", 699678), ("8 / 4", 2), ("2+3 * -4", -10), ("1 / 3", 0.333333), (" 7 ", 7), ("0.5 + 1", 1.5)],
)
def test_the_calculator_calculates(expression: str, value: float) -> None:
    found = demo_tools.calculate(expression)
    assert found == value and isinstance(found, type(value))


@pytest.mark.parametrize(
    "expression", ["2 ** 99", "__import__('os')", "a + 1", "True + 1", "", "1" * 201, "1 / 0", "(" * 150, "1e999"]
)
def test_the_calculator_takes_nothing_else(expression: str) -> None:
    assert tool_of(demo_tools.calculate).run(json.dumps({"expression": expression})).startswith("error: ")


def test_the_list_of_towns_says_what_it_does_not_have() -> None:
    assert demo_tools.get_population("Oldport") > 0
    assert tool_of(demo_tools.get_population).run('{"city": "Atlantis"}').startswith("error: ")


class Script(Model):
    """Answers the questions one after the other."""

    def __init__(self, *answers: tuple[str, ...]) -> None:
        super().__init__(THINKS, "", end="<think>")
        self.answers = list(answers)

    def ask(self, question: Question) -> Call:
        if "task" in question.tensors:
            return super().ask(question)
        self.asked.append(question)
        texts = self.answers.pop(0)
        pieces = Model(THINKS, *texts).events
        return Call(self, pieces)


def talk(model: Model, *questions: str) -> list[str]:
    """What is on the screen, in lines."""
    screen = io.StringIO()
    tools = {function.__name__: tool_of(function) for function in FUNCTIONS}
    with (
        serving(model) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client,
    ):
        agent = Agent(client, "m", tools, 50, Shown(Console(file=screen, highlight=False)))
        for question in questions:
            agent.ask(question, True)
    return screen.getvalue().splitlines()


def asked(model: Model, number: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = json.loads(str(model.asked[number].tensors["messages"]))
    return messages


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_a_question_is_thought_about_called_for_and_answered() -> None:
    both = f"{call('get_population', city='Thornby')}\n{call('calculate', expression='3 * 4')}"
    model = Script(
        ("I ask ", f"both.</think>\n\n{both[:30]}", both[30:]),
        ("It says: 12</think>\n\n3170 and ", "12."),
        ("</think>Hi.",),
    )
    *first, cost, _, hello, greeting, _, _ = talk(model, "And?", "Hello!")
    assert first == [
        "> And?",
        "I ask both.",
        'get_population({"city": "Thornby"})',
        'calculate({"expression": "3 * 4"})',
        "→ 3170",
        "→ 12",
        "It says: 12",
        "3170 and 12.",
    ]
    assert cost.startswith("2 calls, 5 tokens (") and cost.endswith("; 0 of 10 prompt tokens were cached")
    assert (hello, greeting) == ("> Hello!", "Hi.")
    question, calls, *results, answer, _ = asked(model, 2)
    assert question == {"role": "user", "content": "And?"}
    assert [one["function"]["name"] for one in calls["tool_calls"]] == ["get_population", "calculate"]
    assert [(one["role"], one["content"]) for one in results] == [("tool", "3170"), ("tool", "12")]
    assert [one["tool_call_id"] for one in results] == [one["id"] for one in calls["tool_calls"]]
    assert answer == {"role": "assistant", "content": "3170 and 12."}, "thoughts do not go back"
    assert {tuple(json.loads(str(each.tensors["tools"]))[0]) for each in model.asked} == {("type", "function")}


def test_what_goes_wrong_is_for_the_model_to_read_and_does_not_go_on_for_ever() -> None:
    model = Script(*[(f"</think>{call('get_moon', x=1)}",)] * 5, ("</think>\x1b[1mDone.",))
    lines = talk(model, "Loop!", "And?")
    assert lines.count("→ error: there is no tool get_moon") == 5
    assert sum(line.startswith("5 calls, ") for line in lines) == 1
    assert "[1mDone." in lines, "what a model says does not steer the terminal"


def test_a_gateway_that_does_not_start_says_why() -> None:
    with pytest.raises(EngineError, match="the gateway did not start: .*ftp://nowhere"):
        with gateway_before("ftp://nowhere", lambda: False):
            pass


def test_a_stop_is_heard_while_the_gateway_starts() -> None:
    with gateway_before("localhost:1", lambda: True) as base_url:
        assert base_url is None
