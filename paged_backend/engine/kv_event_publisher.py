"""Puts KV events (kv_events.py) on the wire, from a thread of its own: a PUB socket, and a ROUTER socket that tells
late comers what they missed.

PUB: three frames: topic (empty), sequence number (8 bytes, big-endian), msgpack of [seconds since 1970, events,
data-parallel rank].
ROUTER: a subscriber asks with an empty frame and the sequence number from which on it wants to hear; it gets the
batches from there, in the frames of PUB, and at the end one whose number is -1 and whose body is empty. Batches that
are no longer kept are told as one: AllBlocksCleared and every page that is findable now, under the number of the
newest. So a router that starts late, or lost touch, knows everything all the same. It need not wait for the next
event: a new subscriber is sent an empty batch, whose number shows it the gap.

Numbers rise from engine to engine (the first is the time in nanoseconds): a subscriber takes a restart for a gap, asks,
and hears AllBlocksCleared.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque

import msgspec
import zmq

from paged_backend.engine.findable_pages import AllBlocksCleared, Event, FindablePages
from paged_backend.errors import EngineError
from paged_backend.scheduler.kv_events import Note

_TOPIC = b""
_END = (-1).to_bytes(8, "big", signed=True)
_KEPT_BATCHES = 4096
_UNSENT = 100_000  # batches kept for a subscriber that does not keep up, as vLLM's; it asks for those it lost
_RANK = 0
_BELL = "inproc://kv-events"

log = logging.getLogger("paged")


class EventBatch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A step's events on the wire."""

    ts: float
    events: list[Event]
    data_parallel_rank: int = _RANK


_encode = msgspec.msgpack.Encoder().encode


class KvEventPublisher:
    """Owns the sockets and the thread. `send` never waits."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, replay_address: str, page_size: int
    ) -> None:
        """
        Raises:
            EngineError: an address cannot be had.
        """
        self._publishing = _bound(context, zmq.XPUB, address)  # a PUB socket that tells of subscribers
        self._publishing.setsockopt(zmq.XPUB_VERBOSE, 1)  # of every one
        self._replaying = _bound(context, zmq.ROUTER, replay_address)
        self._steps: deque[list[Note]] = deque()  # on their way to the thread
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=_KEPT_BATCHES)
        self._pages = FindablePages(page_size)
        self._number = time.time_ns()
        self._bell = context.socket(zmq.PUSH)
        self._bell.bind(_BELL)
        ears = context.socket(zmq.PULL)
        ears.connect(_BELL)
        self._thread = threading.Thread(target=self._run, args=(ears,), name="kv-events", daemon=True)
        self._thread.start()

    def send(self, notes: list[Note]) -> None:
        """A step's, from the engine's thread."""
        self._steps.append(notes)
        with contextlib.suppress(zmq.Again):  # then it rings already
            self._bell.send(b"", zmq.NOBLOCK)

    def close(self) -> None:
        """Ends the thread when it has sent everything."""
        self._bell.send(b"end")
        self._thread.join()
        self._bell.close(linger=0)

    # ---- the thread

    def _run(self, ears: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(ears, zmq.POLLIN)
        poller.register(self._publishing, zmq.POLLIN)
        poller.register(self._replaying, zmq.POLLIN)
        ended = False
        self._publish([AllBlocksCleared()])
        while not ended:
            ready = dict(poller.poll())
            try:
                while ears.poll(0):
                    ended |= ears.recv() == b"end"
                while self._steps:
                    events = self._pages.take(self._steps.popleft())
                    if events:
                        self._publish(events)
                if self._publishing in ready and self._publishing.recv()[:1] == b"\x01":
                    self._publish([])
                if self._replaying in ready:
                    self._replay(self._replaying.recv_multipart())
            except Exception:  # routers hear less; requests are answered all the same
                log.exception("KV events could not be published")
        for socket in (ears, self._publishing, self._replaying):
            socket.close(linger=0)

    def _publish(self, events: list[Event]) -> None:
        self._number += 1
        body = _encode(EventBatch(time.time(), events))
        self._kept.append((self._number, body))
        self._publishing.send_multipart((_TOPIC, self._number.to_bytes(8, "big"), body))

    def _replay(self, question: list[bytes]) -> None:
        asker, *frames = question
        if not frames or len(frames[-1]) != 8:
            log.warning("KV events: a question for missed batches is not understood: %d frames", len(question))
            return
        first = int.from_bytes(frames[-1], "big")
        if self._kept and self._kept[0][0] <= first:
            missed = [(number, body) for number, body in self._kept if number >= first]
        else:
            missed = [(self._number, _encode(EventBatch(time.time(), self._pages.reported())))]
        for number, body in missed:
            self._replaying.send_multipart((asker, b"", _TOPIC, number.to_bytes(8, "big"), body))
        self._replaying.send_multipart((asker, b"", _TOPIC, _END, b""))


def _bound(context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(_UNSENT)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close()
        raise EngineError(f"kv_events: {address} cannot be used: {error.strerror}") from None
    return socket
