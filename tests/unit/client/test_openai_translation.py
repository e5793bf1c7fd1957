"""What OpenAI's words become for our server, and its refusals in OpenAI's."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi")

from paged_client.errors import (
    AnswerTimeoutError,
    InvalidRequestError,
    RequestCancelledError,
    ServerError,
    UnavailableError,
    UnknownModelError,
    UnreachableError,
    UnsupportedError,
)
from paged_client.openai.errors import RefusalError, refusal_of
from paged_client.openai.translation import Asked
from tests.unit.client.asked import ASK, chat, completion


def given(asked: Asked) -> dict[str, Any]:
    return {name: value for name, value in asked.sampling.items() if value is not None}


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("one", ("one",)),
        ([5, 6], ([5, 6],)),
        (["one", "two"], ("one", "two")),
        ([[5], [6, 7]], ([5], [6, 7])),
    ],
    ids=["text", "ids", "texts", "lists of ids"],
)
def test_a_prompt_is_text_or_ids_or_many_of_either(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [[], [[]], [True], [-1], [2**31], ["a", 1], [[1], "a"], None, 7], ids=str)
def test_a_prompt_of_another_kind_is_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match="prompt"):
        completion(prompt=prompt)


def test_chats_are_sampled_as_the_checkpoint_recommends_unless_they_say_otherwise() -> None:
    assert given(chat())["generation_defaults"] is True
    assert given(chat(generation_defaults=False))["generation_defaults"] is False
    assert "generation_defaults" not in given(completion())
    assert given(completion(generation_defaults=True))["generation_defaults"] is True


def test_sampling_keys_keep_their_names() -> None:
    keys = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["a"],
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {"5": -100.0},
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [1],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "bad_words": ["b"],
        "truncate_prompt_tokens": 5,
        "priority_level": -1,
        "request_deadline_seconds": 2.5,
        "skip_prefix_cache": True,
        "generation_defaults": False,
    }
    for asked in (completion(**keys, max_tokens=9), chat(**keys, max_tokens=9)):
        assert given(asked) == keys | {"max_tokens": 9}
        assert asked.num_choices == 2


@pytest.mark.parametrize(
    "key", ["guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"]
)
def test_guided_keys_keep_their_names(key: str) -> None:
    value = {"guided_json": {"type": "object"}, "guided_choice": ["a", "b"], "structured_outputs": {"regex": "a"}}.get(
        key, "a+"
    )
    assert given(chat(**{key: value}))[key] == value


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "integer"}}},
            {"type": "integer"},
        ),
    ],
    ids=lambda value: value.get("type") if value else "",
)
def test_a_response_format_is_a_json_schema(response_format: dict[str, Any], schema: Any) -> None:
    assert given(chat(response_format=response_format)).get("structured_outputs") == (
        schema and {"json": schema, "disable_any_whitespace": True}
    )


@pytest.mark.parametrize(
    "response_format",
    [{}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": 3}}],
    ids=str,
)
def test_another_response_format_is_refused(response_format: dict[str, Any]) -> None:
    with pytest.raises(RefusalError) as refused:
        chat(response_format=response_format)
    assert refused.value.param == "response_format"


def test_max_tokens_go_by_three_names_and_completions_have_openais_default() -> None:
    assert given(completion())["max_tokens"] == 16
    assert "max_tokens" not in given(chat())
    assert given(chat(max_tokens=4))["max_tokens"] == 4
    newer = chat(max_tokens=4, max_completion_tokens=5)
    assert (given(newer)["max_tokens"], newer.params["max_tokens"]) == (5, "max_completion_tokens")


def test_the_templates_variables_and_special_tokens_go_to_the_server() -> None:
    assert given(chat(chat_template_kwargs={"enable_thinking": False}))["chat_template_kwargs"] == {
        "enable_thinking": False
    }
    assert "chat_template_kwargs" not in given(chat())
    assert given(completion(add_special_tokens=False))["add_special_tokens"] is False


def test_chat_asks_for_logprobs_with_two_keys_and_completions_with_one() -> None:
    assert given(completion(logprobs=0))["logprobs"] == 0
    assert given(completion(logprobs=5))["logprobs"] == 5
    assert given(chat(logprobs=True))["logprobs"] == 0
    assert given(chat(logprobs=True, top_logprobs=5))["logprobs"] == 5
    assert "logprobs" not in given(chat(logprobs=False))
    with pytest.raises(RefusalError, match="logprobs must be true"):
        chat(top_logprobs=5)


def test_what_only_names_the_caller_is_ignored() -> None:
    assert (
        completion(user="me", metadata={"a": "b"}, store=True, service_tier="auto", prompt_cache_key="k")
        == completion()
    )


@pytest.mark.parametrize(
    ("keys", "param"),
    [
        ({"audio": {}}, "audio"),
        ({"functions": []}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        (
            {"messages": [*ASK, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.1.content",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "tool_call_id": "1", "content": {"a": 1}}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "tool_call_id": "1", "content": 5}]}, "messages.0.content"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_had_is_refused_by_name(keys: dict[str, Any], param: str) -> None:
    with pytest.raises(RefusalError) as refused:
        chat(**keys)
    assert (refused.value.param, refused.value.status) == (param, 400)


@pytest.mark.parametrize(
    ("keys", "param"),
    [({"suffix": "x"}, "suffix")],
    ids=["suffix"],
)
def test_what_a_completion_cannot_have_is_refused_by_name(keys: dict[str, Any], param: str) -> None:
    with pytest.raises(RefusalError) as refused:
        completion(**keys)
    assert refused.value.param == param


@pytest.mark.parametrize("keys", [{"prompt": "\ud800"}, {"stop": "\ud800"}, {"cache_salt": "\ud800"}], ids=str)
def test_half_a_character_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(RefusalError, match="no Unicode text"):
        completion(**keys)


def test_messages_are_made_what_templates_expect() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    asked = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    call,
                    {"function": {"name": "g", "arguments": "no JSON"}},
                    {"function": {"name": "h", "arguments": ""}},
                    {"function": {"name": "i", "arguments": None}},
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "3"},
            {"role": "assistant", "content": "4", "reasoning": "Hm."},
        ]
    )
    assert asked.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\ntwo"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {**call, "function": {"name": "f", "arguments": {"a": 1}}},
                {"function": {"name": "g", "arguments": {"arguments": "no JSON"}}},
                {"function": {"name": "h", "arguments": {}}},
                {"function": {"name": "i", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": "4", "reasoning": "Hm.", "reasoning_content": "Hm."},
    ]
    assert asked.prompts == (None,)


def test_tools_go_to_the_template_unless_none_is_chosen() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(tools=tools).tools == chat(tools=tools, tool_choice="auto").tools == tools
    assert chat(tools=tools, tool_choice="none").tools is None
    assert chat(tools=[]).tools is None


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (InvalidRequestError("top_p: 7 is too much"), 400, "top_p", None),
        (InvalidRequestError("text_input: the prompt is empty"), 400, "prompt", None),
        (
            InvalidRequestError("the prompt has 9 tokens; the longest this model takes is 8"),
            400,
            "prompt",
            "context_length_exceeded",
        ),
        (InvalidRequestError("structured_outputs.json: 'not' is not supported"), 400, "response_format", None),
        (
            InvalidRequestError("unknown sampling parameter 'structured_outputs'; known: n"),
            400,
            "response_format",
            "unsupported_parameter",
        ),
        (UnsupportedError("guided_regex: needs a package"), 400, "guided_regex", None),
        (UnknownModelError("gone"), 503, "model", "not_ready"),
        (UnavailableError("the queue is full"), 503, None, "overloaded"),
        (UnreachableError("nobody"), 503, None, "overloaded"),
        (AnswerTimeoutError("late"), 504, None, "timeout"),
        (RequestCancelledError("late"), 504, None, "timeout"),
        (ServerError("broken"), 500, None, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_has_a_status_that_says_whether_to_try_again(
    error: Any, status: int, param: str | None, code: str | None
) -> None:
    refusal = refusal_of(error, completion(response_format={"type": "json_object"}).params)
    assert (refusal.status, refusal.param, refusal.code) == (status, param, code)
    said = refusal.body()["error"]
    assert said["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert said["message"].startswith(param or "") or code in ("context_length_exceeded", "not_ready")
    assert ("Retry-After" in refusal.headers()) == (status == 503)
