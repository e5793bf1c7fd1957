"""The gateway before an engine that says how fast to answer: its transports, callers who leave, the command itself."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")
pytest.importorskip("xgrammar")
import openai

from tests.server.fake_engine import answer_ids, make_tokenizer
from tests.server.front_end_server import FrontEndServer, serving
from tests.server.gateway_process import KEY, Gateway, gateway_to

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

CANCELLED = 'paged_requests_finished_total{reason="cancelled"}'
COMPLETE = 'paged_requests_finished_total{reason="length"}'
RUNNING = 'paged_requests{state="running"}'


@pytest.fixture(scope="module")
def slow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontEndServer]:
    """Its prompts say how fast to answer, and what goes wrong (fake_engine.py)."""
    with serving(tmp_path_factory.mktemp("front_end")) as running:
        yield running


@pytest.fixture(scope="module", params=["grpc", "http"])
def slow_gateway(
    request: pytest.FixtureRequest, slow_server: FrontEndServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    url = slow_server.grpc if request.param == "grpc" else f"http://{slow_server.http}"
    with gateway_to(url, tmp_path_factory.mktemp("gateway")) as running:
        yield running


def test_tokens_need_no_engine_over_either_transport(slow_gateway: Gateway) -> None:
    with slow_gateway.client() as client:
        root = client.with_options(base_url=slow_gateway.url.removesuffix("/v1"))
        tokens = root.post("/tokenize", body={"prompt": "tokens=3"}, cast_to=object)["tokens"]
        assert root.post("/detokenize", body={"tokens": tokens}, cast_to=object) == {"prompt": "tokens=3"}


def test_a_full_queue_is_tried_again_by_openais_client(slow_gateway: Gateway) -> None:
    tokenizer = make_tokenizer()
    for stream in (False, True):
        with slow_gateway.client(max_retries=1) as client:
            started = time.monotonic()
            with pytest.raises(openai.InternalServerError, match="the queue is full") as refused:
                client.completions.create(model="paged_llm", prompt="error", stream=stream)
            assert (refused.value.status_code, refused.value.code) == (503, "overloaded")
            assert refused.value.response.headers["retry-after"] == "1"
            assert time.monotonic() - started > 0.9, "it did not wait as long as it was told"
            whole = client.completions.create(model="paged_llm", prompt="tokens=5", max_tokens=9, n=2)
            assert [choice.text for choice in whole.choices] == [
                tokenizer.decode(answer_ids(tokenizer, "tokens=5", 5))
            ] * 2


@pytest.mark.one_in(2)
def test_a_model_that_is_away_is_no_unknown_model(slow_server: FrontEndServer, slow_gateway: Gateway) -> None:
    """Unloaded, loading, and back: whoever asks is told to come again soon, and never that there is no such model."""
    seen: set[tuple[int, str | None, str | None]] = set()
    stopping = threading.Event()

    def ask(stream: bool) -> None:
        with slow_gateway.client() as client:
            while not stopping.is_set():
                try:
                    made = client.completions.create(
                        model="paged_llm", prompt="tokens=3 delay=0.01", max_tokens=3, stream=stream
                    )
                    seen.add((200, None, None) if not stream else (200 if list(made) else 0, None, None))
                except openai.APIStatusError as error:
                    seen.add((error.status_code, error.response.headers.get("retry-after"), error.code))
                except openai.APIError as error:  # in the middle of a stream
                    seen.add((0, None, error.code))
                time.sleep(0.01)

    threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        slow_server.unload()
        time.sleep(0.3)
        slow_server.load()
        time.sleep(0.3)
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    assert (200, None, None) in seen and (503, "1", "not_ready") in seen
    assert {(status, after) for status, after, _ in seen} <= {(200, None), (503, "1"), (0, None)}, seen
    assert {code for status, _, code in seen if status == 503} <= {"not_ready", "overloaded"}
    with slow_gateway.client() as client, pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="x")


# An unstreamed answer over HTTP is written once: Triton Server does not notice before.
@pytest.mark.parametrize(
    ("slow_gateway", "stream"), [("grpc", False), ("grpc", True), ("http", True)], indirect=["slow_gateway"]
)
def test_a_caller_who_leaves_ends_the_request_in_the_server(
    slow_server: FrontEndServer, slow_gateway: Gateway, stream: bool
) -> None:
    before = slow_server.scrape().get(CANCELLED, 0)
    asked = {"model": "paged_llm", "prompt": ["tokens=300 delay=0.02"] * 2, "max_tokens": 300}
    with slow_gateway.client(timeout=0.6) as client:
        if stream:
            with client.completions.create(**asked, stream=True) as answer:
                for number, _ in enumerate(answer):
                    if number == 3:
                        slow_server.wait_for(RUNNING, 2)
                        break
        else:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(**asked)
    slow_server.wait_for(CANCELLED, before + 2, seconds=4)
    slow_server.wait_for(RUNNING, 0)


@pytest.mark.parametrize("slow_gateway", ["grpc"], indirect=True)
def test_whoever_leaves_at_whatever_moment_ends_the_request(slow_server: FrontEndServer, slow_gateway: Gateway) -> None:
    asked = {"model": "paged_llm", "prompt": ["tokens=400 delay=0.01"] * 2, "max_tokens": 400, "n": 2}

    async def one(client: Any, number: int) -> None:
        async def listen() -> None:
            answer = await client.completions.create(**asked, stream=number % 3 != 0)
            async for _ in answer:
                pass

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(listen(), 0.01 * number)

    async def together() -> None:
        async with openai.AsyncOpenAI(base_url=slow_gateway.url, api_key=KEY, max_retries=0) as client:
            await asyncio.gather(*(one(client, number) for number in range(150)))

    time.sleep(0.6)  # what other tests asked is counted: metrics are published four times a second
    before = slow_server.scrape().get(COMPLETE, 0)
    asyncio.run(together())
    slow_server.wait_for(RUNNING, 0, seconds=4)
    assert slow_server.scrape().get(COMPLETE, 0) == before, "somebody's request went on to its end"


def test_ctrl_c_waits_for_the_answer_in_flight_and_the_log_has_no_text(
    slow_server: FrontEndServer, tmp_path: Path
) -> None:
    for number, options in ((signal.SIGTERM, ["--access-log"]), (signal.SIGINT, [])):
        with gateway_to(slow_server.grpc, tmp_path, *options) as gateway, gateway.client() as client:
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model="paged_llm", prompt="a secret", temperature=-1)
            answer = client.completions.create(
                model="paged_llm", prompt="tokens=30 delay=0.02 secret", max_tokens=30, stream=True
            )
            next(answer)
            gateway.process.send_signal(number)
            assert [chunk.choices[0].finish_reason for chunk in answer][-1] == "length"
            assert gateway.process.wait(10) == 0
            log = gateway.errors.read_text() + (gateway.process.stdout.read() if gateway.process.stdout else "")
            assert "secret" not in log and "Traceback" not in log
            assert ("POST /v1/completions" in log) == bool(options)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paged_client.cli", "openai", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment}
    )


@pytest.mark.long
def test_what_is_wrong_is_said_in_one_sentence(slow_server: FrontEndServer, tmp_path: Path) -> None:
    with gateway_to(slow_server.grpc, tmp_path) as gateway:
        port = gateway.url.removesuffix("/v1").rpartition(":")[2]
        wrong = {
            (
                "-u",
                "localhost:1",
                "--wait-seconds",
                "0.3",
                "-p",
                "0",
            ): "localhost:1 is not there, or has not loaded a model of paged's (0.3 s waited)",
            (
                "-u",
                slow_server.grpc,
                "--model-name",
                "nonesuch",
                "--wait-seconds",
                "0",
                "-p",
                "0",
            ): "has not loaded the model 'nonesuch'",
            ("-u", "ftp://x"): "is no URL of a server",
            ("-p", port): f"port {port} on 127.0.0.1 cannot be used: Address already in use; choose another with "
            "--port",
        }
        for arguments, words in wrong.items():
            finished = run(*arguments)
            assert finished.returncode == 1
            last = finished.stderr.splitlines()[-1]
            assert last.startswith("paged: error: ") and words in last


@pytest.mark.long
def test_an_open_door_is_warned_of(slow_server: FrontEndServer) -> None:
    anywhere = (
        "-u",
        slow_server.grpc,
        "--model-name",
        "nonesuch",
        "--wait-seconds",
        "0",
        "--host",
        "0.0.0.0",
        "-p",
        "0",
    )
    assert "there is no API key" in run(*anywhere, PAGED_API_KEY="").stderr
    assert "there is no API key" not in run(*anywhere, PAGED_API_KEY="x").stderr
    assert "there is no API key" not in run(*anywhere[:-4], "-p", "0", PAGED_API_KEY="").stderr


def test_help_explains_every_option() -> None:
    text = run("--help", COLUMNS="300").stdout
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)(.*)$", text, re.MULTILINE)
    assert len(options) >= 12
    assert all(len(explained.split()) >= 4 for _, explained in options)
    assert "Tool calls and reasoning are read" in " ".join(text.split())
