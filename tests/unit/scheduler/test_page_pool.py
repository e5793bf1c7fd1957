from __future__ import annotations

import pytest

from paged_backend.scheduler.page_pool import PagePool


def test_take_refuses_one_page_too_many_and_changes_nothing() -> None:
    pool = PagePool(3)
    assert pool.take(4) is None
    assert (pool.num_free, pool.num_held, pool.num_cached) == (3, 0, 0)
    assert sorted(pool.take(3) or []) == [0, 1, 2]
    assert pool.take(1) is None
    assert pool.take(0) == []


def test_a_page_is_free_only_after_its_last_holder_left() -> None:
    pool = PagePool(1)
    (page,) = pool.take(1) or []
    pool.hold(page)
    pool.release([page])
    assert (pool.num_held, pool.take(1)) == (1, None)
    pool.release([page])
    assert pool.num_free == 1


def test_releasing_more_often_than_holding_is_caught() -> None:
    pool = PagePool(1)
    pages = pool.take(1) or []
    pool.release(pages)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(pages)


def test_a_published_page_stays_cached_and_is_evicted_least_recently_released_first() -> None:
    pool = PagePool(3)
    evicted: list[int] = []
    pool.tell_evictions_to(evicted.append)
    pages = pool.take(3) or []
    for page in pages:
        pool.publish(page)
    pool.release([pages[2], pages[0], pages[1]])
    assert (pool.num_free, pool.num_cached, pool.num_available) == (0, 3, 3)
    pool.hold(pages[2])
    pool.release([pages[2]])  # used again: now the youngest
    assert pool.take(2) == [pages[0], pages[1]] == evicted
    pool.check()


def test_free_pages_are_taken_before_cached_ones_are_evicted() -> None:
    pool = PagePool(2)
    (first,) = pool.take(1) or []
    pool.publish(first)
    pool.release([first])
    assert pool.take(1) == [1 - first]
    assert pool.num_cached == 1


def test_a_free_page_cannot_be_held() -> None:
    with pytest.raises(KeyError):
        PagePool(1).hold(0)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="num_pages"):
        PagePool(0)
