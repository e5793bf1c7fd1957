"""Which pages a sequence holds, and which of them others may share: where page tables, page pool and prefix cache meet."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field

from paged_backend.arrays import Int32
from paged_backend.scheduler.kv_events import KvEvents
from paged_backend.scheduler.page_pool import PagePool
from paged_backend.scheduler.prefix_cache import PrefixCache


@dataclass(eq=False)
class PageTable:
    """A sequence's pages in the order of its tokens. Invariant: `hashes` are those of its first full pages."""

    salt: str | None  # root of its hashes: pages are shared by tables with the same; None: it neither finds pages of others nor leaves any
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)


class SequencePages:
    """Invariant (`check`): every page's count is the number of page tables that name it."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages)
        self._cache = PrefixCache(self.pool, page_size)
        self._page_size = page_size
        self._events: KvEvents | None = None

    def record(self, events: KvEvents) -> None:
        """Tells `events` of every page that can be found from now on, and of every one that cannot any more."""
        self._events = events
        self._cache.on_forget = events.forget

    def take(self, tables: Listing[PageTable], token_ids: Int32, num_tokens: int, num_reusable: int, headroom: int) -> int | None:
        """Fills the empty tables of a waiting sequence's runners: the first with pages for `num_tokens` tokens, known or not, the others with what each will
        need for itself, a page at least, where the tokens it shares with the first end. Leaves `headroom` pages available.

        token_ids: the known tokens. num_reusable: pages of so many of the first may come from the prefix cache.
        Returns how many tokens need not be computed; None if pages are short, then nothing has changed.
        """
        first, *others = tables
        shared: list[int] = []
        if first.salt is not None:
            reusable = min(len(token_ids) - 1, num_reusable) // self._page_size  # the newest token is always computed: its logits are wanted
            self._cache.extend(first.hashes, token_ids, reusable, first.salt)
            shared = self._cache.match(first.hashes[:reusable])
        num_pages = -(-num_tokens // self._page_size)
        reserve = max(num_pages - len(token_ids) // self._page_size, 1)
        num_new = num_pages - len(shared) + reserve * len(others)
        for page in shared:
            self.pool.hold(page)
        new = self.pool.take(num_new) if num_new + headroom <= self.pool.num_available else None
        if new is None:
            self.pool.release(reversed(shared))
            return None
        for table in others:
            table.pages, new = new[:reserve], new[reserve:]
        first.pages = shared + new
        return len(shared) * self._page_size

    def append(self, table: PageTable) -> int | None:
        """One more page; None if there is none."""
        pages = self.pool.take(1)
        if pages is None:
            return None
        table.pages += pages
        return pages[0]

    def share(self, taker: PageTable, source: PageTable, num_shared: int, num_left: int) -> None:
        """taker's first `num_left` pages are left for the first `num_shared` of source's; of the others it keeps as many as source has, and one at least."""
        for page in source.pages[:num_shared]:
            self.pool.hold(page)
        end = num_left + max(len(source.pages) - num_shared, 1)
        left, kept = taker.pages[:num_left] + taker.pages[end:], taker.pages[num_left:end]
        taker.pages = source.pages[:num_shared] + kept
        self.pool.release(reversed(left))

    def publish(self, table: PageTable, token_ids: Int32, first: int, end: int, lora_name: str | None) -> None:
        """Makes pages `first` … `end` - 1 findable; token_ids: of the sequence, at least those of its first `end` pages. lora_name: of its adapter."""
        assert table.salt is not None
        self._cache.extend(table.hashes, token_ids, end, table.salt)
        new = [index for index in range(first, end) if self._cache.publish(table.pages[index], table.hashes[index])]
        if self._events is not None and new:
            self._events.store(table.hashes, token_ids, new, table.salt, lora_name)

    def release(self, table: PageTable) -> None:
        self.pool.release(reversed(table.pages))  # leaves first: a page is never evicted before those that extend it
        table.pages.clear()

    def check(self, tables: Iterable[PageTable]) -> None:
        """Raises AssertionError if an invariant is broken. O(pages)."""
        self.pool.check()
        self._cache.check()
        counts = [0] * self.pool.num_pages
        for table in tables:
            for page in table.pages:
                counts[page] += 1
        assert counts == [self.pool.count(page) for page in range(self.pool.num_pages)], "a page's count is not its number of holders"
