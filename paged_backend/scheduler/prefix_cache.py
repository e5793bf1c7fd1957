"""Finds the pages that already hold the K and V of a prompt's beginning.

A full page is known by a chained hash: of its tokens, and of the hash of the page before it, which stands for
everything before. The chain's root is the tenant's salt, so tenants never share. (Idea: vLLM's automatic prefix
caching; hash: keyed BLAKE2b, 128 bits, RFC 7693, keyed per process so that nobody outside can prepare two prompts with
one hash.)
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from collections.abc import Sequence as Listing
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from paged_backend.scheduler.page_pool import PagePool

GONE = -1  # instead of a page: its group's window has left it behind
_HASH_BYTES = 16


def first_kept(num_tokens: int, window: int, page_size: int) -> int:
    """Index of the first page that a token at position num_tokens or later attends to."""
    return max(num_tokens - window + 1, 0) // page_size


class PrefixCache:
    """Chained hash → page of each KV group, for held and cached pages alike.

    Invariant (`check`): the two maps mirror each other, and every published page is held or cached.
    """

    def __init__(self, pool: PagePool, page_size: int, windows: tuple[int | None, ...] = (None,)) -> None:
        """windows: of the KV groups, in tokens, the largest first; None: a group keeps all."""
        self._pool = pool
        self._page_size = page_size
        self._windows = windows
        self._key = secrets.token_bytes(_HASH_BYTES)
        self._page_of: tuple[dict[bytes, int], ...] = tuple({} for _ in windows)
        self._hash_of: dict[int, tuple[int, bytes]] = {}  # page -> group, hash
        # hears of every hash that leads nowhere in the first group from now on
        self.on_forget: Callable[[bytes], None] | None = None
        pool.tell_evictions_to(self._forget)

    def root(self, salt: str) -> bytes:
        """The parent of a tenant's first pages."""
        return self._hash(b"", salt.encode("utf-8", "surrogatepass"))

    def extend(self, hashes: list[bytes], token_ids: NDArray[np.int32], upto: int, salt: str) -> None:
        """Appends to `hashes` (one per full page of `token_ids`) until it covers the first `upto` pages."""
        size = self._page_size
        parent = hashes[-1] if hashes else self.root(salt)
        for index in range(len(hashes), upto):
            parent = self._hash(parent, token_ids[index * size : (index + 1) * size].tobytes())
            hashes.append(parent)

    def match(self, hashes: Listing[bytes]) -> list[list[int]]:
        """For each group the pages of the longest beginning of `hashes` that need not be computed, in order; of a group
        with a window those within the last window, GONE before. Holds none of them: hold before anything is taken.
        """
        num_found = len(hashes)
        for group, window in enumerate(self._windows):
            if window is None:
                known = self._page_of[group]
                num_found = next((index for index in range(num_found) if hashes[index] not in known), num_found)
        # lows: the pages from there on are known to be there
        firsts, lows = [0] * len(self._windows), [num_found] * len(self._windows)
        group = 0
        # no missing page of a window may be among the last ones: what ends before it is tried next
        while group < len(self._windows):
            window, known = self._windows[group], self._page_of[group]
            if window is not None:
                firsts[group] = first_kept(num_found * self._page_size, window, self._page_size)
                low = min(lows[group], num_found)
                while low > firsts[group] and hashes[low - 1] in known:
                    low -= 1
                lows[group] = low
                if low > firsts[group]:
                    num_found, group = low - 1, 0
                    continue
            group += 1
        return [
            [GONE] * first + [known[key] for key in hashes[first:num_found]]
            for first, known in zip(firsts, self._page_of, strict=True)
        ]

    def publish(self, group: int, page: int, key: bytes) -> bool:
        """Makes a held, full page findable. If another page has this content already, that one stays the known one, and
        the answer is False.
        """
        known = self._page_of[group]
        if key in known or page in self._hash_of:
            return False
        known[key] = page
        self._hash_of[page] = group, key
        self._pool.publish(page)
        return True

    def _forget(self, page: int) -> None:
        group, key = self._hash_of.pop(page)
        del self._page_of[group][key]
        if self.on_forget is not None and group == 0:
            self.on_forget(key)

    def _hash(self, parent: bytes, content: bytes) -> bytes:
        return blake2b(parent + content, digest_size=_HASH_BYTES, key=self._key).digest()

    def check(self) -> None:
        """Raises AssertionError if the invariant is broken."""
        found = {page: (group, key) for group, known in enumerate(self._page_of) for key, page in known.items()}
        assert found == self._hash_of, "the two maps differ"
        assert len(self._hash_of) >= self._pool.num_cached, "a cached page is not findable"
