"""Which simulated server gets a request."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from paged_backend.engine.findable_pages import AllBlocksCleared, BlockRemoved, BlockStored, Event


class Router(Protocol):
    def choose(self, block_hashes: Sequence[int], num_tokens: int) -> int:
        """The number of the server."""

    def hear(self, server: int, events: Sequence[Event]) -> None: ...
    def begun(self, server: int, num_tokens: int, num_known: int) -> None: ...
    def over(self, server: int, num_tokens: int) -> None: ...


class _Deaf:
    """A router that knows nothing of pages."""

    def hear(self, server: int, events: Sequence[Event]) -> None:
        pass

    def begun(self, server: int, num_tokens: int, num_known: int) -> None:
        pass

    def over(self, server: int, num_tokens: int) -> None:
        pass


class Random(_Deaf):
    def __init__(self, num_servers: int, seed: int) -> None:
        self._dice = random.Random(seed)
        self._num_servers = num_servers

    def choose(self, block_hashes: Sequence[int], num_tokens: int) -> int:
        return self._dice.randrange(self._num_servers)


class Turns(_Deaf):
    """Each in turn: round robin."""

    def __init__(self, num_servers: int, seed: int) -> None:
        self._next, self._num_servers = 0, num_servers

    def choose(self, block_hashes: Sequence[int], num_tokens: int) -> int:
        self._next = (self._next + 1) % self._num_servers
        return self._next


class Least(_Deaf):
    """The fewest outstanding requests; among equals a random one."""

    def __init__(self, num_servers: int, seed: int) -> None:
        self._outstanding = np.zeros(num_servers, np.int64)
        self._dice = np.random.default_rng(seed)

    def choose(self, block_hashes: Sequence[int], num_tokens: int) -> int:
        server = int(self._dice.choice(np.flatnonzero(self._outstanding == self._outstanding.min())))
        self._outstanding[server] += 1
        return server

    def over(self, server: int, num_tokens: int) -> None:
        self._outstanding[server] -= 1


class KvAware:
    """As NVIDIA Dynamo's selection weighs it: blocks that the server would have to compute, those of the requests before this one included, and blocks that
    its sequences hold; the least is chosen, among equals a random one. (docs of Dynamo's KV router; overlap weight 1.)"""

    def __init__(self, num_servers: int, seed: int, page_size: int) -> None:
        self._page_size = page_size
        self._holders: dict[int, set[int]] = {}  # block → servers
        self._to_compute = np.zeros(num_servers)  # tokens
        self._held = np.zeros(num_servers)  # blocks
        self._dice = np.random.default_rng(seed)

    def hear(self, server: int, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case BlockStored():
                    for block in event.block_hashes:
                        self._holders.setdefault(block, set()).add(server)
                case BlockRemoved():
                    for block in event.block_hashes:
                        holders = self._holders[block]
                        holders.discard(server)
                        if not holders:
                            del self._holders[block]
                case AllBlocksCleared():
                    pass

    def choose(self, block_hashes: Sequence[int], num_tokens: int) -> int:
        known = np.zeros(len(self._held))
        holders: set[int] | None = None
        for block in block_hashes:
            found = self._holders.get(block, set())
            holders = set(found) if holders is None else holders & found
            if not holders:
                break
            known[list(holders)] += self._page_size
        cost = (self._to_compute + num_tokens - known) / self._page_size + self._held + num_tokens / self._page_size
        server = int(self._dice.choice(np.flatnonzero(cost == cost.min())))
        self._to_compute[server] += num_tokens - known[server]
        self._held[server] += num_tokens / self._page_size
        self._last_known = int(known[server])
        return server

    def begun(self, server: int, num_tokens: int, num_known: int) -> None:
        self._to_compute[server] = max(0.0, self._to_compute[server] - (num_tokens - num_known))

    def over(self, server: int, num_tokens: int) -> None:
        self._held[server] -= num_tokens / self._page_size
