"""Several servers behind one client: who is there, and who is asked."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from paged_client import AsyncPagedClient, UnavailableError, UnreachableError
from paged_client.async_client import AsyncStream
from paged_client.cluster import servers
from paged_client.cluster.cluster_client import ClusterClient
from paged_client.cluster.routing import Inquiry, LeastOutstanding, RoundRobin
from paged_client.cluster.servers import Facts, Lookups, Server
from paged_client.cluster.tokens import ServerTokenizer
from paged_client.question import question_of
from tests.fake_servers import Fake, cluster, two

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
