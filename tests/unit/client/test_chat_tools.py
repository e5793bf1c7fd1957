"""`paged chat --tools`: functions become tools, nothing is run before a person says so, and what comes back goes to the
model.
"""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from paged_client.answers import Answer, Delta, Usage
from paged_client.chat import ChatSession, Conversation, Reader
from paged_client.chat_tools import Reading, Tool, load_tools
from paged_client.openai.answer_forms import ChatForm
from paged_client.openai.formats.families import TOOL_FORMATS, reasoning_format_of
from paged_client.openai.formats.parser import AnswerForm

FILE = '''
"""Tools."""
import math
from typing import Literal

def area(width: float, height: float = 2.0, unit: Literal["m", "cm"] = "m") -> dict:
    """The area of a rectangle.

    Args:
        width: from left to right.
        height (float): from top to bottom.
    """
    return {"area": width * height, "unit": unit}

def shout(text: str) -> str:
    if not text:
        raise RuntimeError("nothing to shout")
    return text.upper()

def _hidden(text: str) -> str:
    return text
'''
CALL = '<tool_call>\n{"name": "area", "arguments": {"width": 3}}\n</tool_call>'


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, Tool]:
    (tmp_path / "mine.py").write_text(FILE)
    return load_tools(tmp_path / "mine.py")


def test_functions_become_tools_by_their_hints_and_docstrings(tools: dict[str, Tool]) -> None:
    assert list(tools) == ["area", "shout"]
    function = tools["area"].description["function"]
    assert (function["name"], function["description"]) == ("area", "The area of a rectangle.")
    schema = function["parameters"]
    assert schema["required"] == ["width"] and schema["additionalProperties"] is False
    assert schema["properties"]["width"] == {"description": "from left to right.", "title": "Width", "type": "number"}
    assert schema["properties"]["height"]["description"] == "from top to bottom." and schema["properties"]["unit"][
        "enum"
    ] == ["m", "cm"]


