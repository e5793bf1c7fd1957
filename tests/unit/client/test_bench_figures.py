"""Figures of traces whose numbers are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from paged_client.bench.figures import summarise
from paged_client.bench.profile import Trace, read_profile

MS = 1_000_000
RECORDED = Path(__file__).parent / "recorded_profiles"


def trace(sent_ms: float, arrivals_ms: list[float], tokens: list[int], asked: int | None = None) -> Trace:
    arrivals = np.array([round(each * MS) for each in arrivals_ms], np.int64)
    return Trace(round(sent_ms * MS), arrivals, np.array(tokens, np.int64), sum(tokens) if asked is None else asked)


def test_a_single_request_has_the_figures_one_computes_by_hand() -> None:
    figures = summarise([trace(1000, [1100, 1120, 1160], [1, 1, 2])])
    assert figures.first_token.p50 == pytest.approx(0.100)
    assert figures.inter_token.p50 == pytest.approx(0.060 / 3)  # three tokens after the first response
    assert (figures.gap.mean, figures.gap.p50) == (pytest.approx(0.030), pytest.approx(0.030))
    assert figures.latency.p99 == pytest.approx(0.160)
    assert figures.tokens_per_second == figures.request_speed.p50 == pytest.approx(4 / 0.160)
    assert figures.tokens_per_response == pytest.approx(4 / 3)
    assert (figures.num_requests, figures.num_errors, figures.num_tokens, figures.num_responses) == (1, 0, 4, 3)


def test_total_speed_counts_from_the_first_sent_to_the_last_response() -> None:
    figures = summarise([trace(0, [100, 200], [1, 9]), trace(500, [900, 1000], [1, 9])])
    assert figures.duration == pytest.approx(1.0)
    assert figures.tokens_per_second == pytest.approx(20)
    assert figures.requests_per_second == pytest.approx(2)


def test_the_burst_is_what_was_sent_before_the_first_answer() -> None:
    figures = summarise([trace(0, [50, 60], [1, 1]), trace(10, [80, 90], [1, 1]), trace(55, [400, 410], [1, 1])])
    assert figures.burst_first_token == pytest.approx((0.050 + 0.070) / 2)


def test_percentiles_are_over_requests() -> None:
    figures = summarise([trace(0, [wait, wait + 10], [1, 1]) for wait in range(1, 101)])
    assert figures.first_token.p50 == pytest.approx(0.0505)
    assert figures.first_token.p90 == pytest.approx(0.0901)
    assert figures.first_token.p99 == pytest.approx(0.09901)


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(trace(0, [10, 20], [1, 1], asked=3), id="too few tokens"),
        pytest.param(trace(0, [10, 20], [1, 3], asked=3), id="too many"),
        pytest.param(trace(0, [], [], asked=3), id="no response"),
    ],
)
def test_a_request_without_exactly_its_tokens_is_an_error_and_counts_nowhere_else(broken: Trace) -> None:
    good = trace(100, [150, 200], [1, 4])
    figures, alone = summarise([broken, good]), summarise([good])
    assert (figures.num_requests, figures.num_errors) == (1, 1)
    assert figures.tokens_per_second == alone.tokens_per_second
    assert figures.first_token == alone.first_token


def test_one_response_of_all_tokens_has_no_inter_token_latency() -> None:
    figures = summarise([trace(0, [100], [5])])
    assert math.isnan(figures.inter_token.p50)
    assert math.isnan(figures.gap.p50)
    assert figures.first_token.p50 == figures.latency.p50 == pytest.approx(0.1)


def test_nothing_measured_is_nan_and_zero_and_no_crash() -> None:
    figures = summarise([])
    assert figures.tokens_per_second == figures.num_requests == figures.num_errors == 0
    assert math.isnan(figures.first_token.p50)


def test_a_recorded_run_adds_up() -> None:
    figures = summarise(read_profile([RECORDED / "counted.json"], counted=True))
    assert (figures.num_requests, figures.num_errors, figures.num_tokens) == (4, 0, 32)
    assert 0 < figures.first_token.p50 < figures.latency.p50 <= figures.latency.p99 <= figures.duration
    assert figures.tokens_per_second == pytest.approx(32 / figures.duration)
