"""`paged openai`."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from paged_backend.extras import install_command
from paged_client.asking import ModelName, Url
from paged_client.async_client import AsyncPagedClient
from paged_client.client import DEFAULT_MODEL, DEFAULT_URL

if TYPE_CHECKING:
    from fastapi import FastAPI

_POLL_SECONDS = 0.25
_NO_RETRIES = 0  # the caller's library does that


@dataclass(frozen=True)
class _Listening:
    host: str
    port: int
    drain_seconds: int
    access_log: bool


def serve_openai(
    url: Url = DEFAULT_URL,
    model_name: ModelName = DEFAULT_MODEL,
    served_name: Annotated[
        list[str] | None, typer.Option("--served-name", metavar="NAME", help="What callers call the model, instead of --model-name; repeatable.")
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0: every network, and then set an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", metavar="PORT", min=0, max=65535, help="Where to listen; 0: a free one.")] = 9000,
    api_key: Annotated[
        str, typer.Option(metavar="KEY", envvar="PAGED_API_KEY", show_default=False, help="Callers must send it; in the environment it is not in `ps`.")
    ] = "",
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.001, help="How long an answer may take; then it is cancelled.")] = 600.0,
    wait_seconds: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="How long to wait at start for the server to have loaded the model.")] = 600.0,
    max_body_bytes: Annotated[int, typer.Option(metavar="BYTES", min=1, help="Longest request body.")] = 16 * 2**20,
    allow_origin: Annotated[
        list[str] | None, typer.Option("--allow-origin", metavar="ORIGIN", help="Web pages that may ask, such as https://example.org; repeatable.")
    ] = None,
    drain_seconds: Annotated[int, typer.Option(metavar="SECONDS", min=0, help="How long a stop waits for answers in flight.")] = 30,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line for every request: address, path and status, never text.")] = False,
) -> None:
    """Speak OpenAI's API for a running server: completions, chat completions, models.

    Any client of OpenAI's works with the base URL that is printed. vLLM's sampling keys (top_k, min_p, ignore_eos, guided_json …) are taken too.
    Tools go to the model's chat template; calls that the model makes are returned as text, not parsed. /health says whether the model is ready.

    Needs the packages of the extra `openai`.
    """
    try:
        from paged_client.openai.auth import Rules
        from paged_client.openai.gateway import Offer, make_app
    except ImportError as error:
        raise _failure(f"{error.name} is missing: {install_command('openai')}") from None
    offer = Offer(tuple(served_name or [model_name]), Rules(api_key.strip(), max_body_bytes), tuple(allow_origin or ()))
    try:
        client = AsyncPagedClient(url, model=model_name, timeout=timeout, retries=_NO_RETRIES)
    except ValueError as error:
        raise _failure(str(error)) from None
    if not api_key and not _is_loopback(host):
        _say(f"{host} can be reached from elsewhere, and there is no API key: whoever reaches it may ask")
    with contextlib.closing(_listen(host, port)) as listener:
        listening = _Listening(host, listener.getsockname()[1], drain_seconds, access_log)
        ready = f"paged: OpenAI's API on {_base_url(listening)}, model {', '.join(offer.model_names)} from {url}"
        try:
            asyncio.run(_serve(make_app(client, offer), client, listener, listening, ready, wait_seconds))
        except KeyboardInterrupt:
            raise typer.Exit() from None
        except TimeoutError:
            raise _failure(f"{url} is not there, or has not loaded the model '{model_name}' ({wait_seconds:g} s waited)") from None


async def _serve(app: FastAPI, client: AsyncPagedClient, listener: socket.socket, listening: _Listening, ready: str, wait_seconds: float) -> None:
    """Until SIGINT or SIGTERM.

    Raises:
        TimeoutError: the server is not ready.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="info" if listening.access_log else "warning",
        access_log=listening.access_log,
        timeout_graceful_shutdown=listening.drain_seconds,
        lifespan="off",
        server_header=False,
    )
    async with client:
        await _wait_until_ready(client, wait_seconds)
        print(f"{ready}\nCtrl-C stops it.", flush=True)
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # uvicorn raises it once more when it has drained
        await uvicorn.Server(config).serve([listener])


async def _wait_until_ready(client: AsyncPagedClient, seconds: float) -> None:
    end = time.monotonic() + seconds
    said = False
    while not await client.is_ready():
        if time.monotonic() > end:
            raise TimeoutError
        if not said:
            _say("waiting for the server to be there and to have loaded the model")
            said = True
        await asyncio.sleep(_POLL_SECONDS)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise _failure(f"port {port} on {host} cannot be used: {_reason_of(error)}; choose another with --port") from None


def _reason_of(error: OSError) -> str:
    """Without what `create_server` adds to it."""
    return os.strerror(error.errno) if error.errno is not None and error.errno > 0 else str(error.strerror)


def _base_url(listening: _Listening) -> str:
    host = f"[{listening.host}]" if ":" in listening.host else listening.host
    return f"http://{host}:{listening.port}/v1"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say(sentence: str) -> None:
    print(f"paged: {sentence}", file=sys.stderr, flush=True)


def _failure(sentence: str) -> typer.Exit:
    print(f"paged: error: {sentence}", file=sys.stderr, flush=True)
    return typer.Exit(1)
