"""A server that vanishes without closing its connection is noticed; one that is silent and there is not given up. A
real gRPC server, behind a proxy.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc.aio")

import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from paged_client import AsyncPagedClient, UnreachableError

KEEPALIVE = 0.4  # seconds


class Silent(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Ready, and says nothing to a request for a while."""

    def __init__(self, silence: float) -> None:
        self._silence = silence

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802 - the service names it
        return service_pb2.ModelReadyResponse(ready=True)

    async def ModelStreamInfer(self, requests: Any, context: Any) -> Any:  # noqa: N802
        async for _ in requests:
            await asyncio.sleep(self._silence)
            response = service_pb2.ModelStreamInferResponse()
            response.infer_response.outputs.add(name="text_output", datatype="BYTES", shape=[1])
            response.infer_response.raw_output_contents.append(b"\x02\0\0\0ok")
            response.infer_response.parameters["triton_final_response"].bool_param = True
            yield response


class Proxy:
    """Between client and server; `vanish`: nothing passes any more, and nobody is told."""

    def __init__(self) -> None:
        self.there = asyncio.Event()
        self.there.set()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, port: int) -> int:
        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", port)
            self._tasks += [
                asyncio.ensure_future(self._pass_on(reader, other_writer)),
                asyncio.ensure_future(self._pass_on(other_reader, writer)),
            ]

        self._server = await asyncio.start_server(take, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while read := await reader.read(65536):
            await self.there.wait()
            writer.write(read)

    def vanish(self) -> None:
        self.there.clear()

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def server(silence: float) -> AsyncIterator[tuple[AsyncPagedClient, Proxy]]:
    running, proxy = grpc.aio.server(), Proxy()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Silent(silence), running)
    port = running.add_insecure_port("127.0.0.1:0")
    await running.start()
    client = AsyncPagedClient(f"127.0.0.1:{await proxy.open(port)}", retries=0, keepalive_seconds=KEEPALIVE)
    try:
        yield client, proxy
    finally:
        await client.close()
        await proxy.close()
        await running.stop(None)


def test_a_server_that_vanishes_is_gone_after_twice_the_keepalive() -> None:
    async def ask() -> None:
        async with server(silence=60) as (client, proxy):
            assert await client.is_ready()
            asked = asyncio.ensure_future(client.generate("x"))
            await asyncio.sleep(0.2)
            proxy.vanish()
            started = time.monotonic()
            with pytest.raises(UnreachableError):
                await asyncio.wait_for(asked, 20)
            assert time.monotonic() - started < 2 * KEEPALIVE + 3, "a loaded machine's share"

    asyncio.run(ask())


def test_a_server_that_thinks_for_long_is_not_given_up_while_it_is_asked_now_and_then() -> None:
    """With the limits on pings that a server of gRPC's has by default, which are Triton Server's."""

    async def ask() -> None:
        async with server(silence=9 * KEEPALIVE) as (client, _):
            asked = asyncio.ensure_future(client.generate("x"))
            while not asked.done():  # as the health check does it
                assert await client.is_ready()
                await asyncio.sleep(KEEPALIVE / 2)
            assert (await asked).text == "ok"

    asyncio.run(ask())


@pytest.mark.long
@pytest.mark.parametrize("keepalive", [None, KEEPALIVE], ids=["of one server", "of several"])
def test_a_server_that_was_away_is_seen_soon_after_it_is_back(keepalive: float | None) -> None:
    """By default the pauses between attempts to connect grow to two minutes."""

    async def ask() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        client = AsyncPagedClient(f"127.0.0.1:{port}", retries=0, keepalive_seconds=keepalive)
        away_until = time.monotonic() + 11
        while time.monotonic() < away_until:
            assert not await client.is_ready()
            await asyncio.sleep(0.1)
        running = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Silent(0), running)
        assert running.add_insecure_port(f"127.0.0.1:{port}") == port
        await running.start()
        back = time.monotonic()
        while not await client.is_ready():
            await asyncio.sleep(0.05)
        assert time.monotonic() - back < 2.2, "a second and a half, at most, with its jitter"
        await client.close()
        await running.stop(None)

    asyncio.run(ask())
