"""Finds the pages that already hold the K and V of a prompt's beginning.

A full page is known by a chained hash: of its tokens, and of the hash of the page before it, which stands for everything before. The chain's
root is the tenant's salt, so tenants never share. (Idea: vLLM's automatic prefix caching; hash: keyed BLAKE2b, 128 bits, RFC 7693, keyed per
process so that nobody outside can prepare two prompts with one hash.)
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from collections.abc import Sequence as Listing
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from paged_backend.scheduler.page_pool import PagePool

_HASH_BYTES = 16


class PrefixCache:
    """Chained hash → page, for held and cached pages alike.

    Invariant (`check`): the two maps mirror each other, and every published page is held or cached.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._key = secrets.token_bytes(_HASH_BYTES)
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.on_forget: Callable[[bytes], None] | None = None  # hears of every hash that leads nowhere from now on
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

    def match(self, hashes: Listing[bytes]) -> list[int]:
        """The pages of the longest known beginning of `hashes`, in order. Holds none of them: hold before anything is taken."""
        pages = []
        for key in hashes:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def publish(self, page: int, key: bytes) -> bool:
        """Makes a held, full page findable. If another page has this content already, that one stays the known one, and the answer is False."""
        if key in self._page_of or page in self._hash_of:
            return False
        self._page_of[key] = page
        self._hash_of[page] = key
        self._pool.publish(page)
        return True

    def _forget(self, page: int) -> None:
        key = self._hash_of.pop(page)
        del self._page_of[key]
        if self.on_forget is not None:
            self.on_forget(key)

    def _hash(self, parent: bytes, content: bytes) -> bytes:
        return blake2b(parent + content, digest_size=_HASH_BYTES, key=self._key).digest()

    def check(self) -> None:
        """Raises AssertionError if the invariant is broken."""
        assert {page: key for key, page in self._page_of.items()} == self._hash_of, "the two maps differ"
        assert len(self._hash_of) >= self._pool.num_cached, "a cached page is not findable"
