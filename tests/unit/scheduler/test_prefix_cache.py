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
        cache.publish(page, key)
    return pool, cache, pages


def test_the_longest_common_beginning_is_found_in_order() -> None:
    _, cache, pages = published()
    other = TOKENS.copy()
    other[9] += 1  # differs in the third page
    assert cache.match(chain(cache, TOKENS, 3)) == pages
    assert cache.match(chain(cache, other, 3)) == pages[:2]


def test_a_page_is_known_by_everything_before_it_not_by_its_own_tokens() -> None:
    _, cache, _ = published()
    shifted = np.concatenate([TOKENS[4:8], TOKENS[4:8]])
    assert cache.match(chain(cache, shifted, 2)) == []


def test_tenants_with_different_salts_never_share() -> None:
    _, cache, _ = published()
    assert cache.match(chain(cache, TOKENS, 3, salt="b")) == []


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
    assert cache.match(chain(cache, TOKENS, 3)) == []
    cache.check()


def test_of_two_pages_with_one_content_the_first_stays_the_known_one() -> None:
    pool, cache, pages = published(num_pages=4)
    (twin,) = pool.take(1) or []
    cache.publish(twin, chain(cache, TOKENS, 1)[0])
    assert cache.match(chain(cache, TOKENS, 1)) == [pages[0]]
    pool.release([twin])
    assert pool.num_free == 1  # unpublished: nothing to keep