def test_a_tool_answers_with_its_result_or_with_what_is_wrong(tools: dict[str, Tool]) -> None:
    assert json.loads(tools["area"].run('{"width": 3}')) == {"area": 6.0, "unit": "m"}
    assert tools["shout"].run('{"text": "hey"}') == "HEY"
    assert (
        tools["area"]
        .run('{"width": "wide", "depth": 1}')
        .startswith("error: depth: Extra inputs are not permitted; width: ")
    )
    assert tools["area"].run("no JSON").startswith("error: ")
    assert tools["shout"].run('{"text": ""}') == "error: RuntimeError: nothing to shout"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "it defines no public function"),
        ("def f(x): ...", "f: its argument 'x' has no type"),
        ("def f(*x: int): ...", "f: its argument 'x' has no type"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        (None, "no Python file"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_a_sentence(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tools(tmp_path / "mine.py")


class Stream:
    """An answer in pieces of three characters."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.stopped = False
        self.answer = Answer(text, (1,), "stop", Usage(5, 0, 1))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def stop(self) -> None:
        self.stopped = True

    def __iter__(self) -> Iterator[Delta]:
        starts = range(0, len(self._text), 3)
        for start in starts:
            yield Delta(self._text[start : start + 3], (1,), "stop" if start == starts[-1] else None, Usage(5, 0, 1))


class Client:
    def __init__(self, *texts: str) -> None:
        self._texts = list(texts)
        self.asked: list[dict[str, Any]] = []

    def stream(self, **options: Any) -> Stream:
        self.asked.append(json.loads(json.dumps(options)))
        return Stream(self._texts.pop(0))


def talk(
    monkeypatch: pytest.MonkeyPatch, tools: dict[str, Tool], texts: Sequence[str], lines: Sequence[str]
) -> tuple[Client, str, Conversation]:
    client, shown, conversation, waiting = Client(*texts), io.StringIO(), Conversation(), list(lines)

    def typed(_: str = "") -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    monkeypatch.setattr("builtins.input", typed)
    form = ChatForm(AnswerForm(tools=TOOL_FORMATS["hermes"], reasoning=reasoning_format_of("<think></think>")))
    reader = Reader(
        tools, Reading(form, {"temperature": 0, "structured_outputs": {}}), Reading(form, {"temperature": 0})
    )
    session = ChatSession(
        client, conversation, reader, Console(file=shown, force_terminal=True, highlight=False, markup=False, width=200)
    )  # type: ignore[arg-type]
    session.run()
    assert not session.failed
    return client, shown.getvalue(), conversation


def test_a_call_is_run_once_a_person_agrees_and_the_model_goes_on_with_its_result(
    monkeypatch: pytest.MonkeyPatch, tools: dict[str, Tool]
) -> None:
    client, shown, conversation = talk(
        monkeypatch, tools, (f"<think>Let me see.</think>{CALL}", "It is 6."), ("How large?", "y")
    )
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant", "tool", "assistant"]
    call, result = conversation.turns[1]["tool_calls"][0], conversation.turns[2]
    assert call["function"] == {"name": "area", "arguments": {"width": 3}} and result["tool_call_id"] == call["id"]
    assert json.loads(result["content"]) == {"area": 6.0, "unit": "m"}
    assert [list(asked) for asked in client.asked] == [
        ["messages", "tools", "temperature", "structured_outputs"],
        ["messages", "tools", "temperature"],
    ]
    assert (
        client.asked[1]["messages"] == conversation.turns[:3]
        and client.asked[0]["tools"][0]["function"]["name"] == "area"
    )
    assert (
        "\x1b[2mLe\x1b[0m\x1b[2mt m" in shown
        and 'area({"width": 3})' in shown
        and "It is 6." in shown
        and "tool_call" not in shown
    )


@pytest.mark.parametrize(
    "lines", [("How large?", "n"), ("How large?", ""), ("How large?",)], ids=["no", "nothing said", "nobody there"]
)
def test_nothing_is_run_otherwise(
    monkeypatch: pytest.MonkeyPatch, tools: dict[str, Tool], lines: Sequence[str]
) -> None:
    ran = []
    tool = Tool(lambda **given: ran.append(given), tools["area"].arguments, tools["area"].description)
    _, _, conversation = talk(monkeypatch, {"area": tool}, (CALL, "Then not."), lines)
    assert not ran and conversation.turns[2]["content"] == "error: the user does not allow this call"


def test_ctrl_c_stops_the_tool_that_runs_and_the_model_hears_of_it(
    monkeypatch: pytest.MonkeyPatch, tools: dict[str, Tool]
) -> None:
    tool = Tool(lambda **_: signal.raise_signal(signal.SIGINT), tools["area"].arguments, tools["area"].description)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _, shown, conversation = talk(monkeypatch, {"area": tool}, (CALL, "Then not."), ("How large?", "y"))
    except KeyboardInterrupt:  # of pytest's, otherwise
        pytest.fail("Ctrl-C left the chat")
    finally:
        signal.signal(signal.SIGINT, before)
    assert conversation.turns[2]["content"] == "error: the user stopped this call"
    assert "Then not." in shown and "stopped: " not in shown


def test_a_model_that_only_calls_is_stopped_and_unknown_tools_are_told(
    monkeypatch: pytest.MonkeyPatch, tools: dict[str, Tool]
) -> None:
    _, shown, conversation = talk(monkeypatch, {"shout": tools["shout"]}, (CALL,) * 8, ("How large?",))
    assert "8 calls for one question" in shown and conversation.turns[2]["content"] == "error: there is no tool area"


def test_an_answer_without_a_call_is_shown_as_it_comes(monkeypatch: pytest.MonkeyPatch, tools: dict[str, Tool]) -> None:
    _, shown, conversation = talk(monkeypatch, tools, ("  Hello there.",), ("Hi",))
    assert "Hello there." in shown and conversation.turns[-1] == {"role": "assistant", "content": "Hello there."}
