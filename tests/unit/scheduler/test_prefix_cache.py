from __future__ import annotations

import numpy as np

from paged_backend.scheduler.page_pool import PagePool
from paged_backend.scheduler.prefix_cache import PrefixCache

TOKENS = np.arange(12, dtype=np.int32)


def chain(cache: PrefixCache, tokens: np.ndarray, pages: int, salt: str = "") -> list[bytes]:
    hashes: list[bytes] = []
    cache.extend(hashes, tokens, pages, salt)
    return hashes


def published(num_pages: int = 3) -> tuple[PagePool, PrefixCache, list[int]]:
    pool = PagePool(num_pages)
    cache = PrefixCache(pool, page_size=4)
    pages = pool.take(3) or []
    for page, key in zip(pages, chain(cache, TOKENS, 3), strict=True):
        cache.publish(0, page, key)
    return pool, cache, pages


def test_the_longest_common_beginning_is_found_in_order() -> None:
    _, cache, pages = published()
    other = TOKENS.copy()
    other[9] += 1  # differs in the third page
    assert cache.match(chain(cache, TOKENS, 3)) == [pages]
    assert cache.match(chain(cache, other, 3)) == [pages[:2]]


def test_a_page_is_known_by_everything_before_it_not_by_its_own_tokens() -> None:
    _, cache, _ = published()
    shifted = np.concatenate([TOKENS[4:8], TOKENS[4:8]])
    assert cache.match(chain(cache, shifted, 2)) == [[]]


def test_tenants_with_different_salts_never_share() -> None:
    _, cache, _ = published()
    assert cache.match(chain(cache, TOKENS, 3, salt="b")) == [[]]


def test_hashes_grow_page_by_page_to_the_same_chain() -> None:
    _, cache, _ = published()
    stepwise: list[bytes] = []
    for upto in (1, 1, 2, 3):
        cache.extend(stepwise, TOKENS, upto, "")
    assert stepwise == chain(cache, TOKENS, 3)


def test_an_evicted_page_is_not_found_and_hides_what_extends_it() -> None:
    pool, cache, pages = published()
    pool.release([pages[0]])  # a root released first is evicted first
    assert pool.take(1) == [pages[0]]
    assert cache.match(chain(cache, TOKENS, 3)) == [[]]
    cache.check()


def test_of_two_pages_with_one_content_the_first_stays_the_known_one() -> None:
    pool, cache, pages = published(num_pages=4)
    (twin,) = pool.take(1) or []
    cache.publish(0, twin, chain(cache, TOKENS, 1)[0])
    assert cache.match(chain(cache, TOKENS, 1)) == [[pages[0]]]
    pool.release([twin])
    assert pool.num_free == 1  # unpublished: nothing to keep


def in_groups(windows: tuple[int | None, ...], lost: list[tuple[int, int]]) -> list[list[int]]:
    """What is found of 6 full pages of 4 tokens, of which those (group, index) are not published; pages are 10 * group
    + index.
    """
    pool = PagePool(10 * len(windows) + 10)
    cache = PrefixCache(pool, 4, windows)
    pool.take(pool.num_pages)
    keys = chain(cache, np.arange(24, dtype=np.int32), 6)
    for group in range(len(windows)):
        for index, key in enumerate(keys):
            if (group, index) not in lost:
                cache.publish(group, 10 * group + index, key)
    cache.check()
    return cache.match(keys)


def test_a_hit_needs_of_a_window_the_pages_that_the_next_token_attends_to() -> None:
    whole = [0, 1, 2, 3, 4, 5]
    assert in_groups((None, 6), []) == [whole, [-1, -1, -1, -1, 14, 15]]  # the token at 24 attends to those from 19 on
    assert in_groups((None, 9), []) == [whole, [-1, -1, -1, -1, 14, 15]]  # … from 16 on
    assert in_groups((None, 10), []) == [whole, [-1, -1, -1, 13, 14, 15]]
    assert in_groups((None, 6), [(1, 0), (1, 3)]) == [whole, [-1, -1, -1, -1, 14, 15]]
    assert in_groups((None, 1), [(1, index) for index in range(6)]) == [whole, [-1] * 6]


def test_a_hit_ends_where_every_group_has_what_it_needs() -> None:
    assert in_groups((None, 6), [(1, 5)]) == [[0, 1, 2, 3, 4], [-1, -1, -1, 13, 14]]
    assert in_groups((None, 6), [(1, 4)]) == [[0, 1, 2, 3], [-1, -1, 12, 13]]
    assert in_groups((None, 6), [(0, 3), (1, 1)]) == [[0], [10]]
    assert in_groups((None, 9, 6), [(1, 5), (2, 3)]) == [[0, 1, 2], [-1, 11, 12], [-1, 21, 22]]
    assert in_groups((6,), [(0, 0), (0, 1)]) == [[-1, -1, -1, -1, 4, 5]]
    assert in_groups((None, 6), [(1, 1), (1, 3), (1, 5)]) == [[0], [10]]
    assert in_groups((None, 6), [(1, 0), (1, 2), (1, 4)]) == [[], []]


class Counted(list[bytes]):
    """Hashes that count how often one is looked up."""

    count = 0

    def __getitem__(self, at: object) -> object:  # type: ignore[override]
        self.count += 1
        return super().__getitem__(at)  # type: ignore[index]


def test_a_hash_is_looked_up_once_for_each_group_wherever_a_hit_ends() -> None:
    """Somebody who waits for pages is matched before every step, and may have many."""
    cache = PrefixCache(PagePool(2 * 200), 4, (None, 80, 40))
    keys = Counted(chain(cache, np.arange(800, dtype=np.int32), 200))
    for page, key in zip(cache._pool.take(400) or [], 2 * list(keys), strict=True):
        cache.publish(page // 200, page, key)
    assert cache.match(keys) == [[], [], []]  # the third group has none
    assert keys.count <= 3 * 200 + 3
