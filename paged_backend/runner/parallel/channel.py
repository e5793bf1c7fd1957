"""From rank 0 to another rank: numbered messages through a pair of sockets that no other process can open."""

from __future__ import annotations

import socket
import struct

from paged_backend.errors import EngineError

_HEADER = struct.Struct("<QQ")  # number of the message, length in bytes


class Sender:
    """Rank 0's end. A rank that does not read holds it up once the sockets' buffers are full: it is then behind by many
    steps.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._number = 0

    def send(self, message: bytes) -> None:
        """
        Raises:
            OSError: the other rank has gone.
        """
        self._end.sendall(_HEADER.pack(self._number, len(message)))
        self._end.sendall(message)
        self._number += 1

    def close(self) -> None:
        self._end.close()


class Receiver:
    """The other rank's end."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._number = 0

    def receive(self) -> bytes | None:
        """Waits for the next message. None: rank 0 has gone.

        Raises:
            EngineError: a message is missing.
        """
        header = self._read(_HEADER.size)
        if header is None:
            return None
        number, length = _HEADER.unpack(header)
        if number != self._number:
            raise EngineError(f"message {number} of rank 0 came where {self._number} was due")
        self._number += 1
        return self._read(length)

    def _read(self, length: int) -> bytes | None:
        parts = bytearray(length)
        view = memoryview(parts)
        while view:
            count = self._end.recv_into(view)
            if count == 0:
                return None
            view = view[count:]
        return bytes(parts)
