"""Which pages a sequence holds, and which of them others may share: where sequences, page pool and prefix cache meet."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing

from paged_backend.arrays import Int32
from paged_backend.scheduler.kv_events import KvEvents
from paged_backend.scheduler.page_pool import PagePool
from paged_backend.scheduler.prefix_cache import PrefixCache
from paged_backend.scheduler.sequence import Sequence


class SequencePages:
    """Invariant (`check`): every page's count is the number of sequences whose page list names it."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages)
        self._cache = PrefixCache(self.pool, page_size)
        self._page_size = page_size
        self._events: KvEvents | None = None

    def record(self, events: KvEvents) -> None:
        """Tells `events` of every page that can be found from now on, and of every one that cannot any more."""
        self._events = events
        self._cache.on_forget = events.forget

    def take(self, runners: Listing[Sequence], num_tokens: int, num_reusable: int, headroom: int) -> int | None:
        """Holds the pages of a waiting sequence's first `num_tokens` tokens, known or not, those of the first `num_reusable` that are in the prefix cache
        first, and leaves `headroom` pages available. Each of its other runners gets what it will need for itself, a page at least, where the tokens it
        shares with the first end. Returns how many tokens need not be computed; None if pages are short, then nothing has changed."""
        sequence, *others = runners
        shared: list[int] = []
        if sequence.shares:
            reusable = min(len(sequence.token_ids) - 1, num_reusable) // self._page_size  # the newest token is always computed: its logits are wanted
            self._cache.extend(sequence.hashes, sequence.token_ids, reusable, sequence.cache_salt)
            shared = self._cache.match(sequence.hashes[:reusable])
        num_pages = -(-num_tokens // self._page_size)
        reserve = max(num_pages - len(sequence.token_ids) // self._page_size, 1)
        num_new = num_pages - len(shared) + reserve * len(others)
        for page in shared:
            self.pool.hold(page)
        new = self.pool.take(num_new) if num_new + headroom <= self.pool.num_available else None
        if new is None:
            self.pool.release(reversed(shared))
            return None
        for runner in others:
            runner.pages, new = new[:reserve], new[reserve:]
        sequence.pages = shared + new
        return len(shared) * self._page_size

    def append(self, sequence: Sequence) -> int | None:
        """One more page; None if there is none."""
        pages = self.pool.take(1)
        if pages is None:
            return None
        sequence.pages += pages
        return pages[0]

    def share(self, taker: Sequence, source: Sequence, num_shared: int, num_left: int) -> None:
        """taker's first `num_left` pages are left for the first `num_shared` of source's; of the others it keeps as many as source has, and one at least."""
        for page in source.pages[:num_shared]:
            self.pool.hold(page)
        end = num_left + max(len(source.pages) - num_shared, 1)
        left, kept = taker.pages[:num_left] + taker.pages[end:], taker.pages[num_left:end]
        taker.pages = source.pages[:num_shared] + kept
        self.pool.release(reversed(left))

    def publish(self, sequence: Sequence, token_ids: Int32, first: int, end: int) -> None:
        """Makes pages `first` … `end` - 1 findable; token_ids: of the sequence, at least those of its first `end` pages."""
        self._cache.extend(sequence.hashes, token_ids, end, sequence.cache_salt)
        new = [index for index in range(first, end) if self._cache.publish(sequence.pages[index], sequence.hashes[index])]
        if self._events is not None and new:
            self._events.store(sequence.hashes, token_ids, new, sequence.cache_salt, sequence.sampling.lora_name)

    def release(self, sequence: Sequence) -> None:
        self.pool.release(reversed(sequence.pages))  # leaves first: a page is never evicted before those that extend it
        sequence.pages.clear()

    def check(self, holders: Iterable[Sequence]) -> None:
        """Raises AssertionError if an invariant is broken. O(pages)."""
        self.pool.check()
        self._cache.check()
        counts = [0] * self.pool.num_pages
        for sequence in holders:
            for page in sequence.pages:
                counts[page] += 1
        assert counts == [self.pool.count(page) for page in range(self.pool.num_pages)], "a page's count is not its number of holders"
