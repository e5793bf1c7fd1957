"""Who holds which page. Pages are numbers here; the memory behind them belongs to the KV store.

free --take--> held --release--> free, or cached if its content was published
                ^                              |
                +------------hold--------------+--evict--> taken again
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable


class PagePool:
    """Pages 0 … num_pages - 1, each in exactly one state: free, held (count >= 1) or cached (unheld, kept for its
    content).

    Invariant (`check`): free + held + cached = num_pages, and only published pages are cached.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages: {num_pages} is less than 1")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the lowest and the most recently used pages first
        self._counts = [0] * num_pages
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._published = bytearray(num_pages)
        self._on_evict: Callable[[int], None] = lambda page: None

    def tell_evictions_to(self, listener: Callable[[int], None]) -> None:
        """`listener(page)` hears of every published page just before it loses its content."""
        self._on_evict = listener

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def cached_pages(self) -> Collection[int]:
        """Least recently used first; to be looked at only."""
        return self._cached

    @property
    def num_held(self) -> int:
        return self.num_pages - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `take` can hand out: the free ones, and the cached ones it would evict."""
        return len(self._free) + len(self._cached)

    def take(self, n: int) -> list[int] | None:
        """Holds `n` pages of no content and returns them, or None if fewer are available; then nothing has changed."""
        if n > len(self._free) + len(self._cached):
            return None
        pages = []
        for _ in range(n):
            page = self._free.pop() if self._free else self._evict()
            self._counts[page] = 1
            pages.append(page)
        return pages

    def hold(self, page: int) -> None:
        """One more holder of a held or cached page."""
        if self._counts[page] == 0:
            del self._cached[page]  # KeyError: the page is free, a caller's bug
        self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less of each page. Of pages that become cached, the first released is the first evicted: pass
        leaves first.
        """
        for page in pages:
            count = self._counts[page] - 1
            assert count >= 0, f"page {page} is released more often than held"
            self._counts[page] = count
            if count == 0:
                if self._published[page]:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def publish(self, page: int) -> None:
        """Marks a held page's content as worth keeping: when its last holder leaves it becomes cached, not free."""
        assert self._counts[page] > 0, f"page {page} is published but not held"
        self._published[page] = 1

    def count(self, page: int) -> int:
        return self._counts[page]

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        self._on_evict(page)
        self._published[page] = 0
        return page

    def check(self) -> None:
        """Raises AssertionError if the invariant is broken. O(num_pages)."""
        free, cached = set(self._free), set(self._cached)
        held = {page for page, count in enumerate(self._counts) if count > 0}
        assert len(free) == len(self._free), "a page is free twice"
        assert not (free & cached) and not (free & held) and not (cached & held), "a page is in two states"
        assert len(free) + len(cached) + len(held) == self.num_pages, "a page is in no state"
        assert all(count >= 0 for count in self._counts), "a negative count"
        assert all(self._published[page] for page in cached), "a cached page has no published content"
        assert not any(self._published[page] for page in free), "a free page is published"
