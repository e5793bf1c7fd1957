"""Anthropic's Messages API, on its way out: a chat's message, whole or in pieces → content blocks and events."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paged_client.openai.formats.markers import Markers

Event = dict[str, Any]

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass(frozen=True)
class Limits:
    """What ends an answer, as the body has it."""

    max_tokens: int
    stop_sequences: Sequence[str] = ()


class _StopSequences:
    """Takes the stop sequence that ended an answer out of its text, where the server leaves it so that it can be
    told.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        self._markers = Markers(sequences)
        self._pending = ""  # it may be the beginning of one
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """What is certainly before it."""
        return self._before(self._markers.split(self._pending + text))

    def finish(self) -> str:
        """The same, where nothing more comes."""
        return self._before(self._markers.split_end(self._pending))

    def _before(self, split: tuple[str, str, str]) -> str:
        if self.found is not None:
            return ""
        plain, marker, self._pending = split
        self.found = marker or None
        return plain


def whole_message(model: str, answer: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """answer: a chat completion."""
    (choice,) = answer["choices"]
    said = choice["message"]
    content: list[dict[str, Any]] = []
    ending = _StopSequences(limits.stop_sequences)

    def without_stop(text: str) -> str:
        return ending.feed(text) + ending.finish()

    if thought := without_stop(said.get("reasoning") or ""):
        content.append({"type": "thinking", "thinking": thought, "signature": ""})
    if text := without_stop(said.get("content") or ""):
        content.append({"type": "text", "text": text})
    for call in said.get("tool_calls") or ():
        function = call["function"]
        content.append(
            {"type": "tool_use", "id": call["id"], "name": function["name"], "input": _object(function["arguments"])}
        )
    return {
        **_head(model),
        "content": content,
        **_stop(choice["finish_reason"], ending.found, answer["usage"], limits),
        "usage": _usage(answer["usage"]),
    }


class MessageEvents:
    """One message's stream. Fed a chat's chunks in order; each block is stopped before the next begins."""

    def __init__(self, model: str, limits: Limits) -> None:
        self._model = model
        self._limits = limits
        self._ending = _StopSequences(limits.stop_sequences)
        self._heard = ""  # the kind of block that text came for last
        self._begun = False
        self._index = -1  # of the last block
        self._kind = ""  # of the block that grows
        self._usage: Mapping[str, Any] = {}
        self._reason: str | None = None

    def take(self, chunk: Mapping[str, Any]) -> Iterator[Event]:
        self._usage = chunk.get("usage") or self._usage
        if not self._begun:
            self._begun = True
            yield {
                "type": "message_start",
                "message": {**_head(self._model), "content": [], "stop_reason": None, "usage": _usage(self._usage)},
            }
        for choice in chunk["choices"]:
            self._reason = choice["finish_reason"] or self._reason
            delta = choice["delta"]
            if delta.get("reasoning"):
                yield from self._hear("thinking", delta["reasoning"])
            if delta.get("content"):
                yield from self._hear("text", delta["content"])
            for call in delta.get("tool_calls") or ():
                yield from self._call(call)

    def finish(self) -> Iterator[Event]:
        yield from self._say(self._ending.finish())
        yield from self._stop()
        yield {
            "type": "message_delta",
            "delta": _stop(self._reason, self._ending.found, self._usage, self._limits),
            "usage": _usage(self._usage),
        }
        yield {"type": "message_stop"}

    def _hear(self, kind: str, text: str) -> Iterator[Event]:
        if kind != self._heard:
            yield from self._say(self._ending.finish())
            self._heard = kind
        yield from self._say(self._ending.feed(text))

    def _say(self, text: str) -> Iterator[Event]:
        """A piece of the kind that was heard."""
        if not text:
            return
        if self._heard == "thinking":
            yield from self._grow("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": text})
        else:
            yield from self._grow("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": text})

    def _call(self, call: Mapping[str, Any]) -> Iterator[Event]:
        yield from self._say(self._ending.finish())
        function = call.get("function") or {}
        if function.get("name"):
            yield from self._stop()
            yield from self._grow(
                "tool_use", {"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}}
            )
        if function.get("arguments"):
            yield self._delta({"type": "input_json_delta", "partial_json": function["arguments"]})

    def _grow(self, kind: str, block: dict[str, Any]) -> Iterator[Event]:
        if self._kind != kind:
            yield from self._stop()
            self._kind, self._index = kind, self._index + 1
            yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _stop(self) -> Iterator[Event]:
        if self._kind:
            self._kind = ""
            yield {"type": "content_block_stop", "index": self._index}


def error_body(message: str, status: int, request_id: str = "") -> dict[str, Any]:
    """request_id: "": not told."""
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    named = {"request_id": request_id} if request_id else {}
    return {"type": "error", "error": {"type": kind, "message": message}, **named}


def _stop(
    finish_reason: str | None, stop_sequence: str | None, usage: Mapping[str, Any], limits: Limits
) -> dict[str, Any]:
    reason = _STOP_REASONS.get(finish_reason or "")
    if reason == "max_tokens" and usage and usage["completion_tokens"] < limits.max_tokens:
        reason = "model_context_window_exceeded"  # the conversation wants to be shortened
    if stop_sequence is None or reason != "end_turn":
        return {"stop_reason": reason, "stop_sequence": None}
    return {"stop_reason": "stop_sequence", "stop_sequence": stop_sequence}


def _head(model: str) -> dict[str, Any]:
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "stop_sequence": None,
    }


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """What was found in the cache is counted apart, as Anthropic does."""
    if not usage:
        return {"input_tokens": 0, "output_tokens": 0}
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    details = usage.get("completion_tokens_details")
    thought = {"output_tokens_details": {"thinking_tokens": details["reasoning_tokens"]}} if details else {}
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage["completion_tokens"],
        **thought,
    }


def _object(arguments: str) -> Any:
    """A call that was cut off has arguments that are no JSON: then there are none. Half a character is replaced."""
    try:
        found = json.loads(arguments)
        found = json.loads(json.dumps(found, ensure_ascii=False, allow_nan=False).encode(errors="replace"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
