"""Who may ask the gateway, what a stranger can send, and how many may be there at once."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from pydantic import ValidationError
from starlette.datastructures import Headers

from paged_client import (
    UnreachableError,
)
from paged_client.openai.auth import usable_key
from paged_client.openai.connections import ConnectionLimits, Connections, say_failed_accepts
from paged_client.openai.errors import RefusalError
from paged_client.openai.gateway import ENDPOINTS
from paged_client.openai.limits import FREE_BYTES, Bodies, BodyLimits
from paged_client.openai.metrics import GatewayMetrics
from paged_client.openai.protocol import CompletionBody
from paged_client.question import Question
from tests.unit.client.gateway_calls import WHOLE, Call, Outputs, Transport, answering, call, complete, piece


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Basic secret", 401),
        ("Bearer secret2", 401),
        ("Bearer é", 401),
        ("Bearer secret", 200),
        ("bearer secret", 200),
    ],
    ids=str,
)
def test_only_who_has_the_key_may_ask(authorization: str | None, status: int) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    for path, body in (("/v1/models", None), ("/v1/completions", {"model": "m", "prompt": "x"})):
        reply = call(Transport(piece("a", "stop")), path, body, key="secret", headers=headers)
        assert reply.status == status
        if status == 401:
            assert reply.json["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_body_over_the_limit_is_refused(declared: bool) -> None:
    body = {"model": "m", "prompt": "x" * 5000}
    headers = {} if declared else {"content-length": ""}
    transport = Transport(piece("a", "stop"))
    assert call(transport, "/v1/completions", body, bodies=BodyLimits(5100), headers=headers).status == 200
    reply = call(transport, "/v1/completions", body, bodies=BodyLimits(5000), headers=headers)
    assert (reply.status, reply.json["error"]["message"]) == (413, "the body is longer than 5000 bytes")
    assert len(transport.asked) == 1


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"{", None, "not valid JSON"),
        (b"[]", None, "must be a JSON object"),
        (b"\xff", None, "not valid JSON"),
        (b"[" * 100_000, None, "not valid JSON"),
        ({"prompt": "x"}, "model", "missing"),
        ({"model": "m"}, "prompt", "missing"),
        (
            {"model": "m", "prompt": "x", "max_token": 1},
            "max_token",
            "unknown parameter: 'max_token'; did you mean 'max_tokens'?",
        ),
        (
            {"model": "m", "prompt": "x", "stream": True, "stream_options": {"include_usages": True}},
            "stream_options.include_usages",
            "did you mean 'stream_options.include_usage'",
        ),
        ({"model": "m", "prompt": "x", "request_id": "a b"}, "request_id", "match pattern"),
        ({"model": "m", "prompt": "x", "priority": 1, "priority_level": 2}, "priority", "priority_level"),
        ({"model": "m", "prompt": "x", "temperature": "hot"}, "temperature", "expected a valid number"),
        (b'{"model": "m", "prompt": "x", "temperature": NaN}', "temperature", "finite"),
        ({"model": "m", "prompt": "x", "n": 0}, "n", "greater than or equal to 1"),
        ({"model": "m", "prompt": {"a": 1}}, "prompt", "expected a valid string"),
        (
            {"model": "m", "prompt": "x"} | {str(key): 1 for key in range(2000)},
            None,
            "the body: 2002 keys; the most allowed is 1024",
        ),
        (
            {"model": "m", "prompt": "x", "logit_bias": {str(key): 1 for key in range(2000)}},
            "logit_bias",
            "logit_bias: 2000 keys; the most allowed is 1024",
        ),
        (b'{"model": "\\ud800", "prompt": "x"}', "model", "no Unicode text"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_body_that_cannot_be_read_is_refused_by_field(body: Any, param: str | None, words: str) -> None:
    reply = call(WHOLE, "/v1/completions", body)
    assert reply.status == (404 if "does not exist" in words else 400)
    assert reply.json["error"]["type"] == "invalid_request_error"
    assert reply.json["error"]["param"] == param
    assert words in reply.json["error"]["message"]


@pytest.mark.parametrize("wrong", [[-1] * 50_000, ["x", 1] * 25_000, [[-1]] * 50_000], ids=["ids", "mixed", "lists"])
def test_a_list_of_wrong_things_is_one_mistake(wrong: list[Any]) -> None:
    """A mistake for each costs a kilobyte, in each of the ways in which the list could have been meant."""
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate({"model": "m", "prompt": wrong})
    assert caught.value.error_count() < 10


def test_nobody_is_told_where_the_server_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        reply = complete(Transport(UnreachableError("no Triton Server can be reached at 10.0.0.7:8001: refused")))
    assert reply.status == 503
    assert reply.json["error"]["message"] == "the server cannot be reached"
    assert "10.0.0.7" in caplog.text


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "text/plain; application/json"]
)
def test_what_any_web_page_could_send_is_not_taken_for_json(kind: str) -> None:
    reply = call(WHOLE, "/v1/completions", {"model": "m", "prompt": "x"}, headers={"content-type": kind})
    assert (reply.status, "Content-Type" in reply.json["error"]["message"]) == (415, True)


def test_other_paths_and_methods_are_refused_in_the_same_shape() -> None:
    assert call(WHOLE, "/v1/images", {}).json["error"]["message"] == "POST /v1/images: Not Found"
    wrong = call(WHOLE, "/v1/completions")
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")


def test_pages_of_allowed_origins_may_ask() -> None:
    headers = {"origin": "https://a.example"}
    assert (
        call(WHOLE, "/v1/models", headers=headers, origins=("https://a.example",)).headers[
            "access-control-allow-origin"
        ]
        == "https://a.example"
    )
    assert "access-control-allow-origin" not in call(WHOLE, "/v1/models", headers=headers).headers
    for origin, allowed in {
        "http://localhost:3000": True,
        "http://127.0.0.1": True,
        "http://localhost.evil.example": False,
        "http://evil.example/localhost": False,
    }.items():
        reply = call(WHOLE, "/v1/models", headers={"origin": origin}, origins=("localhost",))
        assert ("access-control-allow-origin" in reply.headers) == allowed, origin


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_failure_of_our_own_tells_the_log_no_text(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        reply = complete(Transport(RuntimeError("secret prompt")), prompt="secret prompt", stream=stream)
    assert (reply.status, reply.json["error"]["type"]) == (500, "server_error")
    assert "secret" not in caplog.text + reply.text
    assert "RuntimeError at " in caplog.text


def test_two_lengths_of_a_body_end_the_connection() -> None:
    """Content-Length is there already: a proxy might believe the one, and this process the other."""
    reply = call(WHOLE, "/v1/completions", {"model": "m", "prompt": "x"}, headers={"transfer-encoding": "chunked"})
    assert (reply.status, reply.headers["connection"]) == (400, "close")
    assert "Transfer-Encoding" in reply.json["error"]["message"]


@pytest.mark.parametrize("given", ["clé", "a\nb", "a\x7f", "   "], ids=repr)
def test_a_key_that_no_header_can_carry_is_refused_at_start(given: str) -> None:
    with pytest.raises(ValueError, match="API key"):
        usable_key(given)


def test_a_key_loses_the_white_space_around_it() -> None:
    assert (usable_key(" a key\n"), usable_key("")) == ("a key", "")


def arriving(*sizes: int, end: bool = True) -> Any:
    """`receive` of a body in chunks; after them nothing, for ever, unless `end`."""
    chunks = list(sizes)

    async def receive() -> dict[str, Any]:
        if not chunks:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": b"x" * chunks.pop(0), "more_body": bool(chunks) or not end}

    return receive


def test_bodies_in_flight_have_a_bound_that_small_ones_do_not_meet() -> None:
    async def scenario() -> None:
        bodies = Bodies(BodyLimits(max_body_bytes=2**20, max_bodies_bytes=2**20, seconds=5))
        with bodies.place() as large:
            assert len(await large.read(Headers(), arriving(500_000, 500_000))) == 1_000_000
            assert bodies.bytes_in_flight == 1_000_000 - FREE_BYTES
            with bodies.place() as second, pytest.raises(RefusalError, match="max_bodies_bytes") as refused:
                await second.read(Headers(), arriving(FREE_BYTES, 200_000))
            assert refused.value.status == 503
            with bodies.place() as small:
                assert len(await small.read(Headers(), arriving(FREE_BYTES))) == FREE_BYTES
        assert bodies.bytes_in_flight == 0

    asyncio.run(scenario())


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async def scenario() -> None:
        bodies = Bodies(BodyLimits(seconds=0.05))
        with bodies.place() as place, pytest.raises(RefusalError, match="had not arrived after 0.05 s") as refused:
            await place.read(Headers(), arriving(100_000, end=False))
        assert (refused.value.status, bodies.bytes_in_flight) == (408, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_of_many_prompts_only_so_many_are_asked_at_once(stream: bool) -> None:
    class Counting(Transport):
        running = most = 0

        def ask(self, question: Question) -> Call:
            self.running += 1
            self.most = max(self.most, self.running)
            return super().ask(question)

    class Ending(Call):
        async def next(self, seconds: float | None) -> tuple[Outputs, bool]:
            answer = await super().next(seconds)
            self._transport.running -= answer[1]  # type: ignore[attr-defined]
            return answer

    transport = Counting(piece("a"), piece("b", "stop"))
    transport.ask = lambda question: (Counting.ask(transport, question), Ending(transport))[1]  # type: ignore[method-assign]
    reply = complete(transport, prompt=["x"] * 700, stream=stream)
    texts = [""] * 700
    for event in reply.events[:-1] if stream else [reply.json]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["ab"] * 700
    assert 1 < transport.most <= 256


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_a_request_that_is_cancelled_at_any_moment_leaves_nothing_open(num_prompts: int) -> None:
    """What is left for the loop to close at its end closes in no order, which is an error there."""
    complaints: list[str] = []
    body = {"model": "m", "prompt": ["x"] * num_prompts, "stream": True}

    async def cancelled_after(moments: int, transport: Transport) -> bool:
        """Rounds of the loop. Whether it was over already."""
        serving = asyncio.ensure_future(answering(transport, "/v1/completions", body))
        for _ in range(moments):
            await asyncio.sleep(0)
        was_over = serving.done()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        return was_over

    moments, over = 0, False
    while not over:
        transport = Transport(piece("a"), piece("b"), piece("c", "stop"))
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda loop, context: complaints.append(context["message"]))
        try:
            over = loop.run_until_complete(cancelled_after(moments, transport))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()
        assert complaints == [], f"cancelled after {moments} rounds of the loop"
        assert transport.num_left == len(transport.asked)
        moments += 1
    assert moments > 10


class Connection:
    """As uvicorn's protocol objects look to the table of connections."""

    class Cycle:
        response_complete = False

    def __init__(self, *, busy: bool = False) -> None:
        self.cycle = Connection.Cycle() if busy else None
        self.transport = self
        self.said = b""
        self.ended = ""

    def write(self, said: bytes) -> None:
        self.said += said

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"


