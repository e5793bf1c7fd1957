"""OpenAI's Responses API, on its way out: a chat's message, whole or in pieces → output items and events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from paged_client.openai.kept_items import item_id
from paged_client.openai.plain_text import PlainText
from paged_client.openai.response_items import SEALED_THOUGHTS, ResponsesBody, sealed
from paged_client.openai.response_tools import ResponseTools

Event = dict[str, Any]


class ResponseBuilder:
    """One response. Fed a chat's deltas in order; each item is done before the next begins."""

    def __init__(self, body: ResponsesBody, tools: ResponseTools, *, stored: bool) -> None:
        self._tools = tools
        self._seals = SEALED_THOUGHTS in (body.include or ())
        # callers may choose the same request_id: nobody gets another's conversation by it
        self.id = "resp_" + "-".join(filter(None, [body.request_id, secrets.token_hex(16)]))
        self._head = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
            "store": stored,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "background": False,
        }
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the last item, as long as it grows
        self._text = PlainText()  # of an open call of a tool that takes plain text
        self._number = 0

    # ---- the whole

    def response(self, status: str, *, usage: Mapping[str, Any] | None = None, error: Any = None) -> dict[str, Any]:
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        output = [dict(item) for item in self._output]
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": details,
            "output": output,
            "usage": _usage(usage),
        }

    # ---- events

    def begin(self) -> Iterator[Event]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.response("in_progress"))

    def take(self, delta: Mapping[str, Any]) -> Iterator[Event]:
        """delta: of a chat's chunk; or a whole message."""
        if delta.get("reasoning"):
            yield from self._grow("reasoning", delta["reasoning"])
        if delta.get("content"):
            yield from self._grow("message", delta["content"])
        for call in delta.get("tool_calls") or ():
            yield from self._call(call)

    def finish(self, finish_reason: str | None, usage: Mapping[str, Any] | None) -> Iterator[Event]:
        status = "incomplete" if finish_reason == "length" else "completed"
        yield from self._close(status)
        yield self._event(f"response.{status}", response=self.response(status, usage=usage))

    def fail(self, error: Mapping[str, Any]) -> Iterator[Event]:
        """The answer broke off."""
        said = {"code": "server_error", "message": error.get("message")}  # OpenAI has no other code that fits
        yield self._event("response.failed", response=self.response("failed", error=said))

    def _event(self, kind: str, **members: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **members}

    @property
    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"output_index": len(self._output) - 1, "item_id": self._open["id"]}

    def _begin_item(self, item: dict[str, Any]) -> Iterator[Event]:
        yield from self._close("completed")
        self._output.append(item)
        self._open = item
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item={**item})

    def _grow(self, kind: str, text: str) -> Iterator[Event]:
        if self._open is None or self._open["type"] != kind:
            yield from self._begin_item(self._new_item(kind))
            assert self._open is not None
            part = _part(kind)
            self._open["content"] = [part]
            yield self._event("response.content_part.added", **self._place, content_index=0, part={**part})
        self._open["content"][0]["text"] += text
        if kind == "message":
            yield self._event("response.output_text.delta", **self._place, content_index=0, delta=text, logprobs=[])
        else:
            yield self._event("response.reasoning_text.delta", **self._place, content_index=0, delta=text)

    def _call(self, call: Mapping[str, Any]) -> Iterator[Event]:
        function = call.get("function") or {}
        if function.get("name"):
            yield from self._begin_item(self._new_call(call.get("id"), function["name"]))
        if function.get("arguments"):
            assert self._open is not None
            if self._open["type"] == "custom_tool_call":
                yield from self._grow_text(self._text.feed(function["arguments"]))
                return
            self._open["arguments"] += function["arguments"]
            yield self._event("response.function_call_arguments.delta", **self._place, delta=function["arguments"])

    def _grow_text(self, text: str) -> Iterator[Event]:
        assert self._open is not None
        if text:
            self._open["input"] += text
            yield self._event("response.custom_tool_call_input.delta", **self._place, delta=text)

    def _new_call(self, call_id: Any, name: str) -> dict[str, Any]:
        named = {"call_id": call_id, **self._tools.names(name), "status": "in_progress"}
        if self._tools.is_text(name):
            self._text = PlainText()
            return {**self._head_of("custom_tool_call"), **named, "input": ""}
        return {**self._head_of("function_call"), **named, "arguments": ""}

    def _new_item(self, kind: str) -> dict[str, Any]:
        more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        return {**self._head_of(kind), **more, "status": "in_progress", "content": []}

    def _head_of(self, kind: str) -> dict[str, Any]:
        return {"id": item_id(kind, self.id, str(len(self._output))), "type": kind}

    def _close(self, status: str) -> Iterator[Event]:
        item = self._open
        if item is None:
            return
        place = self._place
        if item["type"] == "function_call":
            yield self._event(
                "response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]
            )
        elif item["type"] == "custom_tool_call":
            yield from self._grow_text(self._text.finish())
            yield self._event("response.custom_tool_call_input.done", **place, input=item["input"])
        else:
            (part,) = item["content"]
            if item["type"] == "message":
                yield self._event("response.output_text.done", **place, content_index=0, text=part["text"], logprobs=[])
            else:
                yield self._event("response.reasoning_text.done", **place, content_index=0, text=part["text"])
            yield self._event("response.content_part.done", **place, content_index=0, part={**part})
        if item["type"] == "reasoning" and self._seals:
            item["encrypted_content"] = sealed(item["content"][0]["text"])
        item["status"] = status
        yield self._event("response.output_item.done", output_index=place["output_index"], item={**item})
        self._open = None


def _part(kind: str) -> dict[str, Any]:
    if kind == "message":
        return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": ""}


def _usage(usage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": (usage.get("completion_tokens_details") or {}).get("reasoning_tokens", 0)
        },
        "total_tokens": usage["total_tokens"],
    }
