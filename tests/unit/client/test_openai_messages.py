"""The Messages API: blocks in, blocks and events out, in the shapes of Anthropic's own library where it is
installed.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from paged_client.openai.message_items import CountBody, chat_of_messages
from tests.unit.client.gateway_calls import Reply, call
from tests.unit.client.test_openai_tools import CALL, HERMES, THINKS, THOUGHT, Model

TOOL = {
    "name": "get_weather",
    "description": "w",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
HI = [{"role": "user", "content": "Hi"}]


def ask(server: Model, **keys: Any) -> Reply:
    return call(server, "/v1/messages", {"model": "m", "max_tokens": 9, "messages": HI, **keys})


def events_of(reply: Reply) -> list[dict[str, Any]]:
    found = []
    for block in reply.text.strip().split("\n\n"):
        kind, data = (line.partition(": ")[2] for line in block.split("\n"))
        found.append(json.loads(data))
        assert found[-1]["type"] == kind
    return found


def rebuilt(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content that the events of a stream add up to."""
    blocks: list[dict[str, Any]] = []
    inputs: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            match delta["type"]:
                case "text_delta":
                    blocks[event["index"]]["text"] += delta["text"]
                case "thinking_delta":
                    blocks[event["index"]]["thinking"] += delta["thinking"]
                case "input_json_delta":
                    inputs[event["index"]] = inputs.get(event["index"], "") + delta["partial_json"]
    for index, text in inputs.items():
        blocks[index]["input"] = json.loads(text)
    return blocks


@pytest.mark.parametrize(
    ("template", "texts", "end", "keys", "content", "reason"),
    [
        (HERMES, ("Hel", "lo."), "", {}, [{"type": "text", "text": "Hello."}], "end_turn"),
        (
            HERMES,
            CALL,
            "",
            {"tools": [TOOL]},
            [
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}},
            ],
            "tool_use",
        ),
        (
            THINKS,
            THOUGHT,
            "<think>",
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            [{"type": "thinking", "thinking": "Hmm.", "signature": ""}, {"type": "text", "text": "Yes."}],
            "end_turn",
        ),
        (THINKS, THOUGHT, "<think>", {}, [{"type": "text", "text": "Yes."}], "end_turn"),
        (
            HERMES,
            ("Hel", "lo.\n\nHu", "man:"),
            "",
            {"stop_sequences": ["Humus", "\n\nHuman:"]},
            [{"type": "text", "text": "Hello."}],
            "stop_sequence",
        ),
        (
            HERMES,
            ("Hel", "lo.\n\nHu"),
            "",
            {"stop_sequences": ["Humus", "\n\nHuman:"]},
            [{"type": "text", "text": "Hello.\n\nHu"}],
            "end_turn",
        ),
        (
            HERMES,
            ("Hel", "lo.\n", "\n"),
            "",
            {"stop_sequences": ["\n\n"], "tools": [TOOL]},
            [{"type": "text", "text": "Hello."}],
            "stop_sequence",
        ),
        (HERMES, ("E", "ND"), "", {"stop_sequences": ["END"]}, [], "stop_sequence"),
        (
            THINKS,
            ("Hm E", "N</think>Yes.E", "ND"),
            "<think>",
            {"thinking": {"type": "enabled", "budget_tokens": 1024}, "stop_sequences": ["END"]},
            [{"type": "thinking", "thinking": "Hm EN", "signature": ""}, {"type": "text", "text": "Yes."}],
            "stop_sequence",
        ),
    ],
    ids=[
        "text",
        "call",
        "thought",
        "thought not asked for",
        "stop sequence",
        "nearly a stop sequence",
        "stop sequence of white space",
        "stop sequence alone",
        "stop sequence behind a thought",
    ],
)
def test_a_message_is_the_same_whole_and_streamed(
    template: str, texts: Any, end: str, keys: dict[str, Any], content: list[dict[str, Any]], reason: str
) -> None:
    def without_ids(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in block.items() if name != "id"} for block in blocks]

    whole = ask(Model(template, *texts, end=end), **keys).json
    assert (without_ids(whole["content"]), whole["stop_reason"], whole["role"]) == (content, reason, "assistant")
    assert (whole["usage"]["input_tokens"], whole["usage"]["output_tokens"]) == (5, len(texts))
    events = events_of(ask(Model(template, *texts, end=end), **keys, stream=True))
    assert (events[0]["type"], events[-1]["type"]) == ("message_start", "message_stop")
    assert events[0]["message"]["usage"]["input_tokens"] == 5
    assert without_ids(rebuilt(events)) == content
    assert (events[-2]["delta"]["stop_reason"], events[-2]["usage"]) == (reason, whole["usage"])
    stopped_by = keys["stop_sequences"][-1] if reason == "stop_sequence" else None
    assert whole["stop_sequence"] == events[-2]["delta"]["stop_sequence"] == stopped_by
    starts = [event["index"] for event in events if event["type"] == "content_block_start"]
    assert (
        starts
        == [event["index"] for event in events if event["type"] == "content_block_stop"]
        == list(range(len(content)))
    )


def test_blocks_become_the_messages_of_a_chat() -> None:
    body = {
        "model": "m",
        "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Paris"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sun"}]},
                    {"type": "text", "text": "And?"},
                ],
            },
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "thinking": {"type": "disabled"},
    }
    chat = chat_of_messages(CountBody.model_validate(body), [])
    call_made = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    assert chat.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call_made], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "user", "content": "And?"},
    ]
    assert (chat.tool_choice, chat.parallel_tool_calls) == ("required", False)
    assert chat.chat_template_kwargs == {"enable_thinking": False, "thinking": False}
    assert chat.tools is not None and chat.tools[0]["function"]["parameters"] == TOOL["input_schema"]


