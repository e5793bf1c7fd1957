"""Several servers as one: who is asked, who is taken out, and answers that go on elsewhere with the same text. The
servers here are scripts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

pytest.importorskip("starlette")

from paged_client import Answer, AsyncPagedClient, Delta, InvalidRequestError, UnavailableError, UnreachableError
from paged_client.async_client import AsyncStream
from paged_client.cluster import resuming, servers
from paged_client.cluster.cluster_client import ClusterClient
from paged_client.cluster.resuming import SEED_STEP
from paged_client.cluster.routing import Inquiry, LeastOutstanding, RoundRobin
from paged_client.cluster.servers import Facts, Lookups, Server
from paged_client.cluster.tokens import ServerTokenizer
from paged_client.question import Question, question_of
from paged_client.retry_policy import Limits

PROMPT = [5, 6, 7, 8]


def token_of(seed: int, token_ids: Sequence[int]) -> int:
    """The model: as the real one's, its choice follows from the seed and what is before."""
    return crc32(repr((seed, list(token_ids))).encode()) % 26


def text_of(token_ids: Sequence[int]) -> str:
    return "".join(chr(97 + token_id) for token_id in token_ids)


def solo(seed: int, num_tokens: int) -> list[int]:
    token_ids = list(PROMPT)
    while len(token_ids) < len(PROMPT) + num_tokens:
        token_ids.append(token_of(seed, token_ids))
    return token_ids[len(PROMPT) :]


@dataclass
class Fake:
    """A server, and its transport."""

    url: str
    dies_after: int | None = None  # tokens of an answer; it is gone from then on
    refusal: Exception | None = None
    alive: bool = True
    asked: list[Question] = field(default_factory=list)
    num_cached: int = 3

    def ask(self, question: Question, timeout: float | None = None) -> Any:
        self.asked.append(question)
        transport = type("Transport", (), {"ask": lambda _, question: Call(self, question)})()
        return AsyncStream(transport, question, Limits(timeout, None, 0))

    async def takes_requests(self) -> bool:
        return self.alive

    async def describe(self) -> dict[str, Any]:
        return {"model": await self.tell()}

    async def tell(self, *_: Any, **__: Any) -> Any:
        if self.refusal is not None:
            raise self.refusal
        return self.url

    tokenize = detokenize = tell

    async def close(self) -> None:
        pass


class Call:
    def __init__(self, server: Fake, question: Question) -> None:
        sampling = json.loads(str(question.tensors["sampling_parameters"]))
        self._server = server
        self._n = question.num_sequences
        self._max_tokens = sampling.get("max_tokens", 1)
        self._seeds = [(sampling.get("seed", 0) + index * SEED_STEP) % 2**64 for index in range(self._n)]
        given = list(question.tensors.get("answer_ids", ()))  # type: ignore[call-overload]
        assert not given or self._n == 1
        self._answers = [list(given) for _ in range(self._n)]
        self._stream = question.stream
        self._num_sent = 0

    async def next(self, seconds: float | None) -> tuple[dict[str, list[Any]], bool]:
        """A token of each sequence, or everything."""
        await asyncio.sleep(0)
        server = self._server
        if server.refusal is not None:
            raise server.refusal
        if not server.alive or self._num_sent == server.dies_after:
            server.alive = False
            raise UnreachableError("it is gone")
        news: list[list[int]] = [[] for _ in range(self._n)]
        for seed, answer, new in zip(self._seeds, self._answers, news, strict=True):
            while len(answer) < self._max_tokens:
                new.append(token_of(seed, [*PROMPT, *answer]))
                answer.append(new[-1])
                if self._stream:
                    break
        self._num_sent += 1
        over = len(self._answers[0]) == self._max_tokens
        outputs: dict[str, list[Any]] = {
            "text_output": [text_of(new) for new in news],
            "output_ids": [token_id for new in news for token_id in new],
            "num_output_tokens": [len(new) for new in news],
            "sequence_index": list(range(self._n)),
            "finish_reason": ["length" if over else "None"] * self._n,
            "num_input_tokens": [len(PROMPT)],
            "num_cached_tokens": [server.num_cached],
        }
        return outputs, over

    def cancel(self) -> None:
        pass


@asynccontextmanager
async def cluster(*fakes: Fake, routing: str = "least", **options: Any) -> AsyncIterator[ClusterClient]:
    by_url = {fake.url: fake for fake in fakes}
    sources = options.pop("sources", list(by_url))
    async with ClusterClient(sources, model="m", routing=routing, connect=by_url.__getitem__, **options) as client:
        yield client