def test_the_longest_silent_connection_makes_room() -> None:
    connections = Connections(ConnectionLimits(3), GatewayMetrics(ENDPOINTS))
    first, working, third, fourth, fifth = (
        Connection(),
        Connection(busy=True),
        Connection(),
        Connection(),
        Connection(busy=True),
    )
    for one in (first, working, third, fourth, fifth):
        connections.add(one)
    assert [one.ended for one in (first, working, third, fourth, fifth)] == ["aborted", "", "aborted", "", ""]
    fourth.cycle = Connection.Cycle()
    late = Connection()
    connections.add(late)
    assert late.ended == "closed"
    head, _, body = late.said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503") and b"Content-Length: %d" % len(body) in head
    assert json.loads(body)["error"]["code"] == "overloaded"


def test_a_silent_connection_is_closed_and_a_working_one_is_not() -> None:
    async def scenario() -> tuple[str, str]:
        connections = Connections(ConnectionLimits(9, seconds=0.04), GatewayMetrics(ENDPOINTS))
        silent, working = Connection(), Connection(busy=True)
        for one in (silent, working):
            connections.add(one)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(connections.sweep(), 0.2)
        return silent.ended, working.ended

    assert asyncio.run(scenario()) == ("aborted", "")


def test_a_failed_accept_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        say_failed_accepts(loop)
        message = "socket.accept() out of system resource"
        loop.call_exception_handler({"message": message, "exception": OSError(24, "Too many open files")})
        loop.call_exception_handler({"message": "something else"})

    asyncio.run(scenario())
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "a connection could not be accepted: Too many open files; trying again in a second",
        "something else",
    ]
