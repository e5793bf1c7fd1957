"""Several servers as one: who is asked, who is taken out, and answers that go on elsewhere with the same text. The
servers here are scripts.
"""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("starlette")

from paged_client import Answer, InvalidRequestError, UnavailableError, UnreachableError
from paged_client.cluster import resuming, servers
from paged_client.cluster.resuming import SEED_STEP
from tests.fake_servers import PROMPT, Fake, cluster, solo, streamed, text_of, two


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
