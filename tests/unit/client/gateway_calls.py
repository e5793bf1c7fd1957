"""Calls of the gateway's application as an ASGI server would make them, over a client whose transport is a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from paged_client import (
    AsyncPagedClient,
)
from paged_client.openai.answer_forms import FormOptions
from paged_client.openai.gateway import Offer, make_app
from paged_client.openai.limits import BodyLimits
from paged_client.openai.metrics import GatewayMetrics
from paged_client.question import Question

Outputs = dict[str, list[Any]]


HI = [{"role": "user", "content": "Hi"}]


DESCRIBED = {"max_model_len": 512, "adapters": ["french"], "chat_templates": {"default": "…"}, "special_words": ["<s>"]}


def described(**facts: Any) -> Outputs:
    return {"text_output": [json.dumps({**DESCRIBED, **facts})], "output_ids": [], "finish_reason": ["stop"]}


def piece(text: str, finish: str = "None") -> Outputs:
    return {
        "text_output": [text],
        "output_ids": [7],
        "finish_reason": [finish],
        "num_input_tokens": [5],
        "num_cached_tokens": [4],
    }


class Transport:
    """Every call brings the same pieces and exceptions, then nothing more for ever."""

    def __init__(self, *events: Any) -> None:
        self.events = events
        self.asked: list[Question] = []
        self.num_left = 0
        self.ready = True
        self.description: Any = described()

    def ask(self, question: Question) -> Call:
        if question.tensors.get("task") == "describe":
            return Call(self, [self.description])
        self.asked.append(question)
        return Call(self)

    async def is_ready(self) -> bool:
        return self.ready

    async def close(self) -> None:
        pass

    @property
    def sampling(self) -> dict[str, Any]:
        sampling: dict[str, Any] = json.loads(str(self.asked[-1].tensors["sampling_parameters"]))
        return sampling


class Call:
    def __init__(self, transport: Transport, events: Sequence[Any] | None = None) -> None:
        self._transport = transport
        self._events = list(transport.events if events is None else events)

    async def next(self, seconds: float | None) -> tuple[Outputs, bool]:
        await asyncio.sleep(0)
        if not self._events:
            await asyncio.sleep(60)
        event = self._events.pop(0)
        if isinstance(event, BaseException):
            raise event
        return event, event["finish_reason"] != ["None"]

    def cancel(self) -> None:
        self._transport.num_left += 1


@dataclass
class Reply:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        return [
            event if event == "[DONE]" else json.loads(event)
            for event in self.text.replace("data: ", "").strip().split("\n\n")
        ]


def call(transport: Transport, path: str, body: Any = None, **options: Any) -> Reply:
    """One request, as `answering` makes it."""
    return asyncio.run(answering(transport, path, body, **options))


async def answering(
    transport: Transport,
    path: str,
    body: Any = None,
    *,
    key: str = "",
    bodies: BodyLimits | None = None,
    headers: dict[str, str] | None = None,
    leave: Callable[[Reply], bool] | None = None,
    origins: tuple[str, ...] = (),
    method: str = "",
    metrics: GatewayMetrics | None = None,
    strict: bool = False,
    forms: FormOptions | None = None,
) -> Reply:
    """One request's answer. leave: asked over and over; True closes the connection."""
    client = AsyncPagedClient("nowhere:1", retries=0)
    client._transport = transport
    app = make_app(
        client,
        Offer(("m", "alias"), key, bodies or BodyLimits(), origins, strict=strict, forms=forms or FormOptions()),
        metrics,
    )
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    given = {"content-type": "application/json", "content-length": str(len(raw)), **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method or ("GET" if body is None else "POST"),
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "root_path": "",
    }
    reply = Reply()

    waiting = [raw[start : start + 1000] for start in range(0, max(1, len(raw)), 1000)]

    async def receive() -> dict[str, Any]:
        if waiting:
            chunk = waiting.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(waiting)}
        while leave is None or not leave(reply):
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            reply.text += message["body"].decode()

    await asyncio.wait_for(app(scope, receive, send), 120)  # a machine may have much else to do
    return reply


def complete(transport: Transport, *, strict: bool = False, **keys: Any) -> Reply:
    return call(transport, "/v1/completions", {"model": "m", "prompt": "x", **keys}, strict=strict)


def chat(transport: Transport, *, strict: bool = False, **keys: Any) -> Reply:
    return call(transport, "/v1/chat/completions", {"model": "m", "messages": HI, **keys}, strict=strict)


WHOLE = Transport(piece("ab", "stop"))