async def streamed(client: ClusterClient, **sampling: Any) -> tuple[str, list[Delta]]:
    async with client.stream(PROMPT, **{"max_tokens": 12, "seed": 4, **sampling}) as stream:
        deltas = [delta async for delta in stream]
    return "".join(delta.text for delta in deltas), deltas


def two(**options: Any) -> tuple[Fake, Fake]:
    return Fake("a:1", **options), Fake("b:1")


@pytest.mark.parametrize("dies_after", range(12))
def test_a_stream_goes_on_in_another_server_with_the_same_text(dies_after: int) -> None:
    async def ask() -> None:
        first, second = two()
        async with cluster(first, second) as client:
            first.dies_after = second.dies_after = dies_after  # whoever is asked first
            asked = asyncio.ensure_future(streamed(client))
            while not first.asked and not second.asked:
                await asyncio.sleep(0)
            (second if first.asked else first).dies_after = None
            text, deltas = await asked
            assert text == text_of(solo(4, 12))
            assert deltas[-1].usage.num_output_tokens == 12 and deltas[-1].usage.num_input_tokens == len(PROMPT)
            assert [delta.usage.num_output_tokens for delta in deltas] == list(range(1, 13)), "a token is sent once"
            assert client.num_resumed == (dies_after > 0) and client.num_asked_anew == (dies_after == 0)
            assert len(client.servers.ready()) == 1
            assert all(server.num_outstanding == 0 for server in client.servers.all)

    asyncio.run(ask())


def test_a_request_without_a_seed_is_given_one_that_all_servers_share() -> None:
    async def ask() -> None:
        first, second = two(dies_after=5)
        async with cluster(first, second, routing="turns") as client:
            text, _ = await streamed(client, seed=None)
            (seed,) = {
                json.loads(str(question.tensors["sampling_parameters"]))["seed"]
                for fake in (first, second)
                for question in fake.asked
            }
            assert text == text_of(solo(seed, 12))
            assert second.asked[-1].tensors["answer_ids"] == solo(seed, 5)

    asyncio.run(ask())


def test_several_sequences_go_on_each_with_its_own_seed() -> None:
    async def ask() -> None:
        first, second = two(dies_after=5)
        async with cluster(first, second, routing="turns") as client:
            _, deltas = await streamed(client, n=3)
            for index in range(3):
                mine = [delta for delta in deltas if delta.sequence_index == index]
                assert "".join(delta.text for delta in mine) == text_of(solo((4 + index * SEED_STEP) % 2**64, 12))
                assert [delta.finish_reason for delta in mine if delta.finish_reason] == ["length"]
            assert len(second.asked) == 3
            assert deltas[-1].usage.num_output_tokens == 36

    asyncio.run(ask())


@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_in_one_piece_is_asked_anew(n: int) -> None:
    async def ask() -> Answer:
        first, second = two(dies_after=0)
        async with cluster(first, second, routing="turns") as client:
            answer = await client.generate(PROMPT, max_tokens=12, seed=4, n=n)
            assert client.num_asked_anew == 1 and not first.alive
            return answer

    answer = asyncio.run(ask())
    assert [one.token_ids for one in answer.sequences] == [
        tuple(solo((4 + index * SEED_STEP) % 2**64, 12)) for index in range(n)
    ]
    assert answer.finish_reason == "length" and answer.usage.num_output_tokens == 12 * n


def test_what_one_server_refuses_for_want_of_room_goes_to_the_next_and_that_stays() -> None:
    async def ask() -> None:
        first, second = two(refusal=UnavailableError("the queue is full"))
        async with cluster(first, second, routing="turns") as client:
            text, _ = await streamed(client)
            assert text == text_of(solo(4, 12))
            assert len(client.servers.ready()) == 2, "a full server is not gone"

    asyncio.run(ask())


def test_what_all_servers_refuse_is_refused() -> None:
    async def ask() -> None:
        full = UnavailableError("the queue is full")
        async with cluster(Fake("a:1", refusal=full), Fake("b:1", refusal=full)) as client:
            with pytest.raises(UnavailableError, match="the queue is full"):
                await streamed(client)

    asyncio.run(ask())


def test_a_request_that_is_wrong_is_wrong_everywhere() -> None:
    async def ask() -> None:
        first, second = two(refusal=InvalidRequestError("max_tokens: -1"))
        async with cluster(first, second, routing="turns") as client:
            with pytest.raises(InvalidRequestError):
                await streamed(client)
            assert not second.asked

    asyncio.run(ask())


