"""Which simulated server gets a request."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from paged_backend.engine.findable_pages import AllBlocksCleared, BlockRemoved, BlockStored, Event


@dataclass(frozen=True)
class Choice:
    server: int
    to_compute: float = 0.0  # tokens of the prompt, as the router believes
    block_hashes: tuple[int, ...] = ()


class Router(Protocol):
    def choose(self, block_hashes: Sequence[int], num_tokens: int) -> Choice: ...
    def hear(self, server: int, events: Sequence[Event]) -> None: ...
    def begun(self, choice: Choice) -> None:
        """Its first token has come."""

    def over(self, choice: Choice) -> None: ...


class _Deaf:
    """A router that knows nothing of pages."""

    def hear(self, server: int, events: Sequence[Event]) -> None:
        pass

    def begun(self, choice: Choice) -> None:
        pass

    def over(self, choice: Choice) -> None:
        pass


class Random(_Deaf):
    def __init__(self, num_servers: int, seed: int) -> None:
        self._dice = random.Random(seed)
        self._num_servers = num_servers

    def choose(self, block_hashes: Sequence[int], num_tokens: int) -> Choice:
        return Choice(self._dice.randrange(self._num_servers))


class Turns(_Deaf):
    """Each in turn: round robin."""

    def __init__(self, num_servers: int, seed: int) -> None:
        self._next, self._num_servers = 0, num_servers

    def choose(self, block_hashes: Sequence[int], num_tokens: int) -> Choice:
        self._next = (self._next + 1) % self._num_servers
        return Choice(self._next)


class Least(_Deaf):
    """The fewest outstanding requests; among equals a random one."""

    def __init__(self, num_servers: int, seed: int) -> None:
        self._outstanding = np.zeros(num_servers, np.int64)
        self._dice = np.random.default_rng(seed)

    def choose(self, block_hashes: Sequence[int], num_tokens: int) -> Choice:
        server = int(self._dice.choice(np.flatnonzero(self._outstanding == self._outstanding.min())))
        self._outstanding[server] += 1
        return Choice(server)

    def over(self, choice: Choice) -> None:
        self._outstanding[choice.server] -= 1


class KvAware:
    """As NVIDIA Dynamo's selection weighs it, in pages: those that the server would have to compute, the requests
    before this one included, and those that its sequences would hold, of which shared ones count once. The least is
    chosen, among equals a random one.
    """

    def __init__(self, num_servers: int, seed: int, page_size: int) -> None:
        self._page_size = page_size
        self._known: dict[int, set[int]] = {}  # page → servers that have it cached
        self._active: dict[int, dict[int, int]] = {}  # page → server → sequences that hold it
        self._to_compute = np.zeros(num_servers)  # tokens
        self._held = np.zeros(num_servers)  # pages
        self._dice = np.random.default_rng(seed)

    def hear(self, server: int, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case BlockStored():
                    for block in event.block_hashes:
                        self._known.setdefault(block, set()).add(server)
                case BlockRemoved():
                    for block in event.block_hashes:
                        holders = self._known[block]
                        holders.discard(server)
                        if not holders:
                            del self._known[block]
                case AllBlocksCleared():
                    pass

    def choose(self, block_hashes: Sequence[int], num_tokens: int) -> Choice:
        size = self._page_size
        known = self._beginnings(block_hashes, self._known)
        shared = self._beginnings(block_hashes, self._active)
        num_pages = -(-num_tokens // size)
        cost = (self._to_compute + num_tokens) / size - known + self._held + num_pages - shared
        server = int(self._dice.choice(np.flatnonzero(cost == cost.min())))
        to_compute = num_tokens - float(known[server]) * size
        self._to_compute[server] += to_compute
        for block in block_hashes:
            holders = self._active.setdefault(block, {})
            self._held[server] += server not in holders
            holders[server] = holders.get(server, 0) + 1
        return Choice(server, to_compute, tuple(block_hashes))

    def _beginnings(
        self, block_hashes: Sequence[int], holders_of: Mapping[int, Collection[int]]
    ) -> NDArray[np.float64]:
        """For each server, how many of the first pages it has."""
        counts = np.zeros(len(self._held))
        holders: set[int] | None = None
        for block in block_hashes:
            found = holders_of.get(block, ())
            holders = set(found) if holders is None else holders.intersection(found)
            if not holders:
                break
            counts[list(holders)] += 1
        return counts

    def begun(self, choice: Choice) -> None:
        self._to_compute[choice.server] -= choice.to_compute

    def over(self, choice: Choice) -> None:
        for block in choice.block_hashes:
            holders = self._active[block]
            holders[choice.server] -= 1
            if not holders[choice.server]:
                del holders[choice.server]
                self._held[choice.server] -= 1
                if not holders:
                    del self._active[block]
