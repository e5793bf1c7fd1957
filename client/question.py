"""What goes out: a prompt and its options as the model's tensors (docs/reference.md: "The model's tensors")."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from paged_backend.tracing import trace_headers
from paged_client.errors import InvalidRequestError

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]

_WANTED = ("return_finish_reason", "return_num_input_tokens", "return_num_cached_tokens", "return_output_ids")
_WANTED_OF_SEVERAL = ("return_sequence_index", "return_num_output_tokens")  # which piece is whose


_trace: ContextVar[Mapping[str, str]] = ContextVar("trace", default=MappingProxyType({}))


@contextmanager
def in_trace(headers: Mapping[str, str]) -> Iterator[None]:
    """Requests that are made inside go with these W3C headers (traceparent, tracestate), as
    `opentelemetry.propagate.inject` writes them: the server's spans become children of the caller's.
    """
    token = _trace.set(trace_headers(headers))
    try:
        yield
    finally:
        _trace.reset(token)


@dataclass(frozen=True)
class Question:
    """One request: tensors by name (bool, str or list of int) and request parameters."""

    tensors: Mapping[str, bool | str | list[int]]
    parameters: Mapping[str, bool | str]
    num_sequences: int = 1  # that will answer

    @property
    def stream(self) -> bool:
        return bool(self.tensors["stream"])

    def going_on_from(self, answer_ids: Sequence[int]) -> Question:
        """The same for an answer whose first tokens another server has sent."""
        return replace(self, tensors={**self.tensors, "answer_ids": list(answer_ids)}) if answer_ids else self


HEALTH_QUESTION = Question({"stream": False}, {"health_check": True, "return_error_code": True})
"""Answered at once by the model itself: with an empty text, or with an error if it has no engine and will have none."""


def question_of(
    prompt: Prompt | None,
    sampling: Mapping[str, Any],
    *,
    stream: bool,
    messages: Messages | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool = False,
    cache_salt: str = "",
    request_id: str = "",
) -> Question:
    """Puts a request for an answer together.

    request_id: what the server's log calls it (log_requests); "": a number of the server's.

    Raises:
        InvalidRequestError: the prompt cannot be sent.
        TypeError: not exactly one of `prompt` and `messages` is given, or something in them is not JSON.
    """
    if (prompt is None) == (messages is None):
        raise TypeError("give either a prompt or messages=[...]")
    tensors: dict[str, bool | str | list[int]] = {"stream": stream, "exclude_input_in_output": True}
    tensors.update(dict.fromkeys(_WANTED, True))
    num_sequences = _count(sampling.get("n"))
    if num_sequences > 1:
        tensors.update(dict.fromkeys(_WANTED_OF_SEVERAL, True))
    if sampling.get("logprobs") is not None:
        tensors["return_logprobs"] = True
    if isinstance(prompt, str):
        tensors["text_input"] = _encodable("text_input", prompt)
    elif prompt is not None:
        tensors["input_ids"] = _checked_ids(prompt)
    else:
        tensors["messages"] = json.dumps(messages, ensure_ascii=False)
        if tools is not None:
            tensors["tools"] = json.dumps(tools, ensure_ascii=False)
        if continue_final_message:
            tensors["continue_final_message"] = True
    given = {name: value for name, value in sampling.items() if value is not None}
    if given:
        tensors["sampling_parameters"] = json.dumps(given, ensure_ascii=False)
    parameters: dict[str, bool | str] = {"return_error_code": True, **_trace.get()}
    if cache_salt:
        parameters["cache_salt"] = cache_salt
    if request_id:
        parameters["id"] = request_id
    return Question(tensors, parameters, num_sequences)


def task_question(
    task: str,
    prompt: Prompt | None = None,
    chat: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    cache_salt: str = "",
    request_id: str = "",
) -> Question:
    """A request whose answer is no text.

    chat: messages, and tools, add_generation_prompt and continue_final_message beside them. sampling: keys that change
    the prompt, or say how it is embedded.

    Raises:
        InvalidRequestError: the prompt cannot be sent.
    """
    tensors: dict[str, bool | str | list[int]] = {"task": task, "stream": False, "return_finish_reason": True}
    if task == "embed":
        tensors |= {"return_num_input_tokens": True, "return_num_cached_tokens": True, "return_output_ids": True}
    if isinstance(prompt, str):
        tensors["text_input"] = _encodable("text_input", prompt)
    elif prompt is not None:
        tensors["input_ids"] = _checked_ids(prompt)
    for name, value in (chat or {}).items():
        if value is not None:
            tensors[name] = value if isinstance(value, bool) else json.dumps(value, ensure_ascii=False)
    given = {name: value for name, value in (sampling or {}).items() if value is not None}
    if given:
        tensors["sampling_parameters"] = json.dumps(given, ensure_ascii=False)
    parameters: dict[str, bool | str] = {"return_error_code": True}
    named = {"cache_salt": cache_salt, "id": request_id}
    return Question(tensors, parameters | {name: value for name, value in named.items() if value})


def _encodable(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{name}: character {error.start} is half of a surrogate pair, which is no text"
        ) from None
    return text


def _checked_ids(prompt: Sequence[int]) -> list[int]:
    ids = [int(token_id) for token_id in prompt]
    for token_id in ids:
        if not 0 <= token_id < 2**31:
            raise InvalidRequestError(f"input_ids: {token_id} is no token id; they go from 0 to {2**31 - 1}")
    return ids


def _count(n: Any) -> int:
    """What the server will take `n` for; what is no number it refuses."""
    try:
        return max(1, int(float(n)))
    except (TypeError, ValueError, OverflowError):
        return 1