def test_without_a_server_a_request_is_refused_at_once_and_an_answer_under_way_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(servers, "_CHECK_SECONDS", 0.02)
    monkeypatch.setattr(resuming, "_PAUSE_SECONDS", 0.01)

    async def ask() -> None:
        only = Fake("a:1", dies_after=5)
        async with cluster(only) as client:
            asked = asyncio.ensure_future(streamed(client))
            while only.alive:
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
            with pytest.raises(UnreachableError, match="no server is ready"):
                await streamed(client)
            only.alive, only.dies_after = True, None  # it is started again
            text, _ = await asked
            assert text == text_of(solo(4, 12))

    asyncio.run(ask())


def test_an_answer_takes_no_longer_than_its_time_however_many_servers_it_needs() -> None:
    async def ask() -> None:
        async with cluster(*two(), timeout=0.0) as client:
            with pytest.raises(TimeoutError, match=r"the answer was not complete after 0 s \(timeout\)"):
                await streamed(client)

    asyncio.run(ask())


def test_leaving_a_stream_gives_its_place_back() -> None:
    async def ask() -> None:
        first, second = two()
        async with cluster(first, second) as client:
            async with client.stream(PROMPT, max_tokens=12, seed=4) as stream:
                await anext(stream)
                assert sum(server.num_outstanding for server in client.servers.all) == 1
            assert all(server.num_outstanding == 0 for server in client.servers.all)

    asyncio.run(ask())


def test_a_server_that_comes_back_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_CHECK_SECONDS", 0.01)

    async def ask() -> None:
        first, second = two()
        first.alive = False
        async with cluster(first, second, routing="turns") as client:
            assert [server.url for server in client.servers.ready()] == ["b:1"]
            first.alive = True
            for _ in range(200):
                await asyncio.sleep(0.01)
                if len(client.servers.ready()) == 2:
                    break
            for _ in range(2):
                await streamed(client)
            assert first.asked and second.asked

    asyncio.run(ask())


# ---- who is there


def test_a_file_is_read_again_while_the_gateway_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_CHECK_SECONDS", 0.01)
    monkeypatch.setattr(servers, "_LOOKUP_SECONDS", 0.0)
    listed = tmp_path / "servers"
    listed.write_text("# ours\na:1\n\n")

    async def ask() -> None:
        async def until(urls: list[str]) -> None:
            for _ in range(200):
                if [server.url for server in client.servers.all] == urls:
                    return
                await asyncio.sleep(0.01)
            raise AssertionError([server.url for server in client.servers.all])

        async with cluster(Fake("a:1"), Fake("b:1"), sources=[f"file://{listed}"]) as client:
            await until(["a:1"])
            first = client.servers.all[0]
            listed.write_text("a:1\nb:1\n")
            await until(["a:1", "b:1"])
            assert client.servers.all[0] is first
            listed.write_text("ftp://c\n")
            await asyncio.sleep(0.05)
            await until(["a:1", "b:1"])  # what cannot be read changes nothing
            listed.write_text("b:1\n")
            await until(["b:1"])
            assert not first.ready

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ftp://x", "is no URL of a server"),
        ("dns://x", r"expected dns://HOST:PORT"),
        ("file:///none/such", "No such file"),
    ],
)
def test_what_is_no_server_is_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asyncio.run(Lookups([source]).urls())


def test_a_name_stands_for_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    async def addresses(self: object, host: str, port: int, **_: object) -> list[Any]:
        assert (host, port) == ("paged-headless", 8001)
        return [
            (0, 0, 0, "", ("10.0.0.2", 8001)),
            (0, 0, 0, "", ("10.0.0.1", 8001)),
            (0, 0, 0, "", ("fd00::1", 8001, 0, 0)),
        ]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", addresses)
    assert asyncio.run(Lookups(["dns://paged-headless:8001"]).urls()) == [
        "10.0.0.1:8001",
        "10.0.0.2:8001",
        "[fd00::1]:8001",
    ]


def test_a_name_without_addresses_stands_for_nobody() -> None:
    assert asyncio.run(Lookups(["dns://no.such.name.invalid:1"]).urls()) == []


