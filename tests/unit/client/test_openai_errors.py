"""Every error of the gateway has OpenAI's shape, or on its paths Anthropic's, and names the field: walked over every
field of every body.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from pydantic import BaseModel
from starlette.testclient import TestClient

from paged_client import AsyncPagedClient, InvalidRequestError
from paged_client.openai.embeddings_api import EmbeddingBody
from paged_client.openai.gateway import Offer, make_app
from paged_client.openai.message_items import CountBody, MessagesBody
from paged_client.openai.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from paged_client.openai.ranking_api import RerankBody, ScoreBody
from paged_client.openai.response_items import ResponsesBody
from paged_client.question import Question
from tests.unit.client.gateway_calls import HI, Call, Reply, Transport, call
from tests.unit.client.test_openai_tools import HERMES, THINKS, Model, tool

BODIES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/completions": (CompletionBody, {"model": "m", "prompt": "x"}),
    "/v1/chat/completions": (ChatBody, {"model": "m", "messages": HI}),
    "/v1/responses": (ResponsesBody, {"model": "m", "input": "x"}),
    "/v1/messages": (MessagesBody, {"model": "m", "messages": HI, "max_tokens": 5}),
    "/v1/messages/count_tokens": (CountBody, {"model": "m", "messages": HI}),
    "/v1/embeddings": (EmbeddingBody, {"model": "m", "input": "x"}),
    "/v1/score": (ScoreBody, {"model": "m", "text_1": "x", "text_2": "y"}),
    "/v1/rerank": (RerankBody, {"model": "m", "query": "x", "documents": ["y"]}),
    "/tokenize": (TokenizeBody, {"model": "m", "prompt": "x"}),
    "/detokenize": (DetokenizeBody, {"model": "m", "tokens": [1]}),
}
FIELDS = [
    (path, name)
    for path, (kind, _) in BODIES.items()
    for name, field in kind.model_fields.items()
    if field.annotation is not Any
]
HALF = "\ud83d"  # of a surrogate pair


@pytest.fixture(scope="module")
def send() -> Callable[[str, Any], Reply]:
    """Asks one application, which never gets as far as to ask a server."""
    client = AsyncPagedClient("nowhere:1", retries=0)
    client._transport = Transport()
    asking = TestClient(make_app(client, Offer(("m",))))

    def ask(path: str, body: Any) -> Reply:
        response = asking.post(path, json=body)
        return Reply(response.status_code, dict(response.headers), response.text)

    return ask


def check_shape(reply: Reply, path: str, status: int, field: str) -> None:
    """field: that the error names, or something in it."""
    assert reply.status == status, (reply.status, reply.text)
    if path.startswith("/v1/messages"):
        assert set(reply.json) == {"type", "error", "request_id"} and reply.json["type"] == "error"
        assert set(reply.json["error"]) == {"type", "message"} and reply.json["error"]["type"].endswith("_error")
        assert reply.json["error"]["message"].startswith((f"{field}:", f"{field}.")), reply.text
    else:
        error = reply.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert error["param"] == field or error["param"].startswith(f"{field}."), reply.text
        assert error["param"] in error["message"], reply.text


@pytest.mark.parametrize(("path", "name"), FIELDS, ids=lambda value: value.removeprefix("/v1/"))
def test_a_value_of_a_wrong_type_is_refused_by_the_fields_name(
    send: Callable[[str, Any], Reply], path: str, name: str
) -> None:
    kind, body = BODIES[path]
    takes_objects = any(
        "dict" in str(part) or (isinstance(part, type) and issubclass(part, BaseModel))
        for part in _parts(kind.model_fields[name].annotation)
    )
    check_shape(send(path, {**body, name: [[[]]] if takes_objects else {"no": "such"}}), path, 400, name)


def _parts(annotation: Any) -> list[Any]:
    return typing.get_args(annotation) or [annotation]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (path, name)
        for path, (_, body) in BODIES.items()
        for name in body
        if not path.endswith("tokenize") or name == "tokens"
    ],
)
def test_what_is_missing_is_named(send: Callable[[str, Any], Reply], path: str, name: str) -> None:
    check_shape(send(path, {key: value for key, value in BODIES[path][1].items() if key != name}), path, 400, name)


@pytest.mark.parametrize("path", BODIES)
def test_an_unknown_model_is_named(send: Callable[[str, Any], Reply], path: str) -> None:
    reply = send(path, {**BODIES[path][1], "model": "other"})
    assert reply.status == 404
    error = reply.json["error"]
    assert (
        error["type"] == "not_found_error"
        if path.startswith("/v1/messages")
        else (error["param"], error["code"]) == ("model", "model_not_found")
    )


@pytest.mark.parametrize(
    ("path", "name", "value", "field"),
    [
        ("/v1/completions", "prompt", HALF, "prompt"),
        ("/v1/chat/completions", "messages", [*HI, {"role": "user", "content": HALF}], "messages.1"),
        ("/v1/embeddings", "input", ["a", HALF], "input"),
        ("/v1/score", "text_2", HALF, "text_2"),
        ("/v1/rerank", "documents", [HALF], "documents"),
        ("/v1/chat/completions", "messages", [7], "messages.0"),
        ("/v1/chat/completions", "stream_options", {"include_usage": "maybe"}, "stream_options.include_usage"),
        ("/v1/chat/completions", "tools", [tool(), {"type": "function", "function": {}}], "tools.1.function.name"),
        ("/v1/rerank", "documents", ["a", {"txt": "b"}], "documents.1"),
        ("/v1/messages", "messages", [*HI, {"role": "tool", "content": "x"}], "messages.1.role"),
        (
            "/v1/messages",
            "messages",
            [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}],
            "messages.0.content.1",
        ),
        ("/v1/messages", "tools", [{"name": "f", "input_schema": {}}, {"name": "g"}], "tools.1.input_schema"),
        ("/v1/messages", "tools", [{"name": "f", "input_schema": {}}, 7], "tools.1"),
        ("/v1/messages", "thinking", {"type": "enabled", "budget_tokens": -1}, "thinking.budget_tokens"),
        ("/v1/messages", "thinking", {"type": "maybe"}, "thinking.type"),
    ],
)  # fmt: skip
def test_what_is_wrong_inside_a_field_is_named_with_its_place(path: str, name: str, value: Any, field: str) -> None:
    check_shape(call(Model(HERMES, "x"), path, {**BODIES[path][1], name: value}), path, 400, field)


@pytest.mark.parametrize(
    ("path", "message", "field"),
    [
        ("/v1/completions", "logit_bias: expected", "logit_bias"),
        ("/v1/chat/completions", "max_tokens: 7 is more than this model's longest sequence", "max_tokens"),
        ("/v1/responses", "max_tokens: 7 is more than this model's longest sequence", "max_output_tokens"),
        ("/v1/messages", "stop: 70 strings", "stop_sequences"),
        ("/v1/messages", "the prompt has 600 tokens; the longest this model takes is 511", "messages"),
        ("/v1/messages", "chat_template_kwargs: the template cannot be rendered", "thinking"),
        ("/v1/embeddings", "dimensions: 99 is more", "dimensions"),
    ],
)
def test_what_the_server_refuses_has_the_name_that_the_body_has_for_it(path: str, message: str, field: str) -> None:
    transport = Transport(InvalidRequestError(message))
    reply = call(transport, path, BODIES[path][1] | ({"max_output_tokens": 7} if path == "/v1/responses" else {}))
    check_shape(reply, path, 400, field)


class Harmony(Model):
    """Each of its markers and channels is a token."""

    WORDS = ("<|channel|>", "analysis", "<|message|>", "<|end|>")

    def ask(self, question: Question) -> Call:
        if question.tensors.get("text_input") in self.WORDS and question.tensors.get("task") == "tokenize":
            ids = [self.WORDS.index(str(question.tensors["text_input"]))]
            return Call(self, [{"text_output": [""], "output_ids": ids, "finish_reason": ["stop"]}])
        return super().ask(question)


HARMONY = "{% if tools %}<|channel|>commentary{% endif %}"
THOUGHT = "<|channel|>analysis<|message|>Hmm.<|end|><|start|>assistant<|channel|>final<|message|>Four."


@pytest.mark.parametrize("tools", [None, [tool()]], ids=["no tools", "tools"])
@pytest.mark.parametrize("budget", [0, 7])
def test_harmonys_thoughts_have_a_budget_and_are_counted(budget: int, tools: Any) -> None:
    """It begins behind the three tokens that open the message of thoughts, and ends that message."""
    model = Harmony(HARMONY, THOUGHT, ids=[[0, 1, 2, 50, 51, 3, 60, 70, 0, 80, 2, 90]], special=["<|end|>"])
    body = {**BODIES["/v1/chat/completions"][1], "max_thinking_tokens": budget, "tools": tools}
    reply = call(model, "/v1/chat/completions", body)
    message = reply.json["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Four.", "Hmm.")
    assert reply.json["usage"]["completion_tokens_details"] == {"reasoning_tokens": 6}
    sampling = json.loads(str(model.asked[0].tensors["sampling_parameters"]))
    assert (sampling["max_thinking_tokens"], sampling["end_thinking_token_id"]) == (budget + 3, 3)
    assert sampling["start_thinking_token_ids"] == [0, 1] and sampling["skip_special_tokens"] is False


def test_harmonys_template_is_given_thoughts_and_words_before_a_call_as_it_takes_them() -> None:
    """Its own template refuses content beside `thinking`, and looks for markers in a content that must be text."""
    made = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    given = [
        *HI,
        {"role": "assistant", "content": "I look.", "reasoning": "Hmm.", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "assistant", "content": None},
    ]
    model = Harmony(HARMONY, "Four.")
    call(model, "/v1/chat/completions", {"model": "m", "messages": given, "tools": [tool()]})
    messages = json.loads(str(model.asked[0].tensors["messages"]))
    said = [(one["content"], one.get("thinking")) for one in messages if one["role"] == "assistant"]
    assert said == [("", "Hmm.\nI look."), ("", ""), ("", None)]


def test_a_harmony_answer_without_thoughts_has_no_reasoning_tokens() -> None:
    said = "<|channel|>commentary<|message|>I look it up.<|end|><|start|>assistant<|channel|>final<|message|>Four."
    model = Harmony(HARMONY, said, ids=[[0, 4, 2, 50, 3, 60, 70, 0, 80, 2, 90]])
    reply = call(model, "/v1/chat/completions", BODIES["/v1/chat/completions"][1])
    assert reply.json["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


class Spelled(Model):
    """Its words of thinking are several tokens."""

    def ask(self, question: Question) -> Call:
        if question.tensors.get("task") == "tokenize" and "text_input" in question.tensors:
            return Call(self, [{"text_output": [""], "output_ids": [1, 2], "finish_reason": ["stop"]}])
        return super().ask(question)


def test_a_thinking_budget_that_cannot_be_kept_is_refused_in_chats_and_told_of_to_anthropics_clients() -> None:
    check_shape(
        call(
            Spelled(THINKS, "x"),
            "/v1/chat/completions",
            {**BODIES["/v1/chat/completions"][1], "max_thinking_tokens": 5},
        ),
        "",
        400,
        "max_thinking_tokens",
    )
    asked = {**BODIES["/v1/messages"][1], "thinking": {"type": "enabled", "budget_tokens": 5}}
    reply = call(Spelled(THINKS, "x"), "/v1/messages", asked)
    assert reply.status == 200 and reply.headers["x-paged-warning"] == "ignored: thinking.budget_tokens"
    check_shape(
        call(Spelled(THINKS, "x"), "/v1/messages", asked, strict=True), "/v1/messages", 400, "thinking.budget_tokens"
    )


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"max_thinking_tokens": 5}),
        ("/v1/chat/completions", {"thinking_token_budget": 5}),
        ("/v1/responses", {"max_thinking_tokens": 5}),
        ("/v1/messages", {"thinking": {"type": "enabled", "budget_tokens": 5}}),
    ],
)
@pytest.mark.parametrize("end", ["<think>\n", ""], ids=["begun by the prompt", "begun by the model"])
def test_a_thinking_budget_reaches_the_server_with_the_tokens_that_it_needs(
    path: str, asked: dict[str, Any], end: str
) -> None:
    model = Model(THINKS, "Hmm.</think>Yes.", end=end)
    assert call(model, path, BODIES[path][1] | asked).status == 200
    sampling = json.loads(str(model.asked[0].tensors["sampling_parameters"]))
    assert sampling["max_thinking_tokens"] == (5 if end else 6), "what begins it is no thought"
    assert (sampling["end_thinking_token_id"], sampling.get("start_thinking_token_ids")) == (9, None if end else [9])
    plain = Model(HERMES, "Yes.")
    assert call(plain, path, BODIES[path][1] | asked).status == 200
    assert "max_thinking_tokens" not in json.loads(str(plain.asked[0].tensors.get("sampling_parameters", "{}"))), (
        "it does not think"
    )
