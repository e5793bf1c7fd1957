"""Anthropic's Messages API, on its way out: a chat's message, whole or in pieces → content blocks and events."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

Event = dict[str, Any]

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def whole_message(model: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """answer: a chat completion."""
    (choice,) = answer["choices"]
    said = choice["message"]
    content: list[dict[str, Any]] = []
    if said.get("reasoning"):
        content.append({"type": "thinking", "thinking": said["reasoning"], "signature": ""})
    if said.get("content"):
        content.append({"type": "text", "text": said["content"]})
    for call in said.get("tool_calls") or ():
        function = call["function"]
        content.append(
            {"type": "tool_use", "id": call["id"], "name": function["name"], "input": _object(function["arguments"])}
        )
    return {
        **_head(model),
        "content": content,
        "stop_reason": _STOP_REASONS.get(choice["finish_reason"]),
        "usage": _usage(answer["usage"]),
    }


class MessageEvents:
    """One message's stream. Fed a chat's chunks in order; each block is stopped before the next begins."""

    def __init__(self, model: str) -> None:
        self._model = model
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
                yield from self._grow("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": delta["reasoning"]})
            if delta.get("content"):
                yield from self._grow("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": delta["content"]})
            for call in delta.get("tool_calls") or ():
                yield from self._call(call)

    def finish(self) -> Iterator[Event]:
        yield from self._stop()
        reason = {"stop_reason": _STOP_REASONS.get(self._reason or ""), "stop_sequence": None}
        yield {"type": "message_delta", "delta": reason, "usage": _usage(self._usage)}
        yield {"type": "message_stop"}

    def _call(self, call: Mapping[str, Any]) -> Iterator[Event]:
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


def error_body(message: str, status: int) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


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
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage["completion_tokens"],
    }


def _object(arguments: str) -> Any:
    """A call that was cut off has arguments that are no JSON: then there are none."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
