"""The gateway's memory over many requests of every kind. JSON lines: one a tenth of the way.

    python -m tests.bench.bench_gateway_memory [--requests 100000] [--stored 1000]

A real gateway process over HTTP; the model is a stand-in (triton_stand_in.py). Of every `len(KINDS)` requests one of
each kind is asked: chats and completions whole and streamed, callers who leave a stream after its first event, bodies
that are refused by the gateway and by the server, Responses that are stored, gone on from and streamed, Anthropic's
messages, tokens. Every status is checked. Memory is flat if the second half of the run
adds nothing that grows with requests: the store of answers is bounded and full after its first thousand.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil

from tests.bench.bench_gateway import gateway, say, stand_in
from tests.bench.triton_stand_in import REFUSED, SLOW

_LONG = "Once there was a lamp. " * 40
_SAID = [{"role": "user", "content": _LONG}]
_TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


@dataclass(frozen=True)
class Kind:
    path: str
    body: Any  # bytes go as they are
    status: int = 200
    leaves: bool = False  # after the first event


def _chat(**more: Any) -> dict[str, Any]:
    return {"model": "paged_llm", "messages": _SAID, "max_tokens": 40, **more}


def _text(**more: Any) -> dict[str, Any]:
    return {"model": "paged_llm", "prompt": _LONG, "max_tokens": 40, **more}


def _response(**more: Any) -> dict[str, Any]:
    return {"model": "paged_llm", "input": _LONG, **more}


KINDS = (
    Kind("/v1/chat/completions", _chat()),
    Kind("/v1/chat/completions", _chat(stream=True, stream_options={"include_usage": True})),
    Kind("/v1/chat/completions", _chat(stream=True, tools=[_TOOL])),
    Kind("/v1/chat/completions", _chat(stream=True, messages=[{"role": "user", "content": SLOW}]), leaves=True),
    Kind("/v1/chat/completions", _chat(temperature="hot"), 400),
    Kind("/v1/chat/completions", _chat(model="another"), 404),
    Kind("/v1/chat/completions", b'{"model": "paged_llm", "messages": [', 400),
    Kind("/v1/completions", _text()),
    Kind("/v1/completions", _text(stream=True)),
    Kind("/v1/completions", _text(stream=True, prompt=SLOW), leaves=True),
    Kind("/v1/completions", _text(prompt=REFUSED), 400),
    Kind("/v1/completions", _text(prompt=REFUSED, stream=True), 400),
    Kind("/v1/responses", _response()),
    Kind("/v1/responses", _response(previous_response_id="…")),
    Kind("/v1/responses", _response(stream=True)),
    Kind("/v1/responses", _response(previous_response_id="resp_none"), 404),
    Kind("/v1/messages", _chat()),
    Kind("/v1/messages", _chat(stream=True)),
    Kind("/tokenize", {"model": "paged_llm", "prompt": _LONG}),
    Kind("/v1/nowhere", {}, 404),
)


class Caller:
    """Asks one request after another, on a connection for as long as it stays."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._last_response = ""  # a stored answer's id
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, kind: Kind) -> None:
        body = kind.body
        if isinstance(body, dict) and body.get("previous_response_id") == "…":
            body = {**body, "previous_response_id": self._last_response or None}
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {kind.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        answer = await reader.readuntil(b"\r\n\r\n")
        status = int(answer.split()[1])
        assert status == kind.status or (body is not kind.body and status in (200, 404)), (kind, answer)
        if kind.leaves:
            assert b"data: " in await reader.readuntil(b"\n\n")
            self.leave()
            return
        said = await _rest(reader, answer)
        if kind.path == "/v1/responses" and kind.status == 200 and not body.get("stream"):
            self._last_response = json.loads(said)["id"] if status == 200 else ""

    def leave(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def _rest(reader: asyncio.StreamReader, head: bytes) -> bytes:
    found = re.search(rb"(?i)content-length: (\d+)", head)
    if found:
        return await reader.readexactly(int(found[1]))
    said = b""
    while (size := int(await reader.readuntil(b"\r\n"), 16)) > 0:
        said += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return said


async def load(port: int, first: int, count: int, callers: int) -> None:
    """Requests `first` up to `first + count`, each kind in its place."""
    numbers = iter(range(first, first + count))

    async def call() -> None:
        caller = Caller(port)
        for number in numbers:
            await caller.ask(KINDS[number % len(KINDS)])
        caller.leave()

    await asyncio.gather(*(call() for _ in range(callers)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--callers", type=int, default=13, help="at once")
    parser.add_argument("--stored", type=int, default=1000, help="the gateway's --max-stored-responses")
    asked = parser.parse_args()
    tenth = asked.requests // 10
    with stand_in(4) as url, gateway(sys.executable, url, "--max-stored-responses", str(asked.stored)) as it:
        process = psutil.Process(it.pid)
        for part in range(10):
            started = time.monotonic()
            asyncio.run(load(it.port, part * tenth, tenth, asked.callers))
            say(
                figure="memory",
                requests=(part + 1) * tenth,
                resident_mib=round(it.resident_mib(), 1),
                descriptors=process.num_fds(),
                threads=process.num_threads(),
                requests_a_second=round(tenth / (time.monotonic() - started)),
            )


if __name__ == "__main__":
    main()
