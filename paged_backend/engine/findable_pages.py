"""What routers are told of the prefix cache, in the words of vLLM's KV events (vllm/distributed/kv_events.py: maps with
a `type`).

Routers know a page by its block hash (block_hashes.py).

Only pages that can be reached are told. A page may outlive the one before it, of which its sequence had a copy that
nobody could find; it leads nowhere until that one is stored again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from paged_backend.block_hashes import block_hash
from paged_backend.scheduler.kv_events import Forgotten, Note, Stored

_DEVICE = "GPU"  # vLLM's name for the memory that kernels read; a CPU's pool is that, too
_TOKEN_BYTES = 4


class BlockStored(msgspec.Struct, frozen=True, tag=True, gc=False, omit_defaults=True):
    """Pages that can be found from now on, each the successor of the one before."""

    block_hashes: list[int]  # unsigned, 64 bits
    parent_block_hash: int | None  # of the page before the first; None: it begins a prompt
    token_ids: list[int]  # [len(block_hashes) * block_size]
    block_size: int
    medium: str = ""
    lora_name: str | None = None
    cache_salt: str | None = None  # the tenant's; Dynamo takes it under this name


class BlockRemoved(msgspec.Struct, frozen=True, tag=True, gc=False, omit_defaults=True):
    """Pages that cannot be found any more."""

    block_hashes: list[int]
    medium: str = ""


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Nothing can be found: the engine has just started."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass(slots=True)
class _Page:
    key: bytes  # the cache's own hash
    parent: bytes | None
    token_ids: bytes  # int32 [page_size]
    lora_name: str | None
    cache_salt: str
    block_hash: int | None = None  # None: it cannot be reached


class FindablePages:
    """Every findable page with its tokens: some 400 bytes each.

    Invariant (`check`): a page has a block hash exactly if it begins a prompt or the page before it has one.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._pages: dict[bytes, _Page] = {}
        self._followers: dict[bytes | None, dict[bytes, None]] = {}  # page → those that follow it, in order

    def __len__(self) -> int:
        return len(self._pages)

    def take(self, notes: Iterable[Note]) -> list[Event]:
        """Returns what routers must be told."""
        events: list[Event] = []
        for note in notes:
            match note:
                case Stored():
                    events += self._stored(page for added in self._added(note) for page in self._reach(added))
                case Forgotten():
                    gone = [block_hash for key in note.hashes for block_hash in self._drop(key)]
                    if gone:
                        events.append(BlockRemoved(gone, _DEVICE))
        return events

    def reported(self) -> list[Event]:
        """Events that say it all, from nothing; a page comes after the one before it."""
        reached = (
            page for key in self._followers.get(None, ()) for page in self._subtree(key) if page.block_hash is not None
        )
        return [AllBlocksCleared(), *self._stored(reached)]

    # ---- pages come and go

    def _added(self, note: Stored) -> Iterator[_Page]:
        parent, num_bytes = note.parent, self._page_size * _TOKEN_BYTES
        for index, key in enumerate(note.hashes):
            page = _Page(
                key,
                parent,
                note.token_ids[index * num_bytes : (index + 1) * num_bytes],
                note.lora_name,
                note.cache_salt,
            )
            self._pages[key] = page
            self._followers.setdefault(parent, {})[key] = None
            yield page
            parent = key

    def _reach(self, page: _Page) -> Iterator[_Page]:
        """Gives a page its block hash, and those that follow it, if it can be reached."""
        before = None if page.parent is None else self._pages.get(page.parent)
        if page.parent is not None and (before is None or before.block_hash is None):
            return
        for reached in self._subtree(page.key):
            before = None if reached.parent is None else self._pages[reached.parent]
            parent_hash = None if before is None else before.block_hash
            reached.block_hash = block_hash(reached.token_ids, parent_hash, reached.lora_name, reached.cache_salt)
            yield reached

    def _drop(self, key: bytes) -> list[int]:
        """Forgets a page. Returns the block hashes that lead nowhere from now on, leaves first."""
        page = self._pages.get(key)
        if page is None:  # never told: of a sequence that shares with none but its family
            return []
        cut = [reached for reached in self._subtree(key) if reached.block_hash is not None]
        gone = [reached.block_hash for reached in reversed(cut) if reached.block_hash is not None]
        for reached in cut:
            reached.block_hash = None
        del self._pages[key]
        siblings = self._followers[page.parent]
        del siblings[key]
        if not siblings:
            del self._followers[page.parent]
        return gone

    def _subtree(self, key: bytes) -> Iterator[_Page]:
        """The page and all that follow it, each after the one before it."""
        waiting = [key]
        while waiting:
            reached = waiting.pop()
            yield self._pages[reached]
            waiting += reversed(self._followers.get(reached, {}))

    # ---- events

    def _stored(self, pages: Iterable[_Page]) -> list[Event]:
        """Pages as events, a chain of them as one."""
        events: list[Event] = []
        last: bytes | None = None
        for page in pages:
            assert page.block_hash is not None
            token_ids = np.frombuffer(page.token_ids, np.int32).tolist()
            event = events[-1] if events else None
            if isinstance(event, BlockStored) and page.parent is not None and page.parent == last:
                event.block_hashes.append(page.block_hash)
                event.token_ids.extend(token_ids)
            else:
                before = None if page.parent is None else self._pages[page.parent].block_hash
                events.append(
                    BlockStored(
                        [page.block_hash],
                        before,
                        token_ids,
                        self._page_size,
                        _DEVICE,
                        page.lora_name,
                        page.cache_salt or None,
                    )
                )
            last = page.key
        return events

    def check(self) -> None:
        """Raises AssertionError if the invariant is broken."""
        for page in self._pages.values():
            before = None if page.parent is None else self._pages.get(page.parent)
            assert (page.block_hash is not None) == (
                page.parent is None or (before is not None and before.block_hash is not None)
            )
            assert page.key in self._followers[page.parent]
        assert sum(map(len, self._followers.values())) == len(self._pages)
