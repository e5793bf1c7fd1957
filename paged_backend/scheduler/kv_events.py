"""Gathers what changes in the prefix cache, for routers that send a prompt where most of it is known already.

This is the engine's side: it notes which pages became findable and which were forgotten, and lets a step's notes go
once the step is committed. What routers are told of them is `findable_pages.py`, how it gets on the wire
`kv_event_publisher.py`. Nothing of it exists unless the option `kv_events` asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Listing

import msgspec
import numpy as np
from numpy.typing import NDArray


class Stored(msgspec.Struct, frozen=True, gc=False):
    """Pages that can be found from now on, each the successor of the one before."""

    hashes: list[bytes]
    parent: bytes | None  # hash of the page before the first; None: it begins a prompt
    token_ids: bytes  # int32 [len(hashes) * page_size]
    lora_name: str | None
    cache_salt: str  # the caller's


class Forgotten(msgspec.Struct, frozen=True, gc=False):
    """Pages that cannot be found any more."""

    hashes: list[bytes]


Note = Stored | Forgotten


class KvEvents:
    """A step's notes. They are held back until the step has been committed: before that, a page's K and V may still be
    on their way.

    Lives on the engine's thread.
    """

    def __init__(self, page_size: int, send: Callable[[list[Note]], None]) -> None:
        """send: takes the notes of one step, at least one; must not wait."""
        self._page_size = page_size
        self._send = send
        self._noted: list[Note] = []
        # (number of the last step that had been launched, what was noted by then)
        self._held: deque[tuple[int, list[Note]]] = deque()

    def store(
        self,
        hashes: Listing[bytes],
        token_ids: NDArray[np.int32],
        indices: Listing[int],
        root: str,
        lora_name: str | None,
    ) -> None:
        """Notes that pages of a sequence are findable now.

        hashes, token_ids: of the sequence, from its first page and token on. indices: of the pages, ascending. root:
        what its first page's hash follows (`PageTable.salt`).
        """
        salt, size = _salt_of(root), self._page_size
        if salt is None:
            return
        for first, end in _runs(indices):
            parent = hashes[first - 1] if first else None
            self._noted.append(
                Stored(list(hashes[first:end]), parent, token_ids[first * size : end * size].tobytes(), lora_name, salt)
            )

    def forget(self, page_hash: bytes) -> None:
        """Notes that a page is about to lose its content."""
        last = self._noted[-1] if self._noted else None
        if isinstance(last, Forgotten):
            last.hashes.append(page_hash)
        else:
            self._noted.append(Forgotten([page_hash]))

    def release(self, num_launched: int, num_committed: int) -> None:
        """Sends what no step in flight has still to make true. Counts are of steps since the start."""
        if self._noted:
            self._held.append((num_launched, self._noted))
            self._noted = []
        notes: list[Note] = []
        while self._held and self._held[0][0] <= num_committed:
            notes += self._held.popleft()[1]
        if notes:
            self._send(notes)


def _salt_of(root: str) -> str | None:
    """The caller's cache_salt; None: the sequence shares its pages with none but its own family, and no router can send
    another there.

    root: "salt X" or "family X" (intake.py), behind the adapter's version and name if there is one (adapters.py).
    """
    if root.startswith("adapter "):
        root = root.split("\0", 2)[2]  # the salt may hold zero bytes, version and name do not
    kind, _, salt = root.partition(" ")
    return salt if kind == "salt" else None


def _runs(indices: Listing[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges: [3, 4, 5, 8] → [(3, 6), (8, 9)]."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
