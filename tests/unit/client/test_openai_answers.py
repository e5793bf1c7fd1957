"""What our server's answers become in OpenAI's words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("fastapi")

from paged_client.answers import Answer, Delta, TokenLogprob, Usage
from paged_client.openai.responses import ChatReply, CompletionReply
from tests.unit.client.asked import chat, completion

ENTRY = (
    TokenLogprob(5, "Aé", -1.5),
    TokenLogprob(6, "b", -0.5),
    TokenLogprob(7, "\ufffd", float("-inf"), 9, b"\xf0\x9f"),
)


def answer(*texts: str) -> Answer:
    first, *others = (Answer(text, (1,), "stop", Usage(4, 2, len(texts)), (ENTRY, ENTRY)) for text in texts)
    return Answer(first.text, first.token_ids, "length", first.usage, first.logprobs, tuple(others))


def test_choices_count_through_the_prompts() -> None:
    asked = replace(completion(prompt=["x", "y"], n=2, echo=True), echoed=("x", "y"))
    whole = CompletionReply("m", asked).whole([answer("a", "b"), answer("c", "d")])
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in whole["choices"]] == [
        (0, "xa", "length"),
        (1, "xb", "stop"),
        (2, "yc", "length"),
        (3, "yd", "stop"),
    ]
    assert whole["usage"] == {
        "prompt_tokens": 8,
        "completion_tokens": 4,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert (whole["object"], whole["model"], whole["choices"][0]["logprobs"]) == ("text_completion", "m", None)


def test_completions_say_logprobs_in_parallel_lists() -> None:
    asked = completion(logprobs=2)
    (choice,) = CompletionReply("m", asked).whole([answer("a")])["choices"]
    assert choice["logprobs"] == {
        "tokens": ["Aé", "Aé"],
        "token_logprobs": [-1.5, -1.5],
        "top_logprobs": [{"Aé": -1.5, "b": -0.5, "bytes:\\xf0\\x9f": -9999.0}] * 2,
        "text_offset": [0, 2],
    }
    reply = CompletionReply("m", asked)
    pieces = [chunk for _ in range(2) for chunk in reply.chunks(0, Delta("", (5,), None, Usage(), 0, (ENTRY,)))]
    assert [piece["choices"][0]["logprobs"]["text_offset"] for piece in pieces] == [[0], [2]]
    assert (
        CompletionReply("m", completion(logprobs=0)).whole([answer("a")])["choices"][0]["logprobs"]["top_logprobs"]
        is None
    )


def test_a_character_counts_where_its_last_byte_is() -> None:
    spelled = [b" true", b" true", b"\xf0\x9f", b"\x98", b"\x80!", b"x"]
    entries = tuple(
        (TokenLogprob(at, part.decode(errors="replace"), -1.0, 1, None if part.isascii() else part),)
        for at, part in enumerate(spelled)
    )
    (choice,) = CompletionReply("m", completion(logprobs=0)).whole(
        [Answer(" true true😀!x", tuple(range(6)), "stop", Usage(), entries)]
    )["choices"]
    assert choice["logprobs"]["text_offset"] == [0, 5, 10, 10, 10, 12]
    assert choice["logprobs"]["tokens"] == [
        " true",
        " true",
        "bytes:\\xf0\\x9f",
        "bytes:\\x98",
        "bytes:\\x80\\x21",
        "x",
    ]


def test_chat_says_logprobs_token_by_token_with_their_bytes() -> None:
    (choice,) = ChatReply("m", chat(logprobs=True, top_logprobs=1)).whole([answer("a")])["choices"]
    assert choice["message"] == {"role": "assistant", "content": "a", "refusal": None}
    token = choice["logprobs"]["content"][0]
    assert (token["token"], token["logprob"], bytes(token["bytes"])) == ("Aé", -1.5, "Aé".encode())
    assert token["top_logprobs"] == [{"token": "b", "logprob": -0.5, "bytes": [98]}]
    (choice,) = ChatReply("m", chat(logprobs=True, top_logprobs=3)).whole([answer("a")])["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"][2] == {
        "token": "\\xf0\\x9f",
        "logprob": -9999.0,
        "bytes": [0xF0, 0x9F],
    }
    json.dumps(choice, allow_nan=False)


def test_a_chats_stream_opens_each_choice_with_its_role_and_is_silent_where_nothing_is_said() -> None:
    reply = ChatReply("m", chat(n=2))
    pieces = [
        Delta("a", (1,), None, Usage(), 1),
        Delta("", (2,), None, Usage(), 1),
        Delta("b", (3,), None, Usage(), 0),
        Delta("", (), "stop", Usage(), 1),
    ]
    said = [
        (choice["index"], choice["delta"], choice["finish_reason"])
        for piece in pieces
        for chunk in reply.chunks(0, piece)
        for choice in chunk["choices"]
    ]
    opening = {"role": "assistant", "content": ""}
    assert said == [
        (1, opening, None),
        (1, {"content": "a"}, None),
        (0, opening, None),
        (0, {"content": "b"}, None),
        (1, {}, "stop"),
    ]
