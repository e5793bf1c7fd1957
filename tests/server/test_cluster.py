"""Three tritonservers behind one gateway, as typed: texts are those of one server, also when a server is killed under
64 streams.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")
pytest.importorskip("dynamo.llm", reason="ai-dynamo-runtime is not installed")

import openai

from paged_backend.server.launch import Server, ServerSettings
from paged_client import AsyncPagedClient
from paged_client.cluster.servers import KEEPALIVE_SECONDS
from tests.server.gateway_process import KEY, Gateway, gateway_to

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(600)]

NUM_STREAMS = 64
OF_MODEL = '{model="paged_llm"}'
LONG = 200  # tokens: a stream must still run when all have begun
HEADS = [
    f"The {name} lived in the {place} and was very fond of stories."
    for name in ("fox", "owl", "mouse", "bear")
    for place in ("orchard", "harbour")
]
OPTIONS = {
    "num_pages": 1200,
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_sequences": 64,
    "standby_engine": False,
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    folder = tmp_path_factory.mktemp("kv")
    running = []
    try:
        for number in range(3):
            server = Server(
                ServerSettings(
                    instances=1, options=OPTIONS | {"kv_events": f"ipc://{folder}/{number}"}, drain_seconds=3
                )
            )
            running.append(server)
            server.start()
        yield running
    finally:
        for server in running:
            server.stop()


@pytest.fixture(scope="module")
def gateway(servers: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    first, *others = [server.addresses.grpc_url for server in servers]
    with gateway_to(
        first, tmp_path_factory.mktemp("gateway"), *(argument for url in others for argument in ("-u", url))
    ) as running:
        yield running


def metric(gateway: Gateway, name: str) -> dict[str, float]:
    """Labels → value."""
    asked = Request(gateway.url.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urlopen(asked, timeout=10) as response:
        text = response.read().decode()
    return {
        labels: float(value)
        for labels, value in re.findall(rf"^{name}(\{{[^}}]*\}})? ([\d.e+-]+)$", text, re.MULTILINE)
    }


def prompt(number: int) -> str:
    return f"{HEADS[number % len(HEADS)]} One day, it was day {number},"


def asked(number: int, max_tokens: int = 24) -> dict[str, Any]:
    """Every other one is greedy."""
    sampling: dict[str, Any] = {"temperature": 0} if number % 2 else {"temperature": 1.1, "seed": number}
    return {
        "model": "paged_llm",
        "prompt": prompt(number),
        "max_tokens": max_tokens,
        **sampling,
        "extra_body": {"ignore_eos": True},
    }


def expected(server: Server, *numbers: int, max_tokens: int = 24) -> list[str]:
    """What one server answers."""

    async def ask() -> list[str]:
        async with AsyncPagedClient(server.addresses.grpc_url) as client:
            options = [asked(number, max_tokens) for number in numbers]
            sampling = [
                {key: value for key, value in one.items() if key not in ("model", "prompt", "extra_body")}
                | one["extra_body"]
                for one in options
            ]
            answers = await asyncio.gather(
                *(client.generate(one["prompt"], **keys) for one, keys in zip(options, sampling, strict=True))
            )
        return [answer.text for answer in answers]

    return asyncio.run(ask())


async def ask_all(gateway: Gateway, break_off: Callable[[], None]) -> list[str | BaseException]:
    """The texts of 64 streams. break_off: called once three quarters of them have begun."""
    begun: set[int] = set()
    async with openai.AsyncOpenAI(base_url=gateway.url, api_key=KEY, max_retries=0, timeout=200) as client:
        streams = [asyncio.ensure_future(stream(client, number, begun)) for number in range(NUM_STREAMS)]
        while len(begun) < NUM_STREAMS * 3 // 4:
            await asyncio.sleep(0.01)
        break_off()
        return await asyncio.gather(*streams, return_exceptions=True)


async def stream(client: openai.AsyncOpenAI, number: int, begun: set[int]) -> str:
    text = ""
    async for chunk in await client.completions.create(**asked(number, LONG), stream=True):
        text += chunk.choices[0].text
        begun.add(number)
    return text


def _until(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    assert condition()


def test_answers_are_those_of_one_server_and_heads_stay_where_they_are(servers: list[Server], gateway: Gateway) -> None:
    with gateway.client() as client:
        numbers = range(len(HEADS) * 2)
        assert [client.completions.create(**asked(number)).choices[0].text for number in numbers] == expected(
            servers[0], *numbers
        )
        time.sleep(0.5)  # events are on their way
        cached = [
            client.completions.create(**asked(100 + number)).usage.prompt_tokens_details.cached_tokens
            for number in range(len(HEADS))
        ]
    assert all(tokens >= 16 for tokens in cached), cached
    assert metric(gateway, "paged_gateway_servers") == {
        '{model="paged_llm",state="ready"}': 3,
        '{model="paged_llm",state="not_ready"}': 0,
    }
    routed = metric(gateway, "paged_gateway_requests_routed_total")
    assert len(routed) == 3 and sum(routed.values()) == 3 * len(HEADS)
    assert min(routed.values()) > 0, routed


def test_nothing_is_lost_and_no_text_is_another_when_a_server_is_killed_under_64_streams(
    servers: list[Server], gateway: Gateway
) -> None:
    texts = expected(servers[0], *range(NUM_STREAMS), max_tokens=LONG)
    got = asyncio.run(ask_all(gateway, servers[1].kill))
    assert [one for one in got if isinstance(one, BaseException)] == []
    assert got == texts
    moved = (
        metric(gateway, "paged_gateway_answers_resumed_total")[OF_MODEL],
        metric(gateway, "paged_gateway_requests_asked_anew_total")[OF_MODEL],
    )
    routed = metric(gateway, "paged_gateway_requests_routed_total")
    print(f"{NUM_STREAMS} streams: {moved[0]:.0f} went on elsewhere, {moved[1]:.0f} were asked anew; routed {routed}")
    assert moved[0] > 0, "nobody was on the server that was killed"
    assert metric(gateway, "paged_gateway_servers") == {
        '{model="paged_llm",state="ready"}': 2,
        '{model="paged_llm",state="not_ready"}': 1,
    }


def test_a_server_that_comes_back_is_asked_again(servers: list[Server], gateway: Gateway) -> None:
    dead = servers[1]
    dead.stop()
    again = ServerSettings(
        instances=1,
        options=dead.settings.options,
        drain_seconds=3,
        grpc_port=dead.addresses.grpc_port,
        http_port=dead.addresses.http_port,
        metrics_port=dead.addresses.metrics_port,
    )
    with Server(again):
        _until(lambda: metric(gateway, "paged_gateway_servers")['{model="paged_llm",state="ready"}'] == 3, 20)
        with gateway.client() as client:
            for number in range(6):
                assert [client.completions.create(**asked(number)).choices[0].text] == expected(servers[0], number)


def test_a_server_that_hangs_is_given_up_in_time_and_its_streams_go_on_elsewhere(
    servers: list[Server], gateway: Gateway
) -> None:
    """It is stopped, so that it neither answers nor closes its connections. Two are there, of which one goes on."""
    texts = expected(servers[0], *range(NUM_STREAMS), max_tokens=LONG)
    resumed, hung = metric(gateway, "paged_gateway_answers_resumed_total")[OF_MODEL], servers[2].pid
    given_up: list[float] = []  # seconds after the stop

    def watch(stopped_at: float) -> None:
        _until(lambda: metric(gateway, "paged_gateway_servers")['{model="paged_llm",state="ready"}'] == 1, 60)
        given_up.append(time.monotonic() - stopped_at)

    def stop() -> None:
        os.kill(hung, signal.SIGSTOP)
        threading.Thread(target=watch, args=(time.monotonic(),), daemon=True).start()

    try:
        got = asyncio.run(ask_all(gateway, stop))
        assert [one for one in got if isinstance(one, BaseException)] == []
        assert got == texts
        moved = metric(gateway, "paged_gateway_answers_resumed_total")[OF_MODEL] - resumed
        print(
            f"{NUM_STREAMS} streams: {moved:.0f} went on elsewhere, from a server that was given up after {given_up} s"
        )
        assert moved > 0, "nobody was on the server that hangs"
        assert given_up and given_up[0] < 2 * KEEPALIVE_SECONDS + 5, "five seconds for a loaded machine"
    finally:
        os.kill(hung, signal.SIGCONT)
    _until(lambda: metric(gateway, "paged_gateway_servers")['{model="paged_llm",state="ready"}'] == 2, 30)