def test_a_system_that_speaks_between_turns_does_so_in_the_users_turn() -> None:
    """As Claude Code asks: it also tells its maker whom to bill, otherwise each time, before the system prompt."""
    body = {
        "model": "m",
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.84c; cc_entrypoint=cli;"},
            {"type": "text", "text": "Be kind."},
        ],
        "messages": [
            {"role": "system", "content": "And short."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "user", "content": "there"},
            {"role": "system", "content": [{"type": "text", "text": "No tools."}]},
            {"role": "assistant", "content": "Hello"},
            {"role": "system", "content": "It is late."},
        ],
    }
    chat = chat_of_messages(CountBody.model_validate(body), [])
    assert chat.messages == [
        {"role": "system", "content": "Be kind.\nAnd short."},
        {"role": "user", "content": "Hi\nthere\n<system-reminder>\nNo tools.\n</system-reminder>"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "<system-reminder>\nIt is late.\n</system-reminder>"},
    ]
    assert not chat.continue_final_message


def test_a_form_and_an_effort_are_the_chats() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    model = Model(HERMES, '{"city": "Paris"}')
    assert (
        ask(model, output_config={"effort": "max", "format": {"type": "json_schema", "schema": schema}}).status == 200
    )
    assert model.sampling["structured_outputs"]["json"] == schema
    assert model.sampling["chat_template_kwargs"] == {"reasoning_effort": "xhigh"}


@pytest.mark.parametrize(
    ("last", "goes_on"),
    [
        ({"role": "assistant", "content": "Once there"}, True),
        ({"role": "assistant", "content": [{"type": "text", "text": "{"}]}, True),
        ({"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}]}, False),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]}, False),
        ({"role": "user", "content": "Go on."}, False),
    ],
    ids=["text", "block", "thought", "call", "user"],
)
def test_an_answer_that_the_caller_has_begun_is_gone_on_with(last: dict[str, Any], goes_on: bool) -> None:
    model = Model(HERMES, "x")
    assert ask(model, messages=[*HI, last]).status == 200
    assert bool(model.asked[-1].tensors.get("continue_final_message")) == goes_on
    call(model, "/v1/messages/count_tokens", {"model": "m", "messages": [*HI, last]})
    assert ("continue_final_message" in model.probes[-1].tensors) == goes_on


def test_tokens_are_counted_without_an_answer() -> None:
    model = Model(HERMES, "x")
    assert call(model, "/v1/messages/count_tokens", {"model": "m", "messages": HI, "tools": [TOOL]}).json == {
        "input_tokens": 2
    }
    assert model.asked == []
    assert "tools" in model.probes[-1].tensors


@pytest.mark.parametrize(
    ("keys", "status", "kind", "words"),
    [
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            400,
            "invalid_request_error",
            "messages.0.role: expected user, assistant or system",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400,
            "invalid_request_error",
            "messages.0.content.0: no block of type 'image'",
        ),
        ({"tools": [{"name": "f"}]}, 400, "invalid_request_error", "tools.0.input_schema"),
        ({"tools": [{"type": "telepathy", "name": "f"}]}, 400, "invalid_request_error", "tools.0.type"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}},
            400,
            "invalid_request_error",
            "there is no tool 'g'",
        ),
        ({"model": "other"}, 404, "not_found_error", "does not exist"),
        (
            {"output_config": {"format": {"type": "grammar"}}},
            400,
            "invalid_request_error",
            "output_config.format: expected type json_schema",
        ),
        (
            {
                "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
                "messages": [*HI, {"role": "assistant", "content": "{"}],
            },
            400,
            "invalid_request_error",
            "output_config.format: not with an answer that the last message has begun",
        ),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_errors_have_anthropics_shape(keys: dict[str, Any], status: int, kind: str, words: str) -> None:
    reply = ask(Model(HERMES, "x"), **keys)
    assert (reply.status, reply.json["type"], reply.json["error"]["type"]) == (status, "error", kind)
    assert words in reply.json["error"]["message"]
    assert reply.json["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/v1/messages/batches", "/v1/messages/batches/x"])
def test_paths_that_are_not_there_have_anthropics_shape(path: str) -> None:
    reply = call(Model(HERMES, "x"), path, {"requests": []})
    assert (reply.status, reply.json["type"], reply.json["error"]["type"]) == (404, "error", "not_found_error")


def test_anthropics_header_carries_the_key() -> None:
    body = {"model": "m", "max_tokens": 9, "messages": HI}
    for headers, status in (
        ({"x-api-key": "secret"}, 200),
        ({"authorization": "Bearer secret"}, 200),
        ({"x-api-key": "no"}, 401),
        ({}, 401),
    ):
        reply = call(Model(HERMES, "x"), "/v1/messages", body, key="secret", headers=headers)
        assert reply.status == status
        assert status == 200 or reply.json["error"]["type"] == "authentication_error"


def test_anthropics_own_library_reads_it() -> None:
    types = pytest.importorskip("anthropic.types")
    from pydantic import TypeAdapter

    types.Message.model_validate(ask(Model(HERMES, *CALL), tools=[TOOL]).json)
    adapter = TypeAdapter(types.RawMessageStreamEvent)
    for event in events_of(ask(Model(HERMES, *CALL), tools=[TOOL], stream=True)):
        adapter.validate_python(event)
    listed = call(Model(HERMES, "x"), "/v1/models").json
    assert not listed["has_more"] and listed["first_id"] == "m"
    for entry in listed["data"]:
        assert types.ModelInfo.model_validate(entry).display_name == entry["id"]
