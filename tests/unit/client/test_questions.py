"""What a client is asked, and what it makes of it: tensors, URLs, errors; and what cannot be meant."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import pytest
from typer.testing import CliRunner

from paged_client import (
    InvalidRequestError,
    PagedClient,
    PagedError,
    RequestCancelledError,
    ServerError,
    UnavailableError,
    UnknownModelError,
)
from paged_client.cli import app
from paged_client.client import parse_url
from paged_client.errors import error_of
from paged_client.question import question_of
from paged_client.retry_policy import Limits, RetryPolicy


def test_a_question_is_the_models_tensors() -> None:
    tensors = question_of(
        None,
        {"max_tokens": 3, "seed": None},
        stream=True,
        messages=[{"role": "user", "content": "é"}],
        tools=[],
        cache_salt="me",
    )
    assert json.loads(str(tensors.tensors["messages"])) == [{"role": "user", "content": "é"}]
    assert (tensors.tensors["tools"], json.loads(str(tensors.tensors["sampling_parameters"]))) == (
        "[]",
        {"max_tokens": 3},
    )
    assert tensors.parameters == {"return_error_code": True, "cache_salt": "me"}
    assert question_of((1, 2), {}, stream=False).tensors["input_ids"] == [1, 2]
    for n, count in {3: 3, "2": 2, 2.0: 2, "many": 1, None: 1, 1: 1}.items():
        several = question_of("x", {"n": n, "logprobs": 0 if n else None}, stream=True)
        assert several.num_sequences == count
        assert ("return_sequence_index" in several.tensors, "return_num_output_tokens" in several.tensors) == (
            count > 1,
            count > 1,
        )
        assert ("return_logprobs" in several.tensors) == bool(n)
    for prompt, messages in ((None, None), ("x", [{"role": "user", "content": "y"}])):
        with pytest.raises(TypeError, match="either a prompt or messages"):
            question_of(prompt, {}, stream=True, messages=messages)


@pytest.mark.parametrize(
    ("message", "status", "kind", "text"),
    [
        ("INVALID_ARGUMENT: top_p: 7 is too much", 0, InvalidRequestError, "top_p: 7 is too much"),
        (
            "INVALID_ARGUMENT: unknown key 'heat'; known: early_stopping",
            400,
            InvalidRequestError,
            "unknown key 'heat'; known: early_stopping",
        ),
        ("UNAVAILABLE: 9 requests are waiting", 200, UnavailableError, "9 requests are waiting"),
        ("CANCELLED: not finished after 3 s", 0, RequestCancelledError, "not finished after 3 s"),
        (
            "[request id: 7] INTERNAL: the answer could not be decoded",
            0,
            ServerError,
            "the answer could not be decoded",
        ),
        (
            "Request for unknown model: 'x' is not found",
            0,
            UnknownModelError,
            "Request for unknown model: 'x' is not found",
        ),
        (
            "Request for unknown model: 'x' has no available versions",
            400,
            UnknownModelError,
            "Request for unknown model: 'x' has no available versions",
        ),
        (
            "Server is stopping, scheduler for model has stopped accepting",
            0,
            UnavailableError,
            "Server is stopping, scheduler for model has stopped accepting",
        ),
        (
            "unexpected inference input 'bla' for model 'paged_llm'",
            0,
            InvalidRequestError,
            "unexpected inference input 'bla' for model 'paged_llm'",
        ),
        ("HTTP status 502", 502, ServerError, "HTTP status 502"),
        ("NOTHING: like a code", 0, ServerError, "NOTHING: like a code"),
    ],
)
def test_an_error_is_told_apart_by_its_code(message: str, status: int, kind: type[PagedError], text: str) -> None:
    error = error_of(message, http_status=status)
    assert (type(error), str(error)) == (kind, text)


def test_an_invalid_request_names_the_field() -> None:
    for message, field in {
        "top_p: 7 is too much": "top_p",
        "unknown sampling parameter 'heat'; known: n": "heat",
        "unexpected inference input 'bla' for model 'paged_llm'": "bla",
        "the prompt has 9 tokens; the longest this model takes is 8": "",
    }.items():
        assert InvalidRequestError(message).field == field


def test_a_url_says_which_service_it_means() -> None:
    assert parse_url("localhost:8001") == ("grpc", "localhost:8001")
    assert parse_url("HTTPS://host:1/") == ("https", "host:1")
    for wrong in ("", "ftp://x", "http://", "local host:1"):
        with pytest.raises(ValueError, match="is no URL of a server"):
            PagedClient(wrong)


@pytest.mark.parametrize("seconds", [math.inf, 1e12])
def test_patience_may_be_endless(seconds: float) -> None:
    """Sockets and locks cannot be told to wait for so long."""
    assert 0 < (RetryPolicy(Limits(timeout=seconds)).seconds() or 0) <= threading.TIMEOUT_MAX


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([1475 + 2**32, 5], "input_ids: 4294968771 is no token id"),
        ([5, -1], "input_ids: -1 is no token id"),
        ("a\ud800", "text_input: character 1 is half"),
    ],
)
def test_a_prompt_that_cannot_be_sent_is_refused_and_not_bent(prompt: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        question_of(prompt, {}, stream=False)
    assert caught.value.field == words.partition(":")[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--model", ""], "--model: it is empty"),
        (["serve", "./model"], "'./model' is no option: a model is named with --model"),
        (["chat", "-s", "n=2"], "'n=2': a chat has one answer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_command_cannot_mean_is_one_sentence(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert words in result.output
