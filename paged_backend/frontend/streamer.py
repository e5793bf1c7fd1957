"""Sends answers on threads of its own, each request's pieces in order, and joins what piles up while a send is under
way.

A send is a blocking round trip to the server, and the tokens come faster than round trips when many requests run. So a
request with text to send stands in line once, and whichever sender takes it sends all its text as one response: the
slower the sending, the larger the pieces. First tokens and final pieces stand in a line of their own that goes first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from paged_backend.errors import ErrorKind, RequestError
from paged_backend.frontend.delta import Delta

NUM_SENDERS = 4  # measured with 4 front ends on 16 cores: 20,000 responses/s with one sender each, 37,000 with four

log = logging.getLogger("paged")

Send = Callable[[tuple[Delta, ...], bool], None]
"""Sends one response: at most one delta for each of the request's sequences, in order. True marks the request's last
response.
"""


# where a channel is; an Enum's members take ten times as long to look up, several times a response
_NOWHERE, _URGENT, _REGULAR, _SENDING = range(4)


class Channel:
    """One request's way out. Owned by the streamer; only it touches the fields."""

    __slots__ = ("closed", "deltas", "due", "eager", "on_end", "place", "send", "started", "stream", "waiting_since")

    def __init__(self, send: Send, on_end: Callable[[bool], None], stream: bool, eager: bool) -> None:
        self.send: Send | None = send
        self.on_end: Callable[[bool], None] | None = on_end
        self.stream = stream
        self.eager = eager
        self.deltas: list[Delta] = []  # not sent yet
        self.place = _NOWHERE
        self.due = False  # there is something among `deltas` worth a response
        self.started = False  # a response was sent
        self.closed = False  # the last delta came; later ones are ignored
        self.waiting_since = 0.0


