"""Nothing lost, nothing twice, nothing out of order, exactly one final response: whatever the senders do."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_backend.errors import ErrorKind, RequestError
from paged_backend.frontend.delta import Delta
from paged_backend.frontend.streamer import Channel, Send, Streamer, by_sequence, joined


class Client:
    """Records what one request is sent."""

    def __init__(self, delay: float = 0.0, fails_at: int | None = None) -> None:
        self.sent: list[tuple[Delta, bool]] = []
        self.ends: list[bool] = []
        self.ended = threading.Event()
        self._delay = delay
        self._fails_at = fails_at
        self._busy = threading.Lock()

    def send(self, deltas: tuple[Delta, ...], final: bool) -> None:
        (delta,) = deltas
        assert self._busy.acquire(blocking=False), "two senders at once"
        time.sleep(self._delay)
        self.sent.append((delta, final))
        self._busy.release()
        if self._fails_at is not None and len(self.sent) > self._fails_at:
            raise RuntimeError("the client is gone")

    def on_end(self, sent: bool) -> None:
        self.ends.append(sent)
        self.ended.set()

    @property
    def text(self) -> str:
        return "".join(delta.text for delta, _ in self.sent)

    @property
    def finals(self) -> list[bool]:
        return [final for _, final in self.sent]


@pytest.fixture
def streamer() -> Iterator[Streamer]:
    with closing(Streamer(max_delay_seconds=0.05)) as streamer:
        yield streamer


def _open(streamer: Streamer, client: Client, stream: bool = True, eager: bool = False) -> Channel:
    return streamer.open(client.send, client.on_end, stream, eager)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    delay=st.sampled_from([0.0, 0.0005]),
    num_senders=st.integers(1, 6),
)
def test_every_request_gets_its_pieces_once_in_order_and_one_final(
    lengths: list[int], delay: float, num_senders: int
) -> None:
    clients = [Client(delay) for _ in lengths]
    with closing(Streamer(0.001, num_senders)) as streamer:
        channels = [_open(streamer, client) for client in clients]
        for piece in range(max(lengths)):
            for channel, length in zip(channels, lengths, strict=True):
                if piece < length:
                    last = piece == length - 1
                    streamer.put(
                        channel,
                        Delta(text=f"{piece} ", token_ids=(piece,), finish_reason="stop" if last else None, last=last),
                    )
        assert streamer.wait_until_all_ended(10)
    for client, length in zip(clients, lengths, strict=True):
        assert client.text == "".join(f"{piece} " for piece in range(length))
        assert [token for delta, _ in client.sent for token in delta.token_ids] == list(range(length))
        assert client.finals == [False] * (len(client.sent) - 1) + [True]
        assert client.ends == [True]


def test_pieces_that_wait_for_a_busy_sender_become_one_response(streamer: Streamer) -> None:
    client = Client()
    started, go_on = threading.Event(), threading.Event()
    channel = streamer.open(_slowed(client.send, started, go_on), client.on_end, stream=True)
    streamer.put(channel, Delta(text="0"))
    assert started.wait(5)
    for piece in range(1, 10):
        streamer.put(channel, Delta(text=str(piece), finish_reason="length" if piece == 9 else None, last=piece == 9))
    go_on.set()
    assert client.ended.wait(5)
    assert [delta.text for delta, _ in client.sent] == ["0", "123456789"]


def test_an_unstreamed_answer_is_one_response(streamer: Streamer) -> None:
    client = Client()
    channel = _open(streamer, client, stream=False)
    for piece in range(10):
        streamer.put(channel, Delta(text=str(piece), token_ids=(piece,)))
        time.sleep(0.001)
    streamer.put(channel, Delta(text=".", finish_reason="stop", last=True))
    assert client.ended.wait(5)
    (response,) = client.sent
    assert response == (Delta(text="0123456789.", token_ids=tuple(range(10)), finish_reason="stop", last=True), True)


@pytest.mark.parametrize("eager", [False, True], ids=["text-only", "eager"])
def test_a_piece_without_text_is_worth_a_response_only_if_its_tokens_are_wanted(
    streamer: Streamer, eager: bool
) -> None:
    client = Client()
    channel = _open(streamer, client, eager=eager)
    streamer.put(channel, Delta(token_ids=(1,)))
    time.sleep(0.05)
    assert len(client.sent) == eager
    streamer.put(channel, Delta(token_ids=(2,), text="x", finish_reason="stop", last=True))
    assert client.ended.wait(5)
    assert [token for delta, _ in client.sent for token in delta.token_ids] == [1, 2]


def _block(streamer: Streamer, started: threading.Event, go_on: threading.Event) -> Client:
    """Occupies the only sender until `go_on`."""
    client = Client()

    def send(delta: Delta, final: bool) -> None:
        started.set()
        assert go_on.wait(5)
        client.send(delta, final)

    channel = streamer.open(send, client.on_end, stream=True)
    streamer.put(channel, Delta(text="x", finish_reason="stop", last=True))
    return client


def test_first_tokens_and_finals_overtake_continuations() -> None:
    order: list[str] = []
    started, go_on = threading.Event(), threading.Event()

    def client(name: str) -> Send:
        return lambda deltas, final: order.append(f"{name} {deltas[0].text}")

    with closing(Streamer(max_delay_seconds=10, num_senders=1)) as streamer:
        running = [streamer.open(client(f"running{number}"), lambda _: None, stream=True) for number in range(3)]
        for channel in running:
            streamer.put(channel, Delta(text="first"))
        time.sleep(0.05)
        _block(streamer, started, go_on)
        assert started.wait(5)
        for channel in running:
            streamer.put(channel, Delta(text="more"))
        new = streamer.open(client("new"), lambda _: None, stream=True)
        streamer.put(new, Delta(text="first"))
        streamer.put(running[2], Delta(text=" and last", finish_reason="stop", last=True))
        go_on.set()
        time.sleep(0.05)
        for channel in (*running[:2], new):
            streamer.put(channel, Delta(text="last", finish_reason="stop", last=True))
        assert streamer.wait_until_all_ended(5)
    assert order[3:7] == ["new first", "running2 more and last", "running0 more", "running1 more"]


def test_a_continuation_that_waited_too_long_takes_turns_with_first_tokens() -> None:
    order: list[str] = []
    started, go_on = threading.Event(), threading.Event()
    with closing(Streamer(max_delay_seconds=0.01, num_senders=1)) as streamer:
        old = streamer.open(lambda delta, final: order.append("old"), lambda _: None, stream=True)
        streamer.put(old, Delta(text="first"))
        time.sleep(0.05)
        order.clear()
        _block(streamer, started, go_on)
        assert started.wait(5)
        streamer.put(old, Delta(text="more"))
        for _ in range(5):
            new = streamer.open(lambda delta, final: order.append("new"), lambda _: None, stream=True)
            streamer.put(new, Delta(text="only", finish_reason="stop", last=True))
        time.sleep(0.05)
        go_on.set()
        time.sleep(0.05)
        streamer.put(old, Delta(finish_reason="stop", last=True))
        assert streamer.wait_until_all_ended(5)
    assert order.index("old") <= 1


def test_an_error_is_sent_after_the_text_before_it(streamer: Streamer) -> None:
    client = Client()
    error = RequestError("the engine stopped", ErrorKind.OVERLOADED)
    started, go_on = threading.Event(), threading.Event()
    channel = streamer.open(_slowed(client.send, started, go_on), client.on_end, stream=True)
    streamer.put(channel, Delta(text="a"))
    assert started.wait(5)
    streamer.put(channel, Delta(text="b"))
    streamer.put(channel, Delta(error=error, last=True))
    go_on.set()
    assert client.ended.wait(5)
    assert [(delta.text, final) for delta, final in client.sent[:2]] == [("a", False), ("b", False)]
    assert client.sent[2][0].error is error
    assert client.finals == [False, False, True]


def _slowed(
    send: Callable[[Delta, bool], None], started: threading.Event, go_on: threading.Event
) -> Callable[[Delta, bool], None]:
    def slowed(delta: Delta, final: bool) -> None:
        started.set()
        assert go_on.wait(5)
        send(delta, final)

    return slowed


def test_after_the_last_piece_nothing_more_is_taken(streamer: Streamer) -> None:
    client = Client()
    channel = _open(streamer, client)
    assert streamer.put(channel, Delta(text="a", finish_reason="stop", last=True))
    assert not streamer.put(channel, Delta(error=RequestError("cancelled", ErrorKind.CANCELLED), last=True))
    assert client.ended.wait(5)
    assert client.finals == [True]


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_failing_send_ends_the_request_with_one_more_final_attempt(streamer: Streamer, fails_at: int) -> None:
    client = Client(fails_at=fails_at)
    channel = _open(streamer, client)
    for piece in range(20):
        streamer.put(channel, Delta(text=str(piece)))
        time.sleep(0.002)
    assert client.ended.wait(5)
    assert client.ends == [False]
    assert len(client.sent) == fails_at + 2
    assert client.sent[-1][1] is True
    assert client.sent[-1][0].error is not None
    assert not streamer.put(channel, Delta(text="more"))


def test_other_requests_go_on_when_one_clients_send_fails(streamer: Streamer) -> None:
    clients = [Client(fails_at=1 if number % 2 else None) for number in range(10)]
    channels = [_open(streamer, client) for client in clients]
    for piece in range(10):
        for channel in channels:
            streamer.put(channel, Delta(text=f"{piece}", finish_reason="stop" if piece == 9 else None, last=piece == 9))
            time.sleep(0.0005)
    assert streamer.wait_until_all_ended(5)
    assert all(client.text == "0123456789" for client in clients[::2])


def test_no_reference_to_the_response_sender_is_left_after_the_final_response(streamer: Streamer) -> None:
    class ResponseSender:
        def send(self, delta: Delta, final: bool) -> None:
            pass

    ended = threading.Event()
    sender = ResponseSender()
    gone = weakref.ref(sender)
    channel = streamer.open(sender.send, lambda _: ended.set(), stream=True)
    del sender
    streamer.put(channel, Delta(text="a", finish_reason="stop", last=True))
    assert ended.wait(5)
    assert streamer.wait_until_all_ended(5)
    time.sleep(0.05)
    assert gone() is None


def test_close_sends_what_is_in_line() -> None:
    client = Client(delay=0.01)
    streamer = Streamer(0.05, num_senders=1)
    channels = [_open(streamer, client) for _ in range(1)]
    for channel in channels:
        streamer.put(channel, Delta(text="a"))
        streamer.put(channel, Delta(text="b", finish_reason="stop", last=True))
    streamer.close()
    assert client.text == "ab"
    assert client.finals[-1] is True


def test_joined_pieces_keep_every_token_and_the_last_totals() -> None:
    first = Delta(
        text="a",
        token_ids=(1,),
        logprobs=({1: -1.0},),
        cumulative_logprob=-1.0,
        num_input_tokens=7,
        num_cached_tokens=3,
    )
    second = Delta(
        text="b",
        token_ids=(2, 3),
        logprobs=({2: -2.0}, {3: -0.5}),
        cumulative_logprob=-3.5,
        num_input_tokens=7,
        num_cached_tokens=3,
        finish_reason="stop",
    )
    assert joined([first, second]) == Delta(
        text="ab",
        token_ids=(1, 2, 3),
        logprobs=({1: -1.0}, {2: -2.0}, {3: -0.5}),
        cumulative_logprob=-3.5,
        num_input_tokens=7,
        num_cached_tokens=3,
        finish_reason="stop",
    )


def test_pieces_of_several_sequences_go_in_one_response_each_joined(streamer: Streamer) -> None:
    sent: list[tuple[tuple[Delta, ...], bool]] = []
    gate = threading.Event()

    def send(deltas: tuple[Delta, ...], final: bool) -> None:
        sent.append((deltas, final))
        gate.wait(5)

    channel = streamer.open(send, lambda _: None, stream=True)
    streamer.put(channel, Delta(index=1, text="b"))
    while not sent:
        time.sleep(0.001)
    for index, text in ((2, "x"), (0, "a"), (2, "y"), (1, "c")):
        streamer.put(channel, Delta(index=index, text=text))
    streamer.put(channel, Delta(index=0, finish_reason="stop"))
    gate.set()
    time.sleep(0.05)
    assert not sent[1][1], "a sequence's end is not the request's"
    streamer.put(channel, Delta(index=2, finish_reason="length", last=True))
    assert streamer.wait_until_all_ended(5)
    texts = [[(delta.index, delta.text, delta.finish_reason) for delta in deltas] for deltas, _ in sent]
    assert texts == [[(1, "b", None)], [(0, "a", "stop"), (1, "c", None), (2, "xy", None)], [(2, "", "length")]]
    assert [final for _, final in sent] == [False, False, True]


def test_one_sequences_pieces_are_one_delta() -> None:
    assert by_sequence([Delta(index=3, text="a"), Delta(index=3, text="b", last=True)]) == (
        Delta(index=3, text="ab", last=True),
    )


def test_the_last_end_of_a_request_does_not_overtake_another_sequences_end_on_another_thread(
    streamer: Streamer,
) -> None:
    """Of n answers, each in an engine of its own, whose messages come on threads of their own."""
    sent: list[Delta] = []
    channel = streamer.open(lambda deltas, final: sent.extend(deltas), lambda sent: None, stream=True)

    def other() -> None:
        with streamer.together():
            streamer.put(channel, Delta(index=1, text="c", finish_reason="stop", last=True))

    with streamer.together():
        streamer.put(channel, Delta(index=0, text="a"))
        streamer.put(channel, Delta(index=0, text="b", finish_reason="stop"))
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert streamer.wait_until_all_ended(5)
    texts = ["".join(delta.text for delta in sent if delta.index == index) for index in (0, 1)]
    assert texts == ["ab", "c"] and [delta.last for delta in sent].count(True) == 1
