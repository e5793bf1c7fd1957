"""The client library against a real tritonserver, over gRPC and HTTP, with and without asyncio. Prompts direct the fake
engine (fake_engine.py).
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("tritonclient.grpc")

from paged_client import (
    Answer,
    AnswerTimeoutError,
    AsyncPagedClient,
    Delta,
    InvalidRequestError,
    PagedClient,
    PagedError,
    UnavailableError,
    UnknownModelError,
    UnreachableError,
)
from tests.server.fake_engine import answer_ids, make_tokenizer
from tests.server.front_end_server import FrontEndServer, serving

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

TOKENIZER = make_tokenizer()
WAIT_SECONDS = 20.0
CANCELLED = 'paged_requests_finished_total{reason="cancelled"}'
Ask = Callable[..., tuple[Answer, list[Delta]]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontEndServer]:
    with serving(tmp_path_factory.mktemp("client"), options={"request_deadline_seconds": "30"}) as running:
        yield running


def url_of(server: FrontEndServer, transport: str) -> str:
    return server.grpc if transport == "grpc" else f"http://{server.http}"


def ask(
    url: str,
    prompt: str,
    *,
    stream: bool = True,
    leave_after: int | None = None,
    model: str = "paged_llm",
    **options: object,
) -> Answer:
    limits = {name: options.pop(name) for name in ("timeout", "delta_timeout", "retries") if name in options}
    with PagedClient(url, model=model, **limits) as client:  # type: ignore[arg-type]
        if not stream:
            return client.generate(prompt, **options)  # type: ignore[arg-type]
        deltas = client.stream(prompt, **options)  # type: ignore[arg-type]
        for number, _ in enumerate(deltas, 1):
            if number == leave_after:
                break
        deltas.close()
        return deltas.answer


def ask_async(
    url: str,
    prompt: str,
    *,
    stream: bool = True,
    leave_after: int | None = None,
    model: str = "paged_llm",
    **options: object,
) -> Answer:
    async def asked() -> Answer:
        limits = {name: options.pop(name) for name in ("timeout", "delta_timeout", "retries") if name in options}
        async with AsyncPagedClient(url, model=model, **limits) as client:  # type: ignore[arg-type]
            if not stream:
                return await client.generate(prompt, **options)  # type: ignore[arg-type]
            deltas, number = client.stream(prompt, **options), 0  # type: ignore[arg-type]
            async for _ in deltas:
                number += 1
                if number == leave_after:
                    break
            deltas.close()
            await asyncio.sleep(0.05)  # a cancelled call tells the server in its own time
            return deltas.answer

    return asyncio.run(asked())


everywhere = pytest.mark.parametrize("asker", [ask, ask_async], ids=["sync", "async"])
transports = pytest.mark.parametrize("transport", ["grpc", "http"])


@pytest.mark.one_in(2)
@everywhere
@transports
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_an_answer_has_text_token_ids_reason_and_usage(
    server: FrontEndServer, transport: str, asker: Callable[..., Answer], stream: bool
) -> None:
    prompt = "tokens=24 äöü"
    answer = asker(url_of(server, transport), prompt, stream=stream)
    ids = answer_ids(TOKENIZER, prompt, 24)
    assert answer.token_ids == tuple(ids)
    assert answer.text == TOKENIZER.decode(ids)
    assert answer.finish_reason == "length"
    assert answer.usage.num_input_tokens == len(TOKENIZER.encode(prompt).ids)
    assert (answer.usage.num_cached_tokens, answer.usage.num_output_tokens) == (3, 24)


@everywhere
@transports
def test_sampling_keys_and_token_ids_reach_the_model(
    server: FrontEndServer, transport: str, asker: Callable[..., Answer]
) -> None:
    ids = TOKENIZER.encode("tokens=9 eos").ids
    assert asker(url_of(server, transport), ids, max_tokens=4).token_ids == tuple(
        answer_ids(TOKENIZER, "tokens=9 eos", 4)[:3]
    ) + (0,)
    assert asker(url_of(server, transport), "tokens=30", stop=["w1"]).text.endswith(" w0 ")


@everywhere
@transports
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_several_sequences_are_told_apart(
    server: FrontEndServer, transport: str, asker: Callable[..., Answer], stream: bool
) -> None:
    prompt = "tokens=24 äöü"
    answer = asker(url_of(server, transport), prompt, stream=stream, n=3, logprobs=1)
    ids = tuple(answer_ids(TOKENIZER, prompt, 24))
    assert [sequence.token_ids for sequence in answer.sequences] == [ids] * 3
    assert [sequence.text for sequence in answer.sequences] == [TOKENIZER.decode(list(ids))] * 3
    assert [sequence.finish_reason for sequence in answer.sequences] == ["length"] * 3
    assert answer.usage.num_output_tokens == 3 * 24
    for sequence in answer.sequences:
        assert [entry[0].token_id for entry in sequence.logprobs] == list(ids)
        assert [token.logprob for token in sequence.logprobs[0]] == [-0.5, -1.5]
        assert [entry[0].text for entry in sequence.logprobs] == [
            TOKENIZER.decode([token_id], skip_special_tokens=False) for token_id in ids
        ]


@everywhere
@transports
def test_leaving_several_sequences_ends_them_all(
    server: FrontEndServer, transport: str, asker: Callable[..., Answer]
) -> None:
    before = server.scrape().get(CANCELLED, 0)
    answer = asker(url_of(server, transport), "tokens=500 delay=0.02", leave_after=5, n=3)
    assert all(sequence.finish_reason is None for sequence in answer.sequences)
    server.wait_for(CANCELLED, before + 1)
    server.wait_for('paged_requests{state="running"}', 0)


@transports
def test_a_client_knows_whether_its_model_is_ready(server: FrontEndServer, transport: str) -> None:
    async def asked(url: str, model: str) -> bool:
        async with AsyncPagedClient(url, model=model) as client:
            return await client.is_ready()

    nowhere = "localhost:1" if transport == "grpc" else "http://localhost:1"
    for url, model, ready in (
        (url_of(server, transport), "paged_llm", True),
        (url_of(server, transport), "nonesuch", False),
        (nowhere, "paged_llm", False),
    ):
        assert asyncio.run(asked(url, model)) is ready
        with PagedClient(url, model=model) as client:
            assert client.is_ready() is ready


@pytest.mark.one_in(2)
@everywhere
@transports
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_every_error_is_of_its_own_type(
    server: FrontEndServer, transport: str, asker: Callable[..., Answer], stream: bool
) -> None:
    url = url_of(server, transport)
    with pytest.raises(InvalidRequestError, match="top_p: expected float") as invalid:
        asker(url, "x", top_p=7, stream=stream)
    assert invalid.value.field == "top_p"
    with pytest.raises(InvalidRequestError, match="unknown sampling parameter 'heat'") as unknown:
        asker(url, "x", heat=7, stream=stream)
    assert unknown.value.field == "heat"
    with pytest.raises(InvalidRequestError, match="the prompt has 600 tokens"):
        asker(url, [5] * 600, stream=stream)
    with pytest.raises(UnavailableError, match="^the queue is full$"):
        asker(url, "error", retries=0, stream=stream)
    with pytest.raises(UnknownModelError, match="nonesuch"):
        asker(url, "x", model="nonesuch", stream=stream)
    with pytest.raises(AnswerTimeoutError, match=r"not complete after 0.2 s"):
        asker(url, "tokens=2 delay=0.4", timeout=0.2, stream=stream)


@everywhere
@transports
def test_leaving_the_iterator_cancels_the_request_on_the_server(
    server: FrontEndServer, transport: str, asker: Callable[..., Answer]
) -> None:
    before = server.scrape().get(CANCELLED, 0)
    answer = asker(url_of(server, transport), "tokens=500 delay=0.02", leave_after=3)
    assert answer.finish_reason is None
    assert 3 <= len(answer.token_ids) < 100
    server.wait_for(CANCELLED, before + 1)
    server.wait_for('paged_requests{state="running"}', 0)


@everywhere
@transports
def test_a_timeout_cancels_the_request_on_the_server(
    server: FrontEndServer, transport: str, asker: Callable[..., Answer]
) -> None:
    before = server.scrape().get(CANCELLED, 0)
    with pytest.raises(AnswerTimeoutError, match="no piece of the answer for 0.15 s"):
        asker(url_of(server, transport), "tokens=3 delay=0.5", delta_timeout=0.15)
    if transport == "grpc":  # over HTTP the server notices when it writes, and then the answer may be over
        server.wait_for(CANCELLED, before + 1)
    server.wait_for('paged_requests{state="running"}', 0)


@pytest.mark.parametrize("kind", ["grpc", "http"])
@everywhere
def test_a_server_that_starts_late_is_reached_by_a_retry(
    server: FrontEndServer, kind: str, asker: Callable[..., Answer]
) -> None:
    """A port that refuses connections at first, and then leads to the server."""
    host, _, port = (server.grpc if kind == "grpc" else server.http).partition(":")
    door = socket.socket()
    door.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{door.getsockname()[1]}"
    with pytest.raises(UnreachableError, match=f"no Triton Server can be reached at {address}: .*(refused|failed)"):
        asker(address if kind == "grpc" else f"http://{address}", "x", retries=0)
    timer = threading.Timer(0.1, forward, (door, host, int(port)))
    timer.start()
    try:
        answer = asker(address if kind == "grpc" else f"http://{address}", "tokens=3", retries=6, timeout=20)
    finally:
        timer.join()
        door.close()
    assert len(answer.token_ids) == 3


def forward(door: socket.socket, host: str, port: int) -> None:
    """Lets connections through `door` until it is closed."""
    door.listen()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while received := source.recv(65536):
                sink.sendall(received)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def accept() -> None:
        try:
            while True:
                visitor, _ = door.accept()
                inside = socket.create_connection((host, port))
                for pair in ((visitor, inside), (inside, visitor)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()
        except OSError:
            return

    threading.Thread(target=accept, daemon=True).start()


def test_one_client_carries_many_streams_at_once(server: FrontEndServer) -> None:
    prompts = [f"tokens=40 number {number}" for number in range(24)]
    expected = {prompt: TOKENIZER.decode(answer_ids(TOKENIZER, prompt, 40)) for prompt in prompts}
    found: dict[str, str] = {}

    async def together() -> list[Answer]:
        async with AsyncPagedClient(server.grpc) as client:
            return await asyncio.gather(*(client.generate(prompt) for prompt in prompts))

    with PagedClient(server.grpc) as client:
        threads = [
            threading.Thread(target=lambda prompt=prompt: found.update({prompt: client.generate(prompt).text}))
            for prompt in prompts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == expected
    assert [answer.text for answer in asyncio.run(together())] == list(expected.values())


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_a_program_may_end_without_closing_anything(server: FrontEndServer, transport: str) -> None:
    """Streams begun and not read to their end, clients kept: grpc's own threads would keep such a program from
    ending.
    """
    before = server.scrape().get(CANCELLED, 0)
    program = f"""
from paged_client import PagedClient

client = PagedClient({url_of(server, transport)!r})
print(client.generate("tokens=3").finish_reason)
left = client.stream("tokens=100000 delay=0.01")
print(next(iter(left)).usage.num_output_tokens > 0)
"""
    for _ in range(5):
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "length\nTrue\n", "")
    server.wait_for(CANCELLED, before + 5, seconds=WAIT_SECONDS)


def test_a_sync_client_uses_its_connection_again_after_an_error_and_a_cancellation(server: FrontEndServer) -> None:
    with PagedClient(server.grpc, retries=0) as client:
        for _ in range(3):
            with pytest.raises(PagedError):
                client.generate("x", top_p=7)
            with client.stream("tokens=500 delay=0.02") as deltas:
                next(deltas)
            started = time.monotonic()
            assert len(client.generate("tokens=3").token_ids) == 3
            assert time.monotonic() - started < 2
