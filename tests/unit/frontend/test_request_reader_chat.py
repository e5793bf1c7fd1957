"""`messages` and its companions as tensors and parameters, and the code that an error's text may begin with."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from paged_backend.errors import RequestError
from paged_backend.frontend.request_reader import read_request, wants_error_code
from paged_backend.request import Chat, Request

MESSAGES = json.dumps([{"role": "user", "content": "hi"}])


def read(parameters: dict[str, Any] | None = None, **values: Any) -> Request:
    tensors = {
        name: np.array([value], np.bool_ if isinstance(value, bool) else np.object_) for name, value in values.items()
    }
    return read_request(tensors, json.dumps(parameters or {}), 0.0)


def test_messages_replace_the_text() -> None:
    request = read(messages=MESSAGES.encode())
    assert (request.text, request.input_ids, request.chat) == (None, None, Chat(messages=MESSAGES))


def test_a_turn_is_opened_unless_the_last_one_is_continued() -> None:
    for given, (opens, continues) in {
        (): (True, False),
        (("continue_final_message", True),): (False, True),
        (("add_generation_prompt", False),): (False, False),
        (("add_generation_prompt", False), ("continue_final_message", True)): (False, True),
    }.items():
        for request in (read(messages=MESSAGES, **dict(given)), read(dict(given), messages=MESSAGES)):
            assert request.chat is not None
            assert (request.chat.add_generation_prompt, request.chat.continue_final_message) == (opens, continues)


def test_the_rendered_template_is_no_part_of_an_answer_unless_asked_for() -> None:
    assert not read(messages=MESSAGES).prepend_prompt
    assert read(messages=MESSAGES, exclude_input_in_output=False).prepend_prompt
    assert read(text_input="x").prepend_prompt, "as NVIDIA's vLLM backend has it"


@pytest.mark.parametrize(
    "kwargs", [{"enable_thinking": False}, {"reasoning_effort": "high", "n": [1, {"a": None}]}, {}]
)
def test_the_templates_variables_are_a_tensor_a_sampling_key_or_a_parameter(kwargs: dict[str, Any]) -> None:
    text = json.dumps(kwargs)
    for request in (
        read(messages=MESSAGES, chat_template_kwargs=text),
        read(messages=MESSAGES, sampling_parameters=json.dumps({"chat_template_kwargs": kwargs})),
        read({"chat_template_kwargs": text}, messages=MESSAGES),
        read(
            messages=MESSAGES, chat_template_kwargs=text, sampling_parameters='{"chat_template_kwargs": {"other": 1}}'
        ),
    ):
        assert request.chat is not None and request.chat.template_kwargs == kwargs


def test_tools_go_with_the_messages() -> None:
    request = read(messages=MESSAGES, tools=b'[{"name": "f"}]')
    assert request.chat is not None
    assert request.chat.tools == '[{"name": "f"}]'


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": MESSAGES, "text_input": "x"}, "text_input and messages: send one of them, not both"),
        ({}, "text_input: missing; send the prompt as text_input, input_ids or messages"),
        (
            {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt and continue_final_message: .*not both",
        ),
        ({"text_input": "x", "chat_template_kwargs": "{}"}, "chat_template_kwargs: only with messages"),
        ({"messages": MESSAGES, "chat_template_kwargs": "[]"}, "chat_template_kwargs: expected a JSON object"),
        (
            {"messages": MESSAGES, "sampling_parameters": '{"chat_template_kwargs": 5}'},
            "chat_template_kwargs: expected a JSON object, got '5'",
        ),
        ({"text_input": "x", "image": b"aGk="}, "image: not served: this model reads text alone"),
        (
            {"text_input": "x", "embedding_request": b"{}"},
            "embedding_request and text_input: send one of them, not both",
        ),
        ({"messages": b"\xff"}, "messages: not valid UTF-8"),
    ],
    ids=[
        "two prompts",
        "none",
        "both ends",
        "variables of a text",
        "no object",
        "a number",
        "an image",
        "embeddings",
        "not text",
    ],
)
def test_what_does_not_go_together_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read(**values)


def test_an_error_code_is_wanted_only_if_asked_for() -> None:
    assert read({"return_error_code": True}, text_input="x").outputs.error_code
    for parameters, wanted in {
        '{"return_error_code": true}': True,
        '{"return_error_code": "true", "unknown": 1}': True,
        '{"return_error_code": false}': False,
        '{"return_error_code": 7}': False,
        '{"return_error_code"': False,
        "": False,
        "{}": False,
    }.items():
        assert wants_error_code(parameters) is wanted, parameters