class Streamer:
    """Sender threads and the two lines before them. Every channel gets exactly one final response."""

    def __init__(self, max_delay_seconds: float, num_senders: int = NUM_SENDERS) -> None:
        """max_delay_seconds: a continuation that waited this long takes turns with the first and last pieces that would
        go before it.
        """
        self._max_delay = max_delay_seconds
        self._lock = threading.Lock()
        self._lined_up = threading.Condition(self._lock)
        self._ended = threading.Condition(self._lock)
        self._urgent: deque[Channel] = deque()
        self._regular: deque[Channel] = deque()
        self._urgent_was_last = False
        self._collected: dict[int, list[tuple[Channel, Delta]]] = {}  # by the thread that gathers them
        self._num_open = 0
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._run, name=f"send-{number}", daemon=True) for number in range(num_senders)
        ]
        for thread in self._threads:
            thread.start()

    def open(self, send: Send, on_end: Callable[[bool], None], stream: bool, eager: bool = False) -> Channel:
        """A new request's channel.

        send: may raise; then the request ends with an error.
        on_end: called once, on the thread that sent the final response, after it; False if sending failed before.
        stream: False gathers everything for one response at the end.
        eager: a delta without text is worth a response too (the caller asked for token ids or logprobs).
        """
        with self._lock:
            self._num_open += 1
        return Channel(send, on_end, stream, eager)

    def put(self, channel: Channel, delta: Delta) -> bool:
        """Adds a piece. False if the channel had its last one already."""
        collected = self._collected.get(threading.get_ident())
        if collected is None:
            return self._put_now(channel, [delta])
        collected.append((channel, delta))
        if delta.finish_reason is not None and not delta.last:
            # another sequence of the request goes on, perhaps on another thread, whose end must not come before this
            mine = [piece for other, piece in collected if other is channel]
            collected[:] = [entry for entry in collected if entry[0] is not channel]
            return self._put_now(channel, mine)
        return not channel.closed

    def _put_now(self, channel: Channel, deltas: list[Delta]) -> bool:
        with self._lock:
            if channel.closed:
                return False
            now = time.monotonic()
            self._lined_up.notify(sum([self._add(channel, delta, now) for delta in deltas]))
        return True

    @contextmanager
    def together(self) -> Iterator[None]:
        """What this thread puts meanwhile is lined up at the end, at once: the pieces of a step of hundreds of streams
        wake the senders one time, who would otherwise fight with this thread for the interpreter at each of them. Only
        the end of one sequence among several is not kept back. A request's first piece that comes alone, with nothing
        in line, is sent by this thread: to wake another would take longer. Its later pieces are not: they join while
        one is sent.
        """
        thread = threading.get_ident()
        collected: list[tuple[Channel, Delta]] = []
        self._collected[thread] = collected
        try:
            yield
        finally:
            del self._collected[thread]
            with self._lock:
                now = time.monotonic()
                entered = [self._add(channel, delta, now) for channel, delta in collected if not channel.closed]
                first = self._take_lone_first(entered)
                if first is None:
                    self._lined_up.notify(sum(entered))
            if first is not None:
                self._send_first(*first)

    def _take_lone_first(self, entered: list[bool]) -> tuple[Channel, list[Delta], bool] | None:
        """What a thread that has just lined something up is to send itself; None: senders are to."""
        if entered != [True] or self._regular or len(self._urgent) != 1 or self._urgent[0].started:
            return None
        channel = self._take()
        assert channel is not None
        return channel, *self._unload(channel)

    def _send_first(self, channel: Channel, deltas: list[Delta], final: bool) -> None:
        """On a thread that is no sender: what comes meanwhile is for them."""
        sent = self._send(channel, deltas, final)
        with self._lock:
            over = self._put_down(channel, final or not sent)
            if not over and channel.due:
                self._line_up(channel, time.monotonic())
                self._lined_up.notify()
        if over:
            self._end(channel, sent)

    def wait_until_all_ended(self, seconds: float) -> bool:
        """True if every channel had its final response within `seconds`."""
        with self._lock:
            return self._ended.wait_for(lambda: self._num_open == 0, seconds)

    def close(self) -> None:
        """Sends what is in line, then stops the threads."""
        with self._lock:
            self._stopping = True
            self._lined_up.notify_all()
        for thread in self._threads:
            thread.join()

    def _add(self, channel: Channel, delta: Delta, now: float) -> bool:
        """True if a sender has one more channel to serve."""
        channel.deltas.append(delta)
        channel.closed = delta.last
        if delta.last or (channel.stream and (delta.text or delta.finish_reason is not None or channel.eager)):
            channel.due = True
            return self._line_up(channel, now)
        return False

    def _line_up(self, channel: Channel, now: float) -> bool:
        """Puts a channel with something due in the line where it belongs; one that is being sent comes back by itself.
        True if it stood in none.
        """
        urgent = channel.closed or not channel.started
        if channel.place == _NOWHERE:
            channel.waiting_since = now
            channel.place = _URGENT if urgent else _REGULAR
            (self._urgent if urgent else self._regular).append(channel)
            return True
        if channel.place == _REGULAR and urgent:
            channel.place = _URGENT  # its entry in the other line is skipped
            self._urgent.append(channel)
        return False

    def _run(self) -> None:
        while self._send_some():
            pass

    def _send_some(self) -> bool:
        """Waits, then sends until nothing is in line or a request has ended. A frame of its own, so that an idle sender
        holds on to no request. False when there is nothing left to do.
        """
        with self._lock:
            while (channel := self._take()) is None:
                if self._stopping:
                    return False
                self._lined_up.wait()
            deltas, final = self._unload(channel)
        while True:
            sent = self._send(channel, deltas, final)
            with self._lock:
                if self._put_down(channel, final or not sent):
                    break
                if channel.due:
                    self._line_up(channel, time.monotonic())
                following = self._take()
                if following is None:
                    return True
                channel = following
                deltas, final = self._unload(channel)
        self._end(channel, sent)
        return True

    def _put_down(self, channel: Channel, over: bool) -> bool:
        """A response of it was sent, the last one if it is over, which is returned."""
        channel.started = True
        channel.place = _NOWHERE
        channel.closed = channel.closed or over
        return over

    def _unload(self, channel: Channel) -> tuple[list[Delta], bool]:
        """What is to be sent of it now, and whether that is the last."""
        deltas, channel.deltas = channel.deltas, []
        channel.due = False
        return deltas, channel.closed

    def _take(self) -> Channel | None:
        """The channel whose turn it is; None if both lines are empty."""
        while self._regular and self._regular[0].place != _REGULAR:
            self._regular.popleft()
        if not self._urgent and not self._regular:
            return None
        take_urgent = bool(self._urgent) and not (self._urgent_was_last and self._regular_is_late())
        self._urgent_was_last = take_urgent
        channel = (self._urgent if take_urgent else self._regular).popleft()
        channel.place = _SENDING
        return channel

    def _regular_is_late(self) -> bool:
        return bool(self._regular) and time.monotonic() - self._regular[0].waiting_since > self._max_delay

    def _send(self, channel: Channel, deltas: list[Delta], final: bool) -> bool:
        """False if the channel's send raised."""
        assert channel.send is not None
        error = deltas[-1].error
        try:
            if error is None:
                channel.send(by_sequence(deltas), final)
                return True
            if len(deltas) > 1 and channel.stream and error.kind is not ErrorKind.CANCELLED:
                channel.send(by_sequence(deltas[:-1]), False)  # an error's response carries no text
            channel.send((deltas[-1],), final)
            return True
        except Exception:  # whatever the server's library raises
            log.exception("a response could not be sent")
        return self._give_up(channel)

    def _give_up(self, channel: Channel) -> bool:
        """The request has had no final response yet, and without one the server waits for ever."""
        assert channel.send is not None
        try:
            channel.send(
                (Delta(error=RequestError("the response could not be sent", ErrorKind.INTERNAL), last=True),), True
            )
        except Exception:
            log.exception("a final response could not be sent")
        return False

    def _end(self, channel: Channel, sent: bool) -> None:
        """Drops every reference to the caller's response sender: the server unloads the model only when they are
        gone.
        """
        on_end, channel.on_end, channel.send = channel.on_end, None, None
        channel.deltas.clear()
        assert on_end is not None
        try:
            on_end(sent)
        except Exception:
            log.exception("a request's end could not be recorded")
        with self._lock:
            self._num_open -= 1
            self._ended.notify_all()


def by_sequence(deltas: list[Delta]) -> tuple[Delta, ...]:
    """The pieces of each sequence joined, in the order of the sequences."""
    if len(deltas) == 1:
        return (deltas[0],)
    first = deltas[0].index
    if all(delta.index == first for delta in deltas):
        return (joined(deltas),)
    pieces: dict[int, list[Delta]] = {}
    for delta in deltas:
        pieces.setdefault(delta.index, []).append(delta)
    return tuple([joined(pieces[index]) for index in sorted(pieces)])


def joined(deltas: list[Delta]) -> Delta:
    """Consecutive pieces of one sequence as one piece. At least one is given."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    return Delta(
        index=last.index,
        text="".join([delta.text for delta in deltas]),
        token_ids=tuple([token_id for delta in deltas for token_id in delta.token_ids]),
        logprobs=tuple([logprob for delta in deltas for logprob in delta.logprobs]),
        cumulative_logprob=last.cumulative_logprob,
        prompt=next((delta.prompt for delta in deltas if delta.prompt is not None), None),
        num_input_tokens=last.num_input_tokens,
        num_cached_tokens=last.num_cached_tokens,
        finish_reason=last.finish_reason,
        error=last.error,
        last=last.last,
    )
