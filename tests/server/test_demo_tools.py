"""Agents with the embedded model, nothing in between made up: a real server, a real gateway, OpenAI's own library, and
`paged demo --tools`. The model was trained to call and to think: nothing is enforced here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("xgrammar")

from paged_backend.server.launch import ServerSettings
from paged_client.demo_agent import AGENT_QUESTIONS
from tests.server.gateway_process import Gateway, gateway_to
from tests.server.served import served

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

MODEL = "paged_llm"
TEXT = {"type": "string"}


def described(name: str, description: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    described("calculate", "Works out an arithmetic expression.", expression=TEXT),
    described("get_population", "Look up the population of the city.", city=TEXT),
]
THINKING: dict[str, dict[str, Any]] = {
    "no thought": {},
    "by the template's switch": {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}},
    "by effort": {"reasoning_effort": "low"},
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    options = {"num_pages": 400, "dtype": "float32"}
    with served(ServerSettings(instances=1, options=options)) as server:
        with gateway_to(server.addresses.grpc_url, tmp_path_factory.mktemp("gateway")) as running:
            yield running


def whole(client: Any, messages: list[dict[str, Any]], **keys: Any) -> tuple[dict[str, Any], str, str]:
    """(the message as it goes back, its thoughts, why it ended)"""
    (choice,) = client.chat.completions.create(
        model=MODEL, messages=messages, tools=TOOLS, temperature=0, **keys
    ).choices
    thought = getattr(choice.message, "reasoning_content", None) or ""
    message = choice.message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True)
    return message, thought, choice.finish_reason


def streamed(client: Any, messages: list[dict[str, Any]], **keys: Any) -> tuple[dict[str, Any], str, str]:
    """The same from pieces: a call's name comes first, then its arguments."""
    content, thought, reason, calls = "", "", "", list[dict[str, Any]]()
    for chunk in client.chat.completions.create(
        model=MODEL, messages=messages, tools=TOOLS, temperature=0, stream=True, **keys
    ):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        thought += getattr(choice.delta, "reasoning_content", None) or ""
        reason = choice.finish_reason or reason
        for piece in choice.delta.tool_calls or ():
            if piece.id is not None:
                assert piece.index == len(calls)
                function = {"name": piece.function.name, "arguments": ""}
                calls.append({"id": piece.id, "type": "function", "function": function})
            calls[piece.index]["function"]["arguments"] += piece.function.arguments or ""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    return message | ({"tool_calls": calls} if calls else {}), thought, reason


@pytest.mark.one_in(6)
@pytest.mark.parametrize("thinking", THINKING)
@pytest.mark.parametrize("ask", [whole, streamed])
def test_the_model_calls_the_right_tool_and_answers_from_its_result(gateway: Gateway, ask: Any, thinking: str) -> None:
    keys = THINKING[thinking]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the population of Riverton?"}]
    with gateway.client() as client:
        message, thought, reason = ask(client, messages, **keys)
        (call,) = message["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
            "get_population",
            {"city": "Riverton"},
        )
        assert (reason, bool(thought), message.get("content") or "") == ("tool_calls", bool(keys), "")
        messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": "417"}]
        answer, thought, reason = ask(client, messages, **keys)
    assert "417" in answer["content"] and "tool_calls" not in answer
    assert (reason, bool(thought)) == ("stop", bool(keys))
    assert "think>" not in answer["content"] + thought


def test_thoughts_are_counted_and_end_where_their_budget_does(gateway: Gateway) -> None:
    asked = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": "What is 17 * 25?"}]}
    with gateway.client() as client:
        free = client.chat.completions.create(**asked, reasoning_effort="low")
        short = client.chat.completions.create(**asked, reasoning_effort="low", extra_body={"max_thinking_tokens": 3})
    counts = [answer.usage.completion_tokens_details.reasoning_tokens for answer in (free, short)]
    assert counts[0] > counts[1] == 4, "three and the one that ends them"
    assert all(answer.choices[0].message.content for answer in (free, short))


def test_what_needs_no_tool_calls_none(gateway: Gateway) -> None:
    with gateway.client() as client:
        answer, _, reason = whole(client, [{"role": "user", "content": "Hello!"}])
    assert reason == "stop" and answer["content"] and "tool_calls" not in answer


# ---- paged demo --tools


DEMO = (sys.executable, "-m", "paged_client.cli", "demo", "--tools")


def environment(folder: Path) -> dict[str, str]:
    """folder: for temporary files."""
    return {**os.environ, "TMPDIR": str(folder), "PAGED_API_KEY": "not the demo's"}


@pytest.mark.long
def test_the_demo_calls_what_it_needs_and_answers_from_the_results(tmp_path: Path) -> None:
    done = subprocess.run(DEMO, env=environment(tmp_path), capture_output=True, text=True, timeout=240, check=False)
    said, errors = done.stdout, done.stderr
    assert errors.endswith("paged: stopped\n") and "error" not in errors, errors
    assert list(tmp_path.iterdir()) == []
    _, *parts = re.split(r"^> (.*)\n", said, flags=re.MULTILINE)
    answered = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(answered) == list(AGENT_QUESTIONS)
    num_calls = []
    for question, text in answered.items():
        *_, answer, cost, _, _ = text.split("\n")
        results = re.findall(r"^→ (.*)$", text, re.MULTILINE)
        num_calls.append(len(results))
        found = re.match(rf"{len(results)} calls?, \d+ tokens \((\d+) of them thought\) in \d+\.\d s; ", cost)
        assert found and (int(found[1]) > 0) == AGENT_QUESTIONS[question], text
        assert "error" not in text and all(result in answer for result in results), text
    assert num_calls == [1, 1, 2, 0], said


@pytest.mark.long
def test_ctrl_c_ends_the_demo_and_its_gateway(tmp_path: Path) -> None:
    running = subprocess.Popen(
        DEMO, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    port = re.search(r"http://127\.0\.0\.1:(\d+)", running.stdout.readline())
    running.send_signal(signal.SIGINT)
    said, errors = running.communicate(timeout=120)
    assert (running.returncode, errors.splitlines()[-1]) == (0, "paged: stopped"), errors
    assert said.count("> ") <= 1 and "error" not in errors
    assert port is not None
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(port[1]))) != 0, "the gateway still listens"
