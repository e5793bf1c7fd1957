"""What agents send in the Messages API: results of tools of every kind, tools of Anthropic's own, limits."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from paged_client.errors import AnswerTimeoutError
from paged_client.openai.unknown_keys import WARNING_HEADER
from tests.unit.client.gateway_calls import Reply, call
from tests.unit.client.test_openai_messages import TOOL, ask, events_of
from tests.unit.client.test_openai_tools import HERMES, THINKS, THOUGHT, Model

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="}}
CACHED = {"cache_control": {"type": "ephemeral"}}


def turns(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    use = {"type": "tool_use", "id": "c", "name": "f", "input": {}, **CACHED}
    return [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": list(blocks)},
    ]


def result(content: Any, **members: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "c", "content": content, **CACHED, **members}


def asked(model: Model) -> Any:
    return json.loads(str(model.asked[-1].tensors["messages"]))


@pytest.mark.parametrize(
    ("block", "text", "ignored"),
    [
        (result([{"type": "text", "text": "a", **CACHED}, {"type": "text", "text": "b"}]), "a\nb", ""),
        (
            result([{"type": "text", "text": "a"}, IMAGE]),
            "a\n[image: left out, since only text can be read here]",
            "1.image",
        ),
        (result([PDF]), "[document: left out, since only text can be read here]", "0.document"),
        (
            result([{"type": "document", "title": "T", "source": {"type": "text", "data": "a"}}]),
            "T\na",
            "",
        ),
        (
            result([{"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "a"}]}}]),
            "a",
            "",
        ),
        (
            result(
                [{"type": "search_result", "title": "T", "source": "u", "content": [{"type": "text", "text": "a"}]}]
            ),
            "T\nu\na",
            "",
        ),
        (result([{"type": "tool_reference", "tool_name": "g"}]), "The tool g can be called.", ""),
        (result("no such file", is_error=True), "Error: no such file", ""),
        (result("Error: no such file", is_error=True), "Error: no such file", ""),
        (result([], is_error=True), "Error: ", ""),
        (result("fine", is_error=False), "fine", ""),
        ({"type": "tool_result", "tool_use_id": "c"}, "", ""),
    ],
    ids=[
        *("texts", "image", "pdf", "text document", "document of blocks", "search result", "tool reference"),
        *("error", "error that says so", "error without words", "no error", "nothing"),
    ],
)
def test_a_model_reads_of_a_tools_result_what_is_text(block: dict[str, Any], text: str, ignored: str) -> None:
    model = Model(HERMES, "x")
    reply = ask(model, messages=turns(block))
    assert reply.status == 200, reply.text
    assert asked(model)[-1] == {"role": "tool", "tool_call_id": "c", "content": text}
    places = f"ignored: messages.2.content.0.content.{ignored}" if ignored else None
    assert reply.headers.get(WARNING_HEADER) == places


def test_what_a_user_shows_is_refused_where_it_cannot_be_read() -> None:
    for block in (IMAGE, PDF, {"type": "text"}, result([{"type": "text"}]), result(["x"])):
        reply = ask(Model(HERMES, "x"), messages=turns(block))
        assert reply.status == 400 and "messages.2.content.0" in reply.json["error"]["message"]
    model = Model(HERMES, "x")
    shown = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a"}}
    assert ask(model, messages=[{"role": "user", "content": [shown]}]).status == 200
    assert asked(model) == [{"role": "user", "content": "a"}]
    assert ask(model, messages=[{"role": "user", "content": []}]).status == 200
    assert asked(model) == [{"role": "user", "content": ""}]


def count(body: dict[str, Any], **options: Any) -> Reply:
    return call(Model(HERMES, "x"), "/v1/messages/count_tokens", body, **options)


def test_what_is_anthropics_own_is_left_out_with_a_warning() -> None:
    kinds = ("bash_20250124", "text_editor_20250728", "web_search_20250305", "computer_toolset_20260801", "mcp_toolset")
    tools = [*({"type": kind, "name": kind} for kind in kinds), {**TOOL, "type": "custom", **CACHED}]
    ran = [
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
        {"type": "text", "text": "Found."},
    ]
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": ran},
        {"role": "user", "content": "On."},
    ]
    model = Model(HERMES, "x")
    reply = ask(model, tools=tools, messages=messages, tool_choice={"type": "auto"})
    blocks = ["messages.1.content.0.server_tool_use", "messages.1.content.1.web_search_tool_result"]
    ignored = [*blocks, *(f"tools.{at}.{kind}" for at, kind in enumerate(kinds))]
    assert reply.headers[WARNING_HEADER] == f"ignored: {', '.join(ignored)}"
    assert [tool["function"]["name"] for tool in json.loads(str(model.asked[-1].tensors["tools"]))] == ["get_weather"]
    assert asked(model)[1] == {"role": "assistant", "content": "Found."}
    body = {"model": "m", "messages": messages, "tools": tools}
    assert count(body).headers[WARNING_HEADER] == reply.headers[WARNING_HEADER]
    refused = count(body, strict=True)
    assert refused.status == 400 and "messages.1.content.0.type" in refused.json["error"]["message"]


@pytest.mark.parametrize(("max_tokens", "reason"), [(2, "max_tokens"), (9, "model_context_window_exceeded")])
def test_an_answer_for_which_the_model_has_no_more_room_says_so(max_tokens: int, reason: str) -> None:
    model = Model(HERMES, "Hel", "lo.")
    model.events = (model.events[0], {**model.events[1], "finish_reason": ["length"]})
    assert ask(model, max_tokens=max_tokens).json["stop_reason"] == reason
    (delta,) = [
        event for event in events_of(ask(model, max_tokens=max_tokens, stream=True)) if event["type"] == "message_delta"
    ]
    assert delta["delta"]["stop_reason"] == reason


@pytest.mark.parametrize(
    ("thinking", "kinds"),
    [
        ({"type": "adaptive"}, ["thinking", "text"]),
        ({"type": "between_tools"}, ["thinking", "text"]),
        ({"type": "enabled", "budget_tokens": 1024, "display": "omitted"}, ["text"]),
    ],
    ids=["adaptive", "between tools", "omitted"],
)
def test_thoughts_are_told_to_those_who_want_them(thinking: dict[str, Any], kinds: list[str]) -> None:
    said = ask(Model(THINKS, *THOUGHT, end="<think>"), thinking=thinking).json
    assert [block["type"] for block in said["content"]] == kinds
    assert said["usage"]["output_tokens_details"]["thinking_tokens"] > 0


def test_an_answer_that_takes_too_long_breaks_off_with_anthropics_word_for_it() -> None:
    model = Model(HERMES, "Hel", "lo.")
    model.events = (model.events[0], AnswerTimeoutError("too long"))
    last = events_of(ask(model, stream=True))[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "timeout_error")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ('{"a": "\\ud83d"}', {"a": "?"}),
        ('{"a": NaN}', {}),
        ('{"a": ' + "[" * 3000 + "]" * 3000 + "}", {}),
        ('{"a": ', {}),
    ],
    ids=["half a character", "no number", "too deep", "cut off"],
)
def test_a_call_whose_arguments_cannot_be_written_is_answered_all_the_same(arguments: str, found: Any) -> None:
    model = Model(HERMES, f'<tool_call>{{"name": "f", "arguments": {arguments}')
    (block,) = ask(model, tools=[TOOL]).json["content"]
    assert (block["type"], block["input"]) == ("tool_use", found)
