"""What the traces of a run come to. Every figure is defined here, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from paged_client.bench.profile import Trace

NANO = 1e-9
Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """A distribution in brief; NaN throughout if nothing was measured."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Seconds) -> Spread:
        if not len(values):
            return cls(*[float("nan")] * 4)
        return cls(float(values.mean()), *(float(value) for value in np.percentile(values, [50, 90, 99])))


@dataclass(frozen=True)
class Figures:
    """One run at one level of load. Times in seconds.

    first_token: from sending a request to its first tokens. inter_token: mean time between a request's tokens after its
    first response, one value a request. gap: time between a request's consecutive responses. latency: from sending to
    the last tokens.
    """

    num_requests: int  # that got all the tokens they asked for
    num_errors: int  # that did not
    duration: float  # from the first request sent to the last response
    num_tokens: int
    num_responses: int
    tokens_per_second: float
    requests_per_second: float
    tokens_per_response: float
    first_token: Spread
    inter_token: Spread
    gap: Spread
    latency: Spread
    request_speed: Spread  # tokens a second of single requests, waiting for the first included
    burst_first_token: float  # mean over the requests that were sent before any answer came; NaN if none came
    samples: Samples = field(repr=False)


@dataclass(frozen=True)
class Samples:
    """Every single value, for plots."""

    first_token: Seconds
    inter_token: Seconds
    gap: Seconds
    latency: Seconds


def summarise(traces: Sequence[Trace]) -> Figures:
    """Figures of a run. Requests that brought fewer or more tokens than they asked for are errors: they count in
    num_errors and nowhere else.
    """
    whole = [trace for trace in traces if len(trace.arrivals) and trace.num_tokens == trace.asked]
    sent = np.array([trace.sent for trace in whole], np.int64)
    first = np.array([trace.arrivals[0] for trace in whole], np.int64)
    last = np.array([trace.arrivals[-1] for trace in whole], np.int64)
    num_tokens = np.array([trace.num_tokens for trace in whole], np.int64)
    later_tokens = num_tokens - np.array([trace.tokens[0] for trace in whole], np.int64)
    duration = float(last.max() - sent.min()) * NANO if whole else 0.0
    first_token, latency = (first - sent) * NANO, (last - sent) * NANO
    gaps = np.concatenate([np.diff(trace.arrivals) for trace in whole]) * NANO if whole else np.zeros(0)
    spans = (last - first)[later_tokens > 0] * NANO
    samples = Samples(first_token, spans / later_tokens[later_tokens > 0], gaps, latency)
    num_responses = sum(len(trace.arrivals) for trace in whole)
    in_burst = sent < first.min() if whole else np.zeros(0, bool)
    return Figures(
        num_requests=len(whole),
        num_errors=len(traces) - len(whole),
        duration=duration,
        num_tokens=int(num_tokens.sum()),
        num_responses=num_responses,
        tokens_per_second=_ratio(num_tokens.sum(), duration),
        requests_per_second=_ratio(len(whole), duration),
        tokens_per_response=_ratio(num_tokens.sum(), num_responses),
        first_token=Spread.of(first_token),
        inter_token=Spread.of(samples.inter_token),
        gap=Spread.of(gaps),
        latency=Spread.of(latency),
        request_speed=Spread.of(num_tokens / latency),
        burst_first_token=float(first_token[in_burst].mean()) if in_burst.any() else float("nan"),
        samples=samples,
    )


def _ratio(amount: float, by: float) -> float:
    return float(amount / by) if by else 0.0
