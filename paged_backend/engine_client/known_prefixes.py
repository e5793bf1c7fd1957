"""What a front end knows of the prefix caches of a model's replicas: the block hashes of all pages that each can find,
as its KV events tell (engine/kv_event_publisher.py). Begins with a question for what was missed, and asks again where a
number is missing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq

from paged_backend.messages import KV_SOCKET

_LOOK_MS = 200  # between looks whether another engine has taken one's place
_FROM_THE_BEGINNING = (0).to_bytes(8, "big")

log = logging.getLogger("paged")


class _Stored(msgspec.Struct, frozen=True, tag="BlockStored", gc=False):
    block_hashes: list[int]


class _Removed(msgspec.Struct, frozen=True, tag="BlockRemoved", gc=False):
    block_hashes: list[int]


class _Cleared(msgspec.Struct, frozen=True, tag="AllBlocksCleared", gc=False):
    pass


class _Batch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    ts: float
    events: list[_Stored | _Removed | _Cleared]


_decode = msgspec.msgpack.Decoder(_Batch).decode


class PrefixView:
    """Of one engine. For one thread, except `num_known`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
        """folder: the engine's."""
        self.folder = folder
        self._hashes: set[int] = set()
        self._last: int | None = None  # number of the newest batch that was taken; None: nothing was heard yet
        self.events, self.answers = context.socket(zmq.SUB), context.socket(zmq.DEALER)
        self.events.setsockopt(zmq.LINGER, 0)
        self.answers.setsockopt(zmq.LINGER, 0)
        self.events.set_hwm(0)
        self.answers.set_hwm(0)
        self.events.subscribe(b"")
        self.events.connect(f"ipc://{folder}/{KV_SOCKET}")
        self.answers.connect(f"ipc://{folder}/{KV_SOCKET}.replay")
        self._ask()

    def num_known(self, block_hashes: Sequence[int]) -> int:
        """How many of a prompt's first pages the engine has."""
        known = self._hashes
        return next((index for index, key in enumerate(block_hashes) if key not in known), len(block_hashes))

    def hear(self) -> None:
        """Takes what has arrived; never waits."""
        while self.answers.poll(0):
            *_, number, body = self.answers.recv_multipart()
            if body:
                self._take(int.from_bytes(number, "big"), body)
                self._asking = False
        while self.events.poll(0):
            *_, number, body = self.events.recv_multipart()
            self._hear_event(int.from_bytes(number, "big"), body)

    def close(self) -> None:
        """Nothing is known any more."""
        self._hashes = set()
        self.events.close()
        self.answers.close()

    def _hear_event(self, number: int, body: bytes) -> None:
        if self._last is not None and number == self._last + 1:
            self._take(number, body)
        elif (self._last is None or number > self._last) and not self._asking:
            self._ask()

    def _ask(self) -> None:
        """For everything: the answer begins with AllBlocksCleared."""
        self._asking = True
        self.answers.send_multipart((b"", _FROM_THE_BEGINNING))

    def _take(self, number: int, body: bytes) -> None:
        self._last = number
        for event in _decode(body).events:
            match event:
                case _Stored():
                    self._hashes.update(event.block_hashes)
                case _Removed():
                    self._hashes.difference_update(event.block_hashes)
                case _Cleared():
                    self._hashes.clear()


class KnownPrefixes:
    """Listens to all replicas, on a thread of its own."""

    def __init__(self, folders: Sequence[Callable[[], Path]]) -> None:
        """folders: of each replica's newest engine."""
        self._folders = folders
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._views = [PrefixView(self._context, folder()) for folder in folders]
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def num_known(self, block_hashes: Sequence[int]) -> list[int]:
        """For each replica, how many of a prompt's first pages it has."""
        return [view.num_known(block_hashes) for view in self._views]

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._listen()
        except Exception:  # requests go where the fewest are
            log.exception("what replicas have cached cannot be followed any more")
        for view in self._views:
            view.close()
        self._context.term()

    def _listen(self) -> None:
        poller = zmq.Poller()
        for number, folder in enumerate(self._folders):
            if self._views[number].folder != folder():  # another engine, which has cached nothing yet
                self._views[number].close()
                self._views[number] = PrefixView(self._context, folder())
            poller.register(self._views[number].events, zmq.POLLIN)
            poller.register(self._views[number].answers, zmq.POLLIN)
        poller.poll(_LOOK_MS)
        for view in self._views:
            view.hear()
