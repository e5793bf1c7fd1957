"""`paged openai` with few file descriptors, before callers who take all they can get."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")

import openai

from tests.server.front_end_server import FrontEndServer, serving
from tests.server.gateway_process import KEY, Gateway, gateway_to

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

DESCRIPTORS = 1024
MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def many_descriptors() -> Iterator[None]:
    """For this process, which plays all the callers."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 4096:
        pytest.skip("this machine lets a process open fewer files than the test needs")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 4096), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontEndServer]:
    with serving(tmp_path_factory.mktemp("front_end")) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(server: FrontEndServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    url = f"http://{server.http}"  # a connection for every request to the server, too
    folder = tmp_path_factory.mktemp("gateway")
    with gateway_to(
        url,
        folder,
        "--request-seconds",
        "3",
        "--max-bodies-bytes",
        str(64 * MIB),
        prefix=("prlimit", f"--nofile=512:{DESCRIPTORS}"),
    ) as running:
        yield running


def address_of(gateway: Gateway) -> tuple[str, int]:
    host, _, port = gateway.url.removeprefix("http://").removesuffix("/v1").partition(":")
    return host, int(port)


def health(gateway: Gateway) -> float:
    started = time.monotonic()
    with urllib.request.urlopen(gateway.url + "/health", timeout=5) as answer:
        assert answer.status == 200
    return time.monotonic() - started


def scrape(gateway: Gateway) -> dict[str, str]:
    page = urllib.request.Request(
        gateway.url.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(page, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def test_half_open_connections_keep_nobody_out(gateway: Gateway) -> None:
    with contextlib.ExitStack() as sockets:
        for number in range(1300):
            stranger = sockets.enter_context(socket.create_connection(address_of(gateway), timeout=10))
            if number % 2:
                stranger.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        assert health(gateway) < 2
        with gateway.client() as client:
            assert (
                client.completions.create(model="paged_llm", prompt="tokens=3", max_tokens=3).usage.completion_tokens
                == 3
            )
        log = gateway.errors.read_text()
        assert "connections were closed or refused" in log and "Traceback" not in log
    deadline = time.monotonic() + 10
    while float((series := scrape(gateway))["paged_gateway_connections"]) > 20:
        assert time.monotonic() < deadline, "silent connections are kept"
        time.sleep(0.1)
    assert float(series['paged_gateway_connections_closed_total{reason="room"}']) > 100
    assert float(series["process_max_fds"]) == DESCRIPTORS, "the limit was not raised as far as it may be"


def test_one_callers_many_prompts_keep_nobody_out(gateway: Gateway) -> None:
    async def together() -> None:
        async with openai.AsyncOpenAI(base_url=gateway.url, api_key=KEY, max_retries=0, timeout=60) as client:
            many = asyncio.ensure_future(
                client.completions.create(model="paged_llm", prompt=["tokens=2 delay=0.02"] * 1200, max_tokens=2)
            )
            await asyncio.sleep(0.3)
            started = time.monotonic()
            own = await client.completions.create(model="paged_llm", prompt="tokens=2", max_tokens=2)
            assert own.usage.completion_tokens == 2
            assert time.monotonic() - started < 5
            answer = await many
            assert len(answer.choices) == 1200 and {choice.finish_reason for choice in answer.choices} == {"length"}

    asyncio.run(together())


def test_bodies_that_never_end_hold_little(gateway: Gateway) -> None:
    body = b'{"model": "paged_llm", "prompt": "' + b"x" * (15 * MIB)
    head = "\r\n".join(
        [
            "POST /v1/completions HTTP/1.1",
            "Host: x",
            f"Authorization: Bearer {KEY}",
            "Content-Type: application/json",
            f"Content-Length: {len(body) + 100}",
            "\r\n",
        ]
    )
    before = resident_bytes(gateway)
    with contextlib.ExitStack() as sockets:
        strangers = []
        for _ in range(40):
            stranger = sockets.enter_context(socket.create_connection(address_of(gateway), timeout=10))
            strangers.append(stranger)
            with contextlib.suppress(OSError):  # it may be refused before its end
                stranger.sendall(head.encode() + body)
        assert resident_bytes(gateway) - before < 200 * MIB
        with gateway.client() as client:
            assert (
                client.completions.create(model="paged_llm", prompt="tokens=3", max_tokens=3).usage.completion_tokens
                == 3
            )
        heads = [stranger.recv(65536) for stranger in strangers]
    statuses = {answer.split(b" ")[1] for answer in heads if answer}
    assert statuses <= {b"503", b"408"} and b"503" in statuses and b"408" in statuses
    message = json.loads(next(answer for answer in heads if b" 503 " in answer).partition(b"\r\n\r\n")[2])["error"][
        "message"
    ]
    assert "max_bodies_bytes" in message


def resident_bytes(gateway: Gateway) -> int:
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024