@pytest.mark.parametrize(
    ("url", "kv_events", "seen"),
    [
        ("h:1", "", None),
        ("127.0.0.1:1", "5557", ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558")),
        ("h:1", "5557", None),
        ("grpcs://h:1", "tcp://*:70", ("tcp://h:70", "tcp://h:71")),
        ("h:1", "tcp://10.0.0.1:70", ("tcp://10.0.0.1:70", "tcp://10.0.0.1:71")),
        ("h:1", "ipc:///x", ("ipc:///x", "ipc:///x.replay")),
    ],
)
def test_where_a_server_tells_what_it_has(url: str, kv_events: str, seen: tuple[str, str] | None) -> None:
    server = Server(url, Fake(url), 1, facts=Facts(kv_events=kv_events))
    assert server.kv_addresses == seen


# ---- who is asked


def _servers(*outstanding: int) -> list[Server]:
    return [
        Server(f"{index}:1", Fake(""), index, ready=True, num_outstanding=number)
        for index, number in enumerate(outstanding)
    ]


def test_the_server_with_the_fewest_outstanding_requests_is_asked() -> None:
    async def ask() -> None:
        router, candidates = LeastOutstanding(), _servers(2, 0, 1)
        tickets = [await router.choose(Inquiry(None), candidates) for _ in range(6)]
        assert [server.num_outstanding for server in candidates] == [3, 3, 3]
        await tickets[0].over()
        assert (await router.choose(Inquiry(None), candidates)).server is tickets[0].server

    asyncio.run(ask())


def test_a_session_stays_where_it_is_while_that_server_is_there() -> None:
    async def ask() -> None:
        router, candidates = LeastOutstanding(), _servers(0, 0, 0)
        first = (await router.choose(Inquiry(None, session="s"), candidates)).server
        for _ in range(5):
            assert (await router.choose(Inquiry(None, session="s"), candidates)).server is first
        others = [server for server in candidates if server is not first]
        second = (await router.choose(Inquiry(None, session="s"), others)).server
        assert (await router.choose(Inquiry(None, session="s"), candidates)).server is second, "it has moved"

    asyncio.run(ask())


def test_each_in_turn() -> None:
    async def ask() -> None:
        router, candidates = RoundRobin(), _servers(9, 0, 0)
        assert [(await router.choose(Inquiry(None), candidates)).server.number for _ in range(4)] == [0, 1, 2, 0]

    asyncio.run(ask())


def test_a_routing_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="routing: 'x' is none of kv, least, turns"):
        ClusterClient(["a:1"], model="m", routing="x")


def test_where_the_tokenizer_is_not_here_a_server_is_asked() -> None:
    async def ask() -> None:
        dead, answering = Fake("a:1", refusal=UnreachableError("it is gone")), Fake("b:1")
        async with cluster(dead, answering) as client:
            tokenizer = ServerTokenizer(client.servers)
            tensors = question_of("words", {"add_special_tokens": False, "max_tokens": 3}, stream=True).tensors
            assert await tokenizer.ids_of(tensors, {"thinking": True}) is None, "the other is asked next time"
            await tokenizer.ids_of(tensors, {"thinking": True})
            asked = answering.asked[-1].tensors
            assert (asked["task"], asked["text_input"]) == ("tokenize", "words")
            assert json.loads(str(asked["sampling_parameters"])) == {
                "add_special_tokens": False,
                "chat_template_kwargs": {"thinking": True},
            }
            assert await tokenizer.ids_of(question_of([4, 5], {}, stream=True).tensors) == [4, 5]

    asyncio.run(ask())


def test_what_any_server_can_tell_the_first_that_can_is_asked() -> None:
    async def ask() -> None:
        first, second = two()
        first.refusal = UnavailableError("its engine is being restarted")
        async with cluster(first, second) as client:
            assert await client.detokenize([1]) == await client.tokenize("x") == "b:1"  # type: ignore[comparison-overlap]
            assert await client.describe() == {"model": "b:1"}
            second.refusal = first.refusal
            with pytest.raises(UnavailableError, match="its engine"):
                await client.describe()

    asyncio.run(ask())


def test_the_gateway_finds_everything_it_asks_of_one_server() -> None:
    pytest.importorskip("fastapi")
    from paged_client.openai.model_card import Backend

    asked = {name for name in vars(Backend) if not name.startswith("_")}
    assert len(asked) > 4
    for kind in (AsyncPagedClient, ClusterClient):
        assert asked <= set(dir(kind)), asked - set(dir(kind))


def test_a_question_can_go_on_with_an_answer() -> None:
    question = question_of([1], {}, stream=True).going_on_from((4, 5))
    assert question.tensors["answer_ids"] == [4, 5]
    assert "answer_ids" not in question_of([1], {}, stream=True).going_on_from(()).tensors
    assert isinstance(AsyncPagedClient("h:1").ask(question, 3.0), AsyncStream)
