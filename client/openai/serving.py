"""The gateway as a process: its socket, uvicorn, and what is watched meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import uvicorn

from paged_backend.tracing import Tracing
from paged_client.cluster.gateway import join
from paged_client.errors import UnreachableError
from paged_client.openai.connections import BACKLOG, ConnectionLimits, Connections, say_failed_accepts
from paged_client.openai.gateway import ENDPOINTS, Offer, make_app
from paged_client.openai.metrics import GatewayMetrics
from paged_client.openai.models import Models
from paged_client.openai.pace import Pace
from paged_client.openai.server_metrics import ServerMetrics

_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Listening:
    host: str
    listener: socket.socket
    drain_seconds: int
    access_log: bool
    wait_seconds: float  # for the model

    @property
    def base_url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.listener.getsockname()[1]}/v1"


def listen(host: str, port: int) -> socket.socket:
    """
    Raises:
        OSError: with a `strerror` that names the reason only.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family)
        # asyncio sets it only where a socket names its protocol: a first piece waited 40 ms
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        if error.errno is not None and error.errno > 0:  # without what `create_server` adds to it
            raise OSError(error.errno, os.strerror(error.errno)) from None
        raise


def run(serving: Coroutine[Any, Any, None]) -> None:
    """Until it returns, on uvloop where that is installed: a third of the gateway's time is the loop's."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(serving)
    else:
        uvloop.run(serving)


async def serve(
    models: Models,
    offer: Offer,
    limits: ConnectionLimits,
    listening: Listening,
    server_url: str,
    tracing: Tracing | None = None,
) -> None:
    """Until SIGINT or SIGTERM.

    Raises:
        TimeoutError: the server is not ready.
    """
    metrics = GatewayMetrics(ENDPOINTS)
    if offer.server_metrics:
        metrics.server = ServerMetrics(offer.server_metrics, models.server_names)
    connections = Connections(limits, metrics)
    app = make_app(models, offer, metrics, tracing)
    app.state.pace = pace = Pace()
    join(app, metrics.registry, lambda: models.clusters)
    config = uvicorn.Config(
        app,
        http=connections.protocol(),
        ws="none",
        log_level="info" if listening.access_log else "warning",
        access_log=listening.access_log,
        timeout_graceful_shutdown=listening.drain_seconds,
        backlog=BACKLOG,
        lifespan="off",
        server_header=False,
    )
    async with models:
        await _wait_until_ready(models, listening.wait_seconds)
        names = ", ".join(model.name for model in models.all)
        print(f"paged: OpenAI's API on {listening.base_url}, model {names} from {server_url}", flush=True)
        print("Ctrl-C stops it.", flush=True)
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # uvicorn raises it once more when it has drained
        say_failed_accepts(asyncio.get_running_loop())
        beside = [asyncio.ensure_future(connections.sweep()), asyncio.ensure_future(pace.watch())]
        try:
            await uvicorn.Server(config).serve([listening.listener])
        finally:
            for task in beside:
                task.cancel()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)


async def _wait_until_ready(models: Models, seconds: float) -> None:
    end = time.monotonic() + seconds
    said = False
    while not await _any_is_ready(models):
        if time.monotonic() > end:
            raise TimeoutError
        if not said:
            print("paged: waiting for the server to be there and to have loaded the model", file=sys.stderr, flush=True)
            said = True
        await asyncio.sleep(_POLL_SECONDS)


async def _any_is_ready(models: Models) -> bool:
    try:
        await models.look()
    except UnreachableError:
        return False
    return await models.takes_requests()
