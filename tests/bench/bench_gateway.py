"""What the gateway costs: processor time a piece of a streamed answer, and what it adds to a first token. JSON lines.

    python -m tests.bench.bench_gateway [--python OTHER_TREES_PYTHON …]

The model is a stand-in (triton_stand_in.py), so that the gateway is what is measured; pieces a second are those of a
process that has a core to itself: 1 / (processor seconds of the gateway's process / pieces), which neighbours on the
machine change little. Several --python are measured in turns, so that two commits are compared under the same
conditions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.yardstick import print_row

ROOT = Path(__file__).parents[2]
PATHS = ("/v1/chat/completions", "/v1/completions")
_TICKS = os.sysconf("SC_CLK_TCK")
_HEAD = "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"


@contextmanager
def stand_in(num_pieces: int) -> Iterator[str]:
    """Its address."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench.triton_stand_in", "--pieces", str(num_pieces)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as it:
        assert it.stdout is not None
        try:
            yield f"127.0.0.1:{int(it.stdout.readline())}"
        finally:
            it.kill()


@dataclass(frozen=True)
class Gateway:
    pid: int
    port: int

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def resident_mib(self) -> float:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())
        assert found
        return int(found[1]) / 1024


@contextmanager
def gateway(python: str, url: str, *options: str) -> Iterator[Gateway]:
    command = [python, "-m", "paged_client.cli", "openai", "-u", url, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stdout is not None
        try:
            found = re.search(r"http://127.0.0.1:(\d+)/v1", process.stdout.readline())
            assert found, "the gateway did not start"
            yield Gateway(process.pid, int(found[1]))
        finally:
            process.kill()


def body_of(path: str, stream: bool) -> bytes:
    asked = {"model": "paged_llm", "stream": stream, "max_tokens": 4000}
    asked |= {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    body = json.dumps(asked).encode()
    return _HEAD.format(path=path, length=len(body)).encode() + body


async def answered(reader: asyncio.StreamReader, stream: bool) -> tuple[int, float]:
    """(bytes, time of the first event) of one response on a connection that stays."""
    head = await reader.readuntil(b"\r\n\r\n")
    if not stream:
        found = re.search(rb"(?i)content-length: (\d+)", head)
        assert found and b" 200 " in head, head
        return len(await reader.readexactly(int(found[1]))), time.perf_counter()
    assert b" 200 " in head, head
    first, total, tail = 0.0, 0, b""
    while not tail.endswith(b"0\r\n\r\n"):
        chunk = await reader.read(65_536)
        assert chunk, "the gateway closed the connection"
        first = first or time.perf_counter()
        total += len(chunk)
        tail = (tail + chunk)[-8:]
    return total, first


async def load(port: int, path: str, streams: int, rounds: int, stream: bool = True) -> list[float]:
    """`streams` callers at once, each `rounds` requests one after another. Returns seconds to each first event."""
    request, firsts = body_of(path, stream), []

    async def caller() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(rounds):
            started = time.perf_counter()
            writer.write(request)
            _, first = await answered(reader, stream)
            firsts.append(first - started)
        writer.close()

    await asyncio.gather(*(caller() for _ in range(streams)))
    return firsts


def measure_pieces(python: str, url: str, path: str, num_pieces: int, streams: int, rounds: int) -> float:
    """Microseconds of the gateway's processor time a piece, what a request costs besides included."""
    with gateway(python, url) as it:
        asyncio.run(load(it.port, path, streams, 1))
        before = it.processor_seconds()
        asyncio.run(load(it.port, path, streams, rounds))
        return 1e6 * (it.processor_seconds() - before) / (num_pieces * streams * rounds)


async def first_tokens(url: str, port: int, path: str, count: int) -> list[tuple[float, float]]:
    """(over gRPC alone, by the same client library; through the gateway): seconds to a first piece, in turns. Neither
    is asked before the other's answer is over.
    """
    from paged_client import AsyncPagedClient

    found = []
    async with AsyncPagedClient(url) as client:
        for _ in range(count):
            started, alone = time.perf_counter(), 0.0
            async for _ in client.stream(messages=[{"role": "user", "content": "Hi"}], max_tokens=1):
                alone = alone or time.perf_counter() - started
            found.append((alone, (await load(port, path, 1, 1))[0]))
    return found


def say(**found: object) -> None:
    print_row(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", action="append", help="of the tree whose gateway is measured; repeatable")
    parser.add_argument("--pieces", type=int, default=200)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--firsts", type=int, default=300, help="first tokens; a sixth of them are not counted")
    asked = parser.parse_args()
    pythons = asked.python or [sys.executable]
    with stand_in(asked.pieces) as url:
        for path in PATHS:
            found: dict[str, list[float]] = {python: [] for python in pythons}
            for _ in range(asked.repeats):
                for python in pythons:
                    found[python].append(measure_pieces(python, url, path, asked.pieces, asked.streams, asked.rounds))
            for python, costs in found.items():
                middle = statistics.median(costs)
                say(
                    figure="pieces",
                    path=path,
                    python=python,
                    us_a_piece=round(middle, 1),
                    pieces_a_second=round(1e6 / middle),
                    all=[round(c, 1) for c in costs],
                )
    for path in PATHS:
        for python in pythons:
            with stand_in(1) as url, gateway(python, url) as it:
                pairs = asyncio.run(first_tokens(url, it.port, path, asked.firsts))[asked.firsts // 6 :]
            alone, through = zip(*pairs, strict=True)
            added = statistics.median(behind - before for before, behind in pairs)
            ms = {"grpc_ms": statistics.median(alone), "gateway_ms": statistics.median(through), "added_ms": added}
            say(figure="first token", path=path, python=python, **{name: round(1000 * s, 2) for name, s in ms.items()})


if __name__ == "__main__":
    main()
