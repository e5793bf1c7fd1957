"""Which pages a sequence holds, and which of them others may share: where page tables, page pool and prefix cache
meet.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.scheduler.kv_events import KvEvents
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.page_pool import PagePool
from paged_backend.scheduler.prefix_cache import GONE, PrefixCache, first_kept

NEVER = int(np.iinfo(np.int32).max)


class PageTable:
    """A sequence's pages, for each KV group in the order of its tokens.

    Invariant: the groups have equally many entries, and `hashes` are those of the sequence's first full pages.
    """

    def __init__(self, salt: str | None, num_groups: int = 1) -> None:
        """salt: root of its hashes. Pages are shared by tables with the same; None: it neither finds pages of others
        nor leaves any.
        """
        self.salt = salt
        self.groups: list[list[int]] = [[] for _ in range(num_groups)]  # page ids, or GONE
        self.num_gone = [0] * num_groups  # first entries of each group that are GONE
        self.hashes: list[bytes] = []

    def __len__(self) -> int:
        """Pages of each group, those that are gone included."""
        return len(self.groups[0])

    @property
    def held(self) -> list[int]:
        """Pages of all groups that are not gone."""
        return [page for pages, num_gone in zip(self.groups, self.num_gone, strict=True) for page in pages[num_gone:]]


class SequencePages:
    """Invariant (`check`): every page's count is the number of page tables that name it."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.pool = PagePool(limits.num_pages)
        self.windows = limits.windows
        self._cache = PrefixCache(self.pool, limits.page_size, limits.windows)
        self._page_size = limits.page_size
        self._events: KvEvents | None = None

    def record(self, events: KvEvents) -> None:
        """Tells `events` of every page that can be found from now on, and of every one that cannot any more."""
        self._events = events
        self._cache.on_forget = events.forget

    def take(
        self, tables: Listing[PageTable], token_ids: Int32, num_tokens: int, num_reusable: int, headroom: int
    ) -> int | None:
        """Fills the empty tables of a waiting sequence's runners: the first with pages for `num_tokens` tokens, known
        or not, the others with what each will need for itself, a page at least, where the tokens it shares with the
        first end. All groups get theirs, or none does. Leaves `headroom` pages.

        token_ids: the known tokens. num_reusable: pages of so many of the first may come from the prefix cache.
        Returns how many tokens need not be computed; None if pages are short, then nothing has changed.
        """
        first, *others = tables
        shared: list[list[int]] = [[] for _ in self.windows]
        if first.salt is not None:
            # the newest token is always computed: its logits are wanted
            reusable = min(len(token_ids) - 1, num_reusable) // self._page_size
            self._cache.extend(first.hashes, token_ids, reusable, first.salt)
            shared = self._cache.match(first.hashes[:reusable])
        num_shared = len(shared[0])
        num_pages = -(-num_tokens // self._page_size)
        reserve = max(num_pages - len(token_ids) // self._page_size, 1)
        num_new = (num_pages - num_shared + reserve * len(others)) * len(shared)
        found = [page for pages in shared for page in pages if page != GONE]
        for page in found:
            self.pool.hold(page)
        new = self.pool.take(num_new) if num_new + headroom <= self.pool.num_available else None
        if new is None:
            self.pool.release(reversed(found))
            return None
        for table in others:
            for group in range(len(shared)):
                table.groups[group], new = new[:reserve], new[reserve:]
        for group, pages in enumerate(shared):
            first.num_gone[group] = pages.count(GONE)
            first.groups[group], new = pages + new[: num_pages - num_shared], new[num_pages - num_shared :]
        return num_shared * self._page_size

    def append(self, table: PageTable) -> bool:
        """One more page for each group; False if there are not so many, then nothing has changed."""
        new = self.pool.take(len(table.groups))
        if new is None:
            return False
        for pages, page in zip(table.groups, new, strict=True):
            pages.append(page)
        return True

    def share(self, taker: PageTable, source: PageTable, num_shared: int, num_left: int) -> None:
        """taker's first `num_left` pages are left for the first `num_shared` of source's; of the others it keeps as
        many as source has, and one at least.
        """
        end = num_left + max(len(source) - num_shared, 1)
        for group, (mine, others) in enumerate(zip(taker.groups, source.groups, strict=True)):
            shared, left = others[:num_shared], mine[:num_left] + mine[end:]
            for page in shared:
                if page != GONE:
                    self.pool.hold(page)
            taker.groups[group] = shared + mine[num_left:end]
            taker.num_gone[group] = shared.count(GONE)
            self.pool.release(page for page in reversed(left) if page != GONE)

    def publish(self, table: PageTable, token_ids: Int32, first: int, end: int, lora_name: str | None) -> None:
        """Makes pages `first` … `end` - 1 findable; token_ids: of the sequence, at least those of its first `end`
        pages. lora_name: of its adapter.
        """
        assert table.salt is not None
        self._cache.extend(table.hashes, token_ids, end, table.salt)
        new = []
        for index in range(first, end):
            for group, pages in enumerate(table.groups):
                if (
                    pages[index] != GONE
                    and self._cache.publish(group, pages[index], table.hashes[index])
                    and group == 0
                ):
                    new.append(index)
        if self._events is not None and new:
            self._events.store(table.hashes, token_ids, new, table.salt, lora_name)

    def release_passed(self, table: PageTable, num_computed: int) -> int:
        """Releases the pages that no token from position num_computed on attends to. Returns how many computed tokens
        make the next one such a page.
        """
        size, next_len = self._page_size, NEVER
        for group, window in enumerate(self.windows):
            if window is None:
                continue
            pages, num_gone = table.groups[group], table.num_gone[group]
            passed = max(first_kept(num_computed, window, size), num_gone)
            self.pool.release(reversed(pages[num_gone:passed]))
            pages[num_gone:passed] = [GONE] * (passed - num_gone)
            table.num_gone[group] = passed
            next_len = min(next_len, (passed + 1) * size + window - 1)
        return next_len

    def release(self, table: PageTable) -> None:
        for group, pages in enumerate(table.groups):
            # leaves first: a page is never evicted before those that extend it
            self.pool.release(reversed(pages[table.num_gone[group] :]))
            pages.clear()
            table.num_gone[group] = 0

    def check(self, tables: Iterable[PageTable]) -> None:
        """Raises AssertionError if an invariant is broken. O(pages)."""
        self.pool.check()
        self._cache.check()
        counts = [0] * self.pool.num_pages
        for table in tables:
            assert len({len(pages) for pages in table.groups}) == 1, "the groups of a page table have different lengths"
            assert all(
                pages[:gone].count(GONE) == gone for pages, gone in zip(table.groups, table.num_gone, strict=True)
            ), "a page is gone, and is not"
            for page in table.held:
                counts[page] += 1
        assert counts == [self.pool.count(page) for page in range(self.pool.num_pages)], (
            "a page's count is not its number of holders"
        )
