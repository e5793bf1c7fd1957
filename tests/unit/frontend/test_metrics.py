"""The numbers behind /metrics."""

from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from paged_backend.config import EngineConfig
from paged_backend.errors import ErrorKind
from paged_backend.frontend.metrics import FAMILIES, Kind, Tally, gauges, reason_of
from paged_backend.messages import Ready, Stats

READY = Ready(None, 100, 1024, 1600, 16, 100, max_num_sequences=77)
STATS = Stats(
    pages_free=60,
    pages_held=30,
    pages_cached=10,
    live_tokens=360,
    num_running=5,
    num_waiting=2,
    num_preemptions=3,
    prefix_queries=100,
    prefix_hits=40,
    num_steps=9,
)


def _tally() -> Tally:
    return Tally(EngineConfig(), [READY])


def test_every_published_series_belongs_to_a_family() -> None:
    known = {(family.name, value) for family in FAMILIES for value in family.values}
    tally = _tally()
    tally.take_stats(STATS)
    drained = tally.drain()
    assert set(gauges(STATS, READY, EngineConfig())) <= known
    assert set(drained.increments) | set(drained.observations) | set(drained.gauges[0]) <= known


def test_names_follow_prometheus() -> None:
    for family in FAMILIES:
        assert re.fullmatch(r"[a-z_]+", family.name)
        assert family.description.endswith(".")
        assert (family.kind is Kind.HISTOGRAM) == bool(family.buckets)
        assert list(family.buckets) == sorted(set(family.buckets))
        assert family.kind is not Kind.COUNTER or family.name.endswith("_total")
        assert family.kind is not Kind.HISTOGRAM or family.name.endswith(("_seconds", "_tokens"))
        assert family.kind is not Kind.GAUGE or not family.name.endswith("_total") or family.name == "paged_pages_total"
    counters = {family.name.removesuffix("_total") for family in FAMILIES if family.kind is Kind.COUNTER}
    # one name to OpenMetrics
    assert counters.isdisjoint(family.name for family in FAMILIES if family.kind is not Kind.COUNTER)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_of_error_is_counted_apart(kind: ErrorKind) -> None:
    (family,) = [family for family in FAMILIES if family.name == "paged_requests_finished_total"]
    assert family.values.count(reason_of(kind)) == 1


def test_utilisation_is_live_tokens_per_held_slot() -> None:
    assert gauges(STATS, READY, EngineConfig())["paged_utilisation", ""] == 360 / (30 * 16)
    idle = Stats(100, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    assert gauges(idle, READY, EngineConfig())["paged_utilisation", ""] == 0


def test_page_states_add_up_and_load_balancers_read_the_same() -> None:
    values = gauges(STATS, READY, EngineConfig())
    assert (
        sum(values["paged_pages", state] for state in ("free", "held", "cached"))
        == values["paged_pool_pages", ""]
        == values["paged_pages_total", ""]
        == 100
    )
    pages = "nv_trt_llm_kv_cache_block_metrics"
    assert values[pages, "used"] + values[pages, "free"] == values[pages, "max"] == 100
    assert values[pages, "fraction"] == 0.3
    assert values[pages, "tokens_per"] == 16
    requests = {
        value: values["nv_trt_llm_request_metrics", value] for value in ("active", "scheduled", "waiting", "max")
    }
    assert requests == {"active": 7, "scheduled": 5, "waiting": 2, "max": 77}


def test_the_engines_totals_become_increments() -> None:
    tally = _tally()
    tally.take_stats(STATS)
    tally.take_stats(
        Stats(
            60,
            30,
            10,
            360,
            5,
            2,
            num_preemptions=4,
            prefix_queries=150,
            prefix_hits=50,
            num_steps=12,
            queue_times=(0.5, 0.25),
        )
    )
    drained = tally.drain()
    assert drained.increments["paged_preemptions_total", ""] == 4
    assert drained.increments["paged_prefix_cache_queries_total", ""] == 150
    assert drained.increments["paged_prefix_cache_hits_total", ""] == 50
    assert drained.observations["paged_queue_seconds", ""] == [0.5, 0.25]


def test_a_new_engine_counts_from_zero_again() -> None:
    tally = _tally()
    tally.take_stats(STATS)
    tally.drain()
    tally.take_stats(Stats(100, 0, 0, 0, 0, 0, num_preemptions=1, prefix_queries=5, prefix_hits=2, num_steps=1))
    assert tally.drain().increments["paged_preemptions_total", ""] == 1


def test_a_restarted_engine_that_is_soon_further_than_the_last_one_never_makes_a_counter_fall() -> None:
    tally = _tally()
    tally.take_stats(Stats(60, 30, 10, 360, 5, 2, num_preemptions=4, prefix_queries=500, prefix_hits=50, num_steps=12))
    tally.note_restart()
    tally.take_stats(Stats(60, 30, 10, 360, 5, 2, num_preemptions=0, prefix_queries=100, prefix_hits=10, num_steps=20))
    increments = tally.drain().increments
    assert increments["paged_prefix_cache_queries_total", ""] == 600
    assert increments["paged_engine_restarts_total", ""] == 1
    assert min(increments.values()) >= 0


def test_draining_takes_everything_once() -> None:
    tally = _tally()
    tally.add("paged_generation_tokens_total", 5)
    for _ in range(2):
        tally.add_token()
    tally.observe("paged_request_seconds", 1.5)
    first = tally.drain()
    assert first.increments == {("paged_generation_tokens_total", ""): 7}
    assert first.observations == {("paged_request_seconds", ""): [1.5]}
    second = tally.drain()
    assert (second.gauges, second.increments, second.observations) == ({}, {}, {})
    tally.add_token()
    assert tally.drain().increments == {("paged_generation_tokens_total", ""): 1}


def test_a_replica_that_is_gone_runs_nothing_and_holds_no_page() -> None:
    tally = Tally(EngineConfig(replicas=2), [READY, READY])
    tally.take_stats(STATS, 0)
    tally.take_stats(STATS, 1)
    tally.note_gone(1)
    told = tally.drain().gauges
    assert told[0]["paged_requests", "running"] == 5 and told[0]["paged_pages", "held"] == 30
    assert (
        told[1]["paged_requests", "running"] == told[1]["paged_pages", "held"] == told[1]["paged_utilisation", ""] == 0
    )


def test_drafts_are_counted_by_who_made_them() -> None:
    tally = Tally(EngineConfig(), [replace(READY, proposer="mtp")])
    for counts in ((8, 3, 2), (20, 11, 5)):
        proposed, accepted, checked = counts
        tally.take_stats(
            replace(
                STATS, drafts_proposed=proposed, drafts_accepted=accepted, drafts_checked=checked, num_steps=proposed
            )
        )
    drained = tally.drain().increments
    counted = {key: value for key, value in drained.items() if key[0].startswith("paged_drafts") and value}
    assert counted == {
        ("paged_drafts_proposed_total", "mtp"): 20,
        ("paged_drafts_accepted_total", "mtp"): 11,
        ("paged_drafts_checked_total", "mtp"): 5,
    }


def test_an_engine_without_speculation_has_no_drafts_to_count() -> None:
    tally = _tally()
    tally.take_stats(STATS)
    assert not any(name.startswith("paged_drafts") for name, _ in tally.drain().increments)
