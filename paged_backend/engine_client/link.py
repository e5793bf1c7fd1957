"""A front end's sockets to one engine process. When that process dies they are thrown away: nothing it said late can be
mistaken for its successor's.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import msgspec
import zmq

from paged_backend.errors import EngineError
from paged_backend.messages import ENGINE_SOCKET, FromEngine, Hello, ToEngine, decode_from_engine, encode
from paged_backend.process_id import ProcessId

_WAIT_MS = 100

log = logging.getLogger("paged")


class EngineLink:
    """`send` may be called on any thread; `next_message` on one."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path, front_end: int) -> None:
        """folder: the engine's; says hello at once, which the engine hears when it has loaded.

        Raises:
            EngineError: there can be no socket in that folder.
        """
        self._lock = threading.Lock()
        self._open = True
        self._inbox = context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.rcvtimeo = _WAIT_MS  # a poll before each message took two thirds of the time of reading it
        self._outbox = context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        address = f"ipc://{folder}/front_end_{front_end}.sock"
        try:
            self._inbox.bind(address)
            self._outbox.connect(f"ipc://{folder}/{ENGINE_SOCKET}")
            self.send(Hello(front_end, address, ProcessId.of(os.getpid())))
        except zmq.ZMQError as error:
            self.close()  # the context's end would wait for an open socket for ever
            raise EngineError(f"no socket can be opened in '{folder}': {error.strerror}") from None

    def send(self, message: ToEngine) -> None:
        """Never waits. No effect once closed."""
        with self._lock:
            if self._open:
                self._outbox.send(encode(message))

    def next_message(self, wait: bool = True) -> FromEngine | None:
        """None if nothing came for a while, or nothing that an engine says: any process of this user can write into the
        socket. wait: False looks at what is there already.
        """
        try:
            received = self._inbox.recv(0 if wait else zmq.NOBLOCK)
        except zmq.Again:
            return None
        try:
            message: FromEngine = decode_from_engine(received)
        except msgspec.DecodeError as error:
            log.warning("%d bytes that are no message of an engine are dropped: %s", len(received), error)
            return None
        return message

    def close(self, linger_ms: int = 0) -> None:
        """linger_ms: how long what was sent may still take to leave."""
        with self._lock:
            self._open = False
            self._outbox.close(linger=linger_ms)
        self._inbox.close(linger=0)
