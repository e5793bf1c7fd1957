"""Requests go where most of their prompt is cached. Schedulers, caches and sockets are the real ones, the runners
simulated; NVIDIA Dynamo chooses.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("DYN_LOG", "error")
pytest.importorskip("dynamo.llm", reason="ai-dynamo-runtime is not installed")
pytest.importorskip("starlette")

from dynamo.llm import SelectionService

from paged_client.cluster.cluster_client import ClusterClient
from paged_client.cluster.routing import Inquiry, KvAware
from paged_client.cluster.tokens import GatewayTokenizer
from paged_client.question import question_of
from tests.kv_engines import SIZE, Told, Wire

NUM_SERVERS = 3
PATIENCE = 30.0  # seconds


class Listed:
    """A server as the gateway sees it, which answers nothing: these tests ask its engine themselves."""

    def __init__(self, wire: Wire, url: str) -> None:
        self.alive = True
        self.said: dict[str, Any] = {
            "kv_events": wire.addresses[0],
            "page_size": SIZE,
            "num_pages": 64,
            "max_batched_tokens": 32,
        }

    async def takes_requests(self) -> bool:
        return self.alive

    async def describe(self) -> dict[str, Any]:
        return self.said

    async def close(self) -> None:
        pass


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.wires = []
        for number in range(NUM_SERVERS):
            (folder / str(number)).mkdir()
            self.wires.append(Wire(folder / str(number)))
        self.engines = [Told(publisher=wire.publisher) for wire in self.wires]
        self.listed = {f"{number}:1": Listed(wire, f"{number}:1") for number, wire in enumerate(self.wires)}

    def client(self) -> ClusterClient:
        return ClusterClient(
            list(self.listed), model="m", routing="kv", tokenizer="/none/such", connect=self.listed.__getitem__
        )  # type: ignore[arg-type]

    def serve(self, number: int, prompt: list[int], salt: str = "") -> None:
        self.engines[number].ask(prompt, 1, salt)
        self.engines[number].run()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    for wire in cluster.wires:
        wire.close()


async def heard(router: KvAware, prompt: list[int], number: int, expected: int) -> None:
    """Waits until the router knows so many tokens of a prompt to be on a server: events are on their way, on a loaded
    machine for seconds.
    """

    async def known() -> int:
        return (await router.known_tokens(Inquiry(prompt))).get(number + 1, 0)

    await until_equal(known, expected)


async def until_equal(known: Callable[[], Awaitable[int]], expected: int) -> None:
    end = time.monotonic() + PATIENCE
    while (now := await known()) != expected and time.monotonic() < end:
        await asyncio.sleep(0.005)
    assert now == expected


async def chosen(client: ClusterClient, inquiry: Inquiry) -> int:
    """The number of the server that would get the request; it is over at once."""
    ticket = await client.router.choose(inquiry, client.servers.ready())
    await ticket.begun()
    await ticket.over()
    return client.servers.all.index(ticket.server)


def test_a_prompt_goes_where_most_of_it_is_cached_and_as_dynamo_alone_would_choose(servers: Cluster) -> None:
    dice = random.Random(5)
    heads = [[dice.randrange(90) for _ in range(24)] for _ in range(9)]

    async def ask() -> None:
        alone = SelectionService(indexer_threads=1)
        for number, wire in enumerate(servers.wires):
            worker = {
                "worker_id": number + 1,
                "model_name": "x",
                "endpoint": "h:1",
                "block_size": SIZE,
                "max_num_batched_tokens": 32,
                "total_kv_blocks": 64,
            }
            await alone.upsert_worker(
                worker | {"kv_events_endpoint": wire.addresses[0], "replay_endpoint": wire.addresses[1]}
            )
        async with servers.client() as client:
            assert isinstance(client.router, KvAware)
            placed = {}
            for index, head in enumerate(heads):
                placed[index] = dice.randrange(NUM_SERVERS)
                servers.serve(placed[index], [*head, 91])
            for index, head in enumerate(heads):
                await heard(client.router, head, placed[index], servers.engines[placed[index]].found(head))

            async def known_alone(prompt: list[int], number: int) -> int:
                workers = (await alone.overlap_scores({"model_name": "x", "token_ids": prompt}))["workers"]
                return next((one["device_blocks"] * SIZE for one in workers if one["worker_id"] == number + 1), 0)

            for index, head in enumerate(heads):
                await until_equal(partial(known_alone, head, placed[index]), servers.engines[placed[index]].found(head))
            compared = 0
            for index, head in enumerate(heads):
                if not servers.engines[placed[index]].found(head):
                    continue  # evicted meanwhile
                for _ in range(3):
                    prompt = [*head, *(dice.randrange(90) for _ in range(7))]
                    choice: Any = await alone.select({"model_name": "x", "token_ids": prompt})
                    assert await chosen(client, Inquiry(prompt)) == placed[index] == choice["worker_id"] - 1
                    compared += 1
            assert compared >= 9
        alone.shutdown()

    asyncio.run(ask())


def test_a_server_that_is_gone_is_not_chosen_and_a_tenants_pages_are_its_own(servers: Cluster) -> None:
    prompt = list(range(20))

    async def ask() -> None:
        async with servers.client() as client:
            assert isinstance(client.router, KvAware)
            servers.serve(1, prompt)
            servers.serve(2, list(range(30, 50)), salt="t")
            await heard(client.router, prompt, 1, 20)
            assert await chosen(client, Inquiry(prompt)) == 1
            assert await chosen(client, Inquiry(list(range(30, 50)), cache_salt="t")) == 2
            await client.servers.lose(client.servers.all[1], ConnectionError("it is gone"))  # type: ignore[arg-type]
            assert {await chosen(client, Inquiry(prompt)) for _ in range(6)} <= {0, 2}
            client.servers.all[1].ready = True
            await client.router.update()
            await heard(client.router, prompt, 1, 20)  # what it has is told again
            assert await chosen(client, Inquiry(prompt)) == 1

    asyncio.run(ask())


def test_a_session_stays_with_its_server(servers: Cluster) -> None:
    async def ask() -> None:
        async with servers.client() as client:
            first = await chosen(client, Inquiry([1] * 9, session="s"))
            servers.serve((first + 1) % NUM_SERVERS, [2] * 21)
            assert isinstance(client.router, KvAware)
            await heard(client.router, [2] * 20, (first + 1) % NUM_SERVERS, 20)
            assert await chosen(client, Inquiry([2] * 21, session="s")) == first
            assert await chosen(client, Inquiry([2] * 21)) == (first + 1) % NUM_SERVERS

    asyncio.run(ask())


def test_while_a_server_tells_nothing_requests_go_where_the_fewest_are(
    servers: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    servers.listed["1:1"].said["kv_events"] = ""

    async def ask() -> None:
        async with servers.client() as client:
            candidates = client.servers.ready()
            tickets = [await client.router.choose(Inquiry([1, 2, 3]), candidates) for _ in range(6)]
            assert [server.num_outstanding for server in candidates] == [2, 2, 2]
            for ticket in tickets:
                await ticket.over()

    asyncio.run(ask())
    assert "1:1 tells nobody what it has cached (kv_events)" in caplog.text


def test_load_counts_too(servers: Cluster) -> None:
    """A thousand requests of one prefix do not all go to the server that has it."""

    async def ask() -> None:
        async with servers.client() as client:
            assert isinstance(client.router, KvAware)
            servers.serve(0, list(range(12)))
            await heard(client.router, list(range(12)), 0, 12)
            dice = random.Random(1)
            tickets = [
                await client.router.choose(
                    Inquiry([*range(12), *(dice.randrange(90) for _ in range(40))]), client.servers.ready()
                )
                for _ in range(60)
            ]
            counts = [server.num_outstanding for server in client.servers.all]
            assert min(counts) > 10, counts
            for ticket in tickets:
                await ticket.over()
            assert all(server.num_outstanding == 0 for server in client.servers.all)

    asyncio.run(ask())


@pytest.mark.long
def test_prompts_are_tokenised_as_the_server_does_it() -> None:
    """With the demo model's tokenizer and chat template, exported as the engine exports them."""

    async def ask() -> None:
        tokenizer = await asyncio.to_thread(GatewayTokenizer.load, "demo")
        assert tokenizer is not None
        text = await tokenizer.ids_of(question_of("Once upon a time", {}, stream=True).tensors)
        messages = await tokenizer.ids_of(
            question_of(None, {}, stream=True, messages=[{"role": "user", "content": "Hi"}]).tensors
        )
        assert text and messages and len(messages) > len(text) - 3
        assert await tokenizer.ids_of(question_of([3, 4], {}, stream=True).tensors) == [3, 4]
        assert (
            await tokenizer.ids_of(question_of("Once upon a time", {"truncate_prompt_tokens": 2}, stream=True).tensors)
            == text[-2:]
        )
        assert (
            await tokenizer.ids_of(question_of("Once upon a time", {"temperature": "x"}, stream=True).tensors) is None
        )
        assert await tokenizer.ids_of(question_of(None, {}, stream=True, messages=[{"role": 3}]).tensors) is None
        tokenizer.close()

    asyncio.run(ask())


def test_a_checkpoint_that_is_not_here_is_a_sentence(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert GatewayTokenizer.load("/none/such") is None
    assert "/none/such is not on this machine: servers are asked to tokenise" in caplog.text
