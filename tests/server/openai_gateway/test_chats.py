"""Chats, tools, forms and responses."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")
pytest.importorskip("xgrammar")

import jsonschema
import openai

from paged_backend.server.launch import Server
from tests.server.openai_gateway.questions import HI, direct

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]


def test_a_chat_goes_through_the_models_template(server: Server, client: Any) -> None:
    expected = direct(server, "user: Where is the lamp?\nassistant:", temperature=0, max_tokens=12)
    asked = {"model": "paged_llm", "messages": HI, "temperature": 0}
    answer = client.chat.completions.create(**asked, max_completion_tokens=12)
    assert (answer.choices[0].message.content, answer.choices[0].message.role) == (expected.text, "assistant")
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == expected.usage.num_input_tokens
    parts = [{"role": "user", "content": [{"type": "text", "text": HI[0]["content"]}]}]
    assert (
        client.chat.completions.create(**{**asked, "messages": parts}, max_tokens=12).choices[0].message.content
        == expected.text
    )
    pieces = list(client.chat.completions.create(**asked, max_tokens=12, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.text
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices[0].finish_reason] == [
        expected.finish_reason
    ]


def test_a_tool_that_must_be_called_is_called_with_arguments_that_validate(client: Any) -> None:
    """Streamed and whole, by a model that has never seen a tool."""
    schema = {
        "type": "object",
        "properties": {"room": {"enum": ["hall", "attic"]}, "lit": {"type": "boolean"}},
        "required": ["room", "lit"],
        "additionalProperties": False,
    }
    tools = [
        {"type": "function", "function": {"name": "find_lamp", "parameters": schema}},
        {"type": "function", "function": {"name": "wait"}},
    ]
    asked = {
        "model": "paged_llm",
        "messages": HI,
        "max_tokens": 200,
        "seed": 4,
        "tools": tools,
        "parallel_tool_calls": False,
    }
    named = {"type": "function", "function": {"name": "find_lamp"}}
    for choice in ("required", named):
        answer = client.chat.completions.create(**asked, tool_choice=choice).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        (made,) = answer.message.tool_calls
        assert (
            made.function.name in ("find_lamp", "wait") if choice == "required" else made.function.name == "find_lamp"
        )
        if made.function.name == "find_lamp":
            jsonschema.validate(json.loads(made.function.arguments), schema)
        with client.chat.completions.stream(**asked, tool_choice=choice) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.message.tool_calls[0].function.arguments == made.function.arguments
        assert final.finish_reason == "tool_calls"
    wrong = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    with pytest.raises(openai.BadRequestError, match="tools: 'not' is not supported"):
        client.chat.completions.create(**{**asked, "tools": [wrong]}, tool_choice="required")


def test_tools_reach_the_template_and_calls_come_back_as_text(server: Server, client: Any) -> None:
    tools = [{"type": "function", "function": {"name": "find_lamp", "parameters": {}}}]
    expected = direct(server, "tool: find_lamp\nuser: Where is the lamp?\nassistant:", temperature=0, max_tokens=8)
    asked = {"model": "paged_llm", "messages": HI, "temperature": 0, "max_tokens": 8, "tools": tools}
    answer = client.chat.completions.create(**asked)
    assert (answer.choices[0].message.content, answer.choices[0].message.tool_calls) == (expected.text, None)
    assert answer.usage.prompt_tokens == expected.usage.num_input_tokens
    assert (
        client.chat.completions.create(**asked, tool_choice="none").usage.prompt_tokens
        < expected.usage.num_input_tokens
    )


def test_an_answer_has_the_form_that_was_asked_for(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"enum": ["Mira", "Tom"]},
            "age": {"type": "integer", "minimum": 1, "maximum": 99},
            "works": {"type": "boolean"},
        },
        "required": ["name", "age", "works"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    asked = {"model": "paged_llm", "messages": HI, "max_tokens": 400, "seed": 3}
    answer = client.chat.completions.create(**asked, n=2, response_format=form)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), schema)
    chosen = client.completions.create(
        model="paged_llm", prompt="The lamp is", max_tokens=20, extra_body={"guided_choice": ["red", "blue"]}
    )
    assert chosen.choices[0].text in ("red", "blue")
    with pytest.raises(openai.BadRequestError, match="response_format: 'not' is not supported"):
        client.chat.completions.create(
            **asked,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"not": {"type": "string"}}},
            },
        )


def test_responses_stream_go_on_and_have_the_form_that_was_asked_for(client: Any) -> None:
    asked = {"model": "paged_llm", "max_output_tokens": 12, "temperature": 0}
    first = client.responses.create(**asked, input="Where is the lamp?")
    same = client.chat.completions.create(model="paged_llm", messages=HI, temperature=0, max_tokens=12)
    assert first.output_text == same.choices[0].message.content
    assert (first.usage.input_tokens, first.usage.output_tokens) == (
        same.usage.prompt_tokens,
        same.usage.completion_tokens,
    )
    *events, last = client.responses.create(**asked, input="Where is the lamp?", stream=True)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == first.output_text
    assert last.type == f"response.{first.status}" and last.response.output_text == first.output_text
    second = client.responses.create(**asked, input="And now?", previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    assert client.responses.retrieve(second.id).output_text == second.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**asked, input="x", previous_response_id=first.id)
    schema = {
        "type": "object",
        "properties": {"lit": {"type": "boolean"}},
        "required": ["lit"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "lamp", "schema": schema}
    formed = client.responses.create(model="paged_llm", input="x", max_output_tokens=60, text={"format": form})
    jsonschema.validate(json.loads(formed.output_text), schema)
    tool = {"type": "function", "name": "find_lamp", "parameters": schema, "strict": True}
    called = client.responses.create(
        model="paged_llm",
        input="x",
        max_output_tokens=90,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    (item,) = called.output
    assert item.type == "function_call" and json.loads(item.arguments)["lit"] in (True, False)
