"""A request's first piece that comes alone is sent by the thread that brings it, and nothing else is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from paged_backend.frontend.delta import Delta
from paged_backend.frontend.streamer import Channel, Streamer
from tests.unit.frontend.test_streamer import Client, _block, _open, _slowed


@pytest.fixture
def streamer() -> Iterator[Streamer]:
    with closing(Streamer(max_delay_seconds=0.05)) as streamer:
        yield streamer


def _on_threads(streamer: Streamer, client: Client) -> tuple[Channel, list[str]]:
    """A channel, and the names of the threads that send its responses."""
    names: list[str] = []

    def send(deltas: tuple[Delta, ...], final: bool) -> None:
        names.append(threading.current_thread().name)
        client.send(deltas, final)

    return streamer.open(send, client.on_end, stream=True), names


def test_a_first_piece_that_comes_alone_is_sent_by_the_thread_that_brings_it_and_later_ones_are_not(
    streamer: Streamer,
) -> None:
    client, mine = Client(), threading.current_thread().name
    channel, names = _on_threads(streamer, client)
    with streamer.together():
        streamer.put(channel, Delta(text="a"))
        assert not names, "it waits for what else the message brings"
    assert names == [mine]
    for text in "bc":
        with streamer.together():
            streamer.put(channel, Delta(text=text, finish_reason="stop" if text == "c" else None, last=text == "c"))
    assert client.ended.wait(5)
    assert client.text == "abc"
    assert client.finals[-1] and sum(client.finals) == 1
    assert names[0] == mine and all(name.startswith("send-") for name in names[1:])


def test_an_answer_of_one_piece_ends_once_on_the_thread_that_brings_it(streamer: Streamer) -> None:
    client = Client()
    channel, names = _on_threads(streamer, client)
    with streamer.together():
        streamer.put(channel, Delta(text="a", finish_reason="stop", last=True))
    assert (names, client.finals, client.ends) == ([threading.current_thread().name], [True], [True])
    assert streamer.wait_until_all_ended(0)


def test_first_pieces_of_several_requests_are_for_the_senders(streamer: Streamer) -> None:
    clients = [Client(), Client()]
    opened = [_on_threads(streamer, client) for client in clients]
    with streamer.together():
        for channel, _ in opened:
            streamer.put(channel, Delta(text="a", finish_reason="stop", last=True))
    for client, (_, names) in zip(clients, opened, strict=True):
        assert client.ended.wait(5)
        assert all(name.startswith("send-") for name in names)


def test_a_first_piece_does_not_go_before_what_stands_in_line() -> None:
    started, go_on = threading.Event(), threading.Event()
    with closing(Streamer(0.05, num_senders=1)) as streamer:
        _block(streamer, started, go_on)
        waiting, client = Client(), Client()
        streamer.put(_open(streamer, waiting), Delta(text="b", finish_reason="stop", last=True))
        channel, names = _on_threads(streamer, client)
        with streamer.together():
            streamer.put(channel, Delta(text="a", finish_reason="stop", last=True))
        assert not names
        go_on.set()
        assert client.ended.wait(5)
        assert names == ["send-0"]


@pytest.mark.parametrize("last", [False, True], ids=["goes-on", "ends"])
def test_what_comes_while_another_thread_sends_the_first_piece_follows_it(streamer: Streamer, last: bool) -> None:
    client = Client()
    started, go_on = threading.Event(), threading.Event()
    channel = streamer.open(_slowed(client.send, started, go_on), client.on_end, stream=True)

    def bring() -> None:
        with streamer.together():
            streamer.put(channel, Delta(text="a"))

    bringing = threading.Thread(target=bring)
    bringing.start()
    assert started.wait(5)
    streamer.put(channel, Delta(text="b", finish_reason="stop" if last else None, last=last))
    go_on.set()
    bringing.join(5)
    if not last:
        streamer.put(channel, Delta(text="c", finish_reason="stop", last=True))
    assert client.ended.wait(5)
    assert client.text == ("ab" if last else "abc")
    assert client.finals[-1] and sum(client.finals) == 1


def test_a_first_piece_that_cannot_be_sent_ends_the_request(streamer: Streamer) -> None:
    client = Client(fails_at=0)
    channel = _open(streamer, client)
    with streamer.together():
        streamer.put(channel, Delta(text="a"))
    assert client.ends == [False]
    assert not streamer.put(channel, Delta(text="b"))
