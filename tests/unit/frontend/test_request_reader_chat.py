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
    tensors = {name: np.array([value], np.bool_ if isinstance(value, bool) else np.object_) for name, value in values.items()}
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


def test_tools_go_with_the_messages() -> None:
    request = read(messages=MESSAGES, tools=b'[{"name": "f"}]')
    assert request.chat is not None
    assert request.chat.tools == '[{"name": "f"}]'


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": MESSAGES, "text_input": "x"}, "text_input and messages: send one of them, not both"),
        ({}, "text_input: missing; send the prompt as text_input, input_ids or messages"),
        ({"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt and continue_final_message: .*not both"),
        ({"messages": b"\xff"}, "messages: not valid UTF-8"),
    ],
    ids=["two prompts", "none", "both ends", "not text"],
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
