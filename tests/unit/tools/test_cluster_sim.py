"""The simulation of clusters counts what the real scheduler does, and routers in it see what real ones would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from paged_backend.scheduler.limits import SchedulerLimits
from tools.cluster_sim import traces
from tools.cluster_sim.costs import COSTS
from tools.cluster_sim.routers import KvAware, Least, Random, Turns
from tools.cluster_sim.simulation import EVENT_SECONDS, simulate
from tools.cluster_sim.traces import Request

COST = COSTS["llama-3.1-8b-h100"]
LIMITS = SchedulerLimits(16, 64, 512, 16, 256, max_waiting_seconds=1e9, request_deadline_seconds=1e9)


def request(seconds: float, first: int, num_tokens: int = 100, output_tokens: int = 4) -> Request:
    return Request(seconds, np.arange(first, first + num_tokens, dtype=np.int32), output_tokens)


def test_a_lone_request_takes_the_steps_it_takes_and_its_second_time_finds_its_pages() -> None:
    outcome = simulate([request(0, 10), request(1, 10)], 1, Random(1, 0), COST, LIMITS)
    assert outcome.hit_tokens == 96 and outcome.prompt_tokens == 200 and outcome.output_tokens == 8
    first, second = outcome.first_seconds
    assert first == pytest.approx(COST.step + 100 * COST.prompt_token)
    assert second == pytest.approx(COST.step + 4 * COST.prompt_token)
    assert outcome.total_seconds[0] == pytest.approx(first + 3 * (COST.step + COST.decoding))


def test_a_kv_aware_router_sends_a_prompt_where_it_is_known() -> None:
    trace = [request(0.2 * number, 100 * (number % 4)) for number in range(40)]
    hits = {
        type(router).__name__: simulate(trace, 4, router, COST, LIMITS).hit_tokens
        for router in (KvAware(4, 1, 16), Turns(4, 1), Random(4, 1), Least(4, 1))
    }
    assert hits["KvAware"] == 36 * 96, "each prompt is computed once"
    assert hits["KvAware"] >= max(hits.values())
    assert hits["Random"] < 36 * 96


def test_load_counts_too() -> None:
    trace = [request(0.1, 10), *(request(1 + 0.001 * number, 10, 100, 60) for number in range(12))]
    router = KvAware(3, 0, 16)
    chosen = []
    choose = router.choose
    router.choose = lambda *given: chosen.append(choose(*given)) or chosen[-1]  # type: ignore[method-assign,func-returns-value]
    simulate(trace, 3, router, COST, LIMITS)
    assert {choice.server for choice in chosen[1:4]} == {chosen[0].server}, "it has the prompt, and room"
    assert not router._active and not router._held.any() and not router._to_compute.any()


def test_news_of_pages_is_late() -> None:
    """A router that is asked before it has heard knows nothing."""
    step = COST.step + 100 * COST.prompt_token
    early, late = (
        simulate(
            [request(0, 10, 100, 1), request(step + gap, 10, 100, 1)], 2, router := KvAware(2, 0, 16), COST, LIMITS
        )
        for gap in (EVENT_SECONDS / 2, EVENT_SECONDS * 2)
    )
    assert late.hit_tokens == 96 and len(router._known) == 6
    assert early.hit_tokens in (0, 96)


def test_measured_steps_are_met() -> None:
    """docs/performance.md: tokens a second of 1, 32 and 256 sequences of Llama-3.1-8B on an H100."""
    for num_sequences, tokens_a_second in ((1, 184.4), (32, 4990), (256, 18334)):
        seconds = COST.step + COST.decoding * num_sequences
        assert num_sequences / seconds == pytest.approx(tokens_a_second, rel=0.02)


def test_what_a_benchmark_recorded_is_replayed_round_by_round(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    asked = [(0.1, 0), (0.5, 1), (0.9, 0), (0.2, 0), (0.3, 1)]
    lines = [
        {"seconds": seconds, "head": head, "head_tokens": 32, "own_tokens": 5, "output_tokens": 2}
        for seconds, head in asked
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = traces.recorded(path, 0)
    assert [request.seconds for request in first] == [0.1, 0.5, 0.9] and len(second) == 2
    assert (first[0].token_ids[:32] == first[2].token_ids[:32]).all() and not (
        first[0].token_ids[:32] == first[1].token_ids[:32]
    ).all()
    assert not (first[0].token_ids[:32] == second[0].token_ids[:32]).all(), "a round has heads of its own"
    assert len(first[0].token_ids) == 37


def test_a_conversation_goes_on_from_what_was_said() -> None:
    requests = traces.conversations(60, 2.0, 0)
    later = []
    for one in requests:
        said = len(one.token_ids)
        later += [
            (one, other)
            for other in requests
            if len(other.token_ids) > said and (other.token_ids[:said] == one.token_ids).all()
        ]
    assert later
    assert all(other.token_ids[len(one.token_ids)] == traces.ANSWER_TOKEN for one, other in later)
    assert [request.seconds for request in requests] == sorted(request.seconds for request in requests)
