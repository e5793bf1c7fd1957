"""What operators see on `/metrics`: names and meanings, once; and the numbers on their way there.

Publishing a value is a round trip to the server, so numbers gather here and `triton_io` publishes them a few times a
second. Every family carries the labels `model` and `version`; front ends publish to the same series, where counters and
histograms add up.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count

from paged_backend.config import EngineConfig
from paged_backend.errors import ErrorKind
from paged_backend.messages import PROPOSERS, Ready, Stats


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Family:
    name: str
    kind: Kind
    description: str
    label: str = ""  # the label that tells the family's series apart
    values: tuple[str, ...] = ("",)  # of that label
    buckets: tuple[float, ...] = ()  # upper bounds, of a histogram


Series = tuple[str, str]
"""A family's name and the value of its label ("" if it has none)."""

_SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LONG_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_LENGTHS = tuple(2.0**power for power in range(18))  # tokens: 1 to 131,072

FAMILIES = (
    Family(
        "paged_pages",
        Kind.GAUGE,
        "Pages of the pool by state; cached pages are unheld, and free when needed.",
        "state",
        ("free", "held", "cached"),
    ),
    Family("paged_pool_pages", Kind.GAUGE, "Pages in the pool."),
    Family(
        "paged_pages_total",
        Kind.GAUGE,
        "The same as paged_pool_pages by its first name, which is one for counters; kept for old dashboards.",
    ),
    Family("paged_page_size", Kind.GAUGE, "Tokens a page."),
    Family("paged_max_loras", Kind.GAUGE, "Adapters that the device has room for; 0: none are served."),
    Family("paged_utilisation", Kind.GAUGE, "Live tokens per slot of the held pages; 0 when none is held."),
    Family("paged_requests", Kind.GAUGE, "Requests in the engine by state.", "state", ("running", "waiting")),
    Family(
        "paged_preemptions_total", Kind.COUNTER, "Sequences that lost their pages to others and were recomputed later."
    ),
    Family(
        "paged_engine_restarts_total",
        Kind.COUNTER,
        "Engine processes started in the place of one that died; live requests went on.",
    ),
    Family("paged_prefix_cache_queries_total", Kind.COUNTER, "Prompt tokens looked up in the prefix cache."),
    Family("paged_prefix_cache_hits_total", Kind.COUNTER, "Prompt tokens found in the prefix cache."),
    Family(
        "paged_drafts_proposed_total",
        Kind.COUNTER,
        "Guessed tokens that steps have checked (speculation).",
        "method",
        PROPOSERS,
    ),
    Family(
        "paged_drafts_accepted_total",
        Kind.COUNTER,
        "Guessed tokens that were right: each saved a step of its request.",
        "method",
        PROPOSERS,
    ),
    Family(
        "paged_drafts_checked_total",
        Kind.COUNTER,
        "Times that a sequence had guessed tokens in a step: accepted ones over these is the mean accepted length.",
        "method",
        PROPOSERS,
    ),
    Family("paged_prompt_tokens_total", Kind.COUNTER, "Prompt tokens of requests that got a first token."),
    Family("paged_generation_tokens_total", Kind.COUNTER, "Tokens generated."),
    Family(
        "paged_requests_finished_total",
        Kind.COUNTER,
        "Requests that got their final response. invalid: the caller's mistake; unsupported: not by this server; "
        "overloaded: not now; internal: our fault.",
        "reason",
        ("stop", "length", *(kind.value for kind in ErrorKind)),
    ),
    Family(
        "paged_time_to_first_token_seconds",
        Kind.HISTOGRAM,
        "From a request's arrival to its first token.",
        buckets=_LONG_SECONDS,
    ),
    Family(
        "paged_time_per_output_token_seconds",
        Kind.HISTOGRAM,
        "Mean time between a request's tokens after the first.",
        buckets=_SHORT_SECONDS,
    ),
    Family(
        "paged_request_seconds",
        Kind.HISTOGRAM,
        "From a request's arrival to its final response.",
        buckets=_LONG_SECONDS,
    ),
    Family(
        "paged_queue_seconds",
        Kind.HISTOGRAM,
        "From a request's arrival to its admission by the scheduler.",
        buckets=(0.001, 0.005, *_LONG_SECONDS),
    ),
    Family(
        "paged_request_prompt_tokens",
        Kind.HISTOGRAM,
        "Prompt tokens of a request that got a first token.",
        buckets=_LENGTHS,
    ),
    Family(
        "paged_request_generation_tokens",
        Kind.HISTOGRAM,
        "Tokens generated for a request, all its sequences together.",
        buckets=_LENGTHS,
    ),
    # The names of NVIDIA's TensorRT-LLM backend: load balancers and Triton Server's own ORCA response header read them.
    Family(
        "nv_trt_llm_kv_cache_block_metrics",
        Kind.GAUGE,
        "Pages by the names that load balancers know; free ones include cached ones.",
        "kv_cache_block_type",
        ("max", "free", "used", "tokens_per", "reused", "fraction"),
    ),
    Family(
        "nv_trt_llm_request_metrics",
        Kind.GAUGE,
        "Requests by the names that load balancers know.",
        "request_type",
        ("active", "max", "scheduled", "waiting"),
    ),
)


_NOTHING = Stats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)  # of an engine that has done nothing, or is not there


def reason_of(kind: ErrorKind) -> str:
    """What `paged_requests_finished_total` calls an end by such an error."""
    return kind.value


def gauges(stats: Stats, ready: Ready, config: EngineConfig) -> dict[Series, float]:
    """The gauges' values at the moment of `stats`."""
    num_held_slots = stats.pages_held * ready.page_size
    pages = "nv_trt_llm_kv_cache_block_metrics"
    requests = "nv_trt_llm_request_metrics"
    return {
        ("paged_pages", "free"): stats.pages_free,
        ("paged_pages", "held"): stats.pages_held,
        ("paged_pages", "cached"): stats.pages_cached,
        ("paged_pool_pages", ""): ready.num_pages,
        ("paged_pages_total", ""): ready.num_pages,
        ("paged_page_size", ""): ready.page_size,
        ("paged_max_loras", ""): config.max_loras if config.lora_directory else 0,
        ("paged_utilisation", ""): stats.live_tokens / num_held_slots if num_held_slots else 0.0,
        ("paged_requests", "running"): stats.num_running,
        ("paged_requests", "waiting"): stats.num_waiting,
        (pages, "max"): ready.num_pages,
        (pages, "free"): stats.pages_free + stats.pages_cached,
        (pages, "used"): stats.pages_held,
        (pages, "tokens_per"): ready.page_size,
        (pages, "reused"): stats.prefix_hits // ready.page_size,
        (pages, "fraction"): stats.pages_held / ready.num_pages,
        (requests, "active"): stats.num_running + stats.num_waiting,
        (requests, "max"): ready.max_num_sequences,
        (requests, "scheduled"): stats.num_running,
        (requests, "waiting"): stats.num_waiting,
    }


@dataclass(frozen=True)
class Measurements:
    """What is to be published: the newest gauges, and what came to counters and histograms since the last time."""

    gauges: dict[int, dict[Series, float]]  # of each replica that this front end owns
    increments: dict[Series, float]
    observations: dict[Series, list[float]]


class Tally:
    """A front end's numbers since they were last published. Thread-safe."""

    def __init__(self, config: EngineConfig, readies: Sequence[Ready]) -> None:
        """readies: of each replica."""
        self._config = config
        self._readies = readies
        self._lock = threading.Lock()
        self._gauges: dict[int, dict[Series, float]] = {}
        self._increments: dict[Series, float] = defaultdict(float)
        self._observations: dict[Series, list[float]] = defaultdict(list)
        # one more of paged_generation_tokens_total: called for each token of each stream, it is a function of C, which
        # needs no lock, and counts its own calls
        self.add_token: Callable[[], int] = count().__next__
        self._num_drained = 0  # of those calls; draining is one itself
        self._last_stats: dict[int, Stats] = {}  # by replica
        self._inherits: set[int] = set()  # replicas

    @property
    def num_replicas(self) -> int:
        return len(self._readies)

    def add(self, name: str, amount: float = 1, label: str = "") -> None:
        with self._lock:
            self._increments[name, label] += amount

    def observe(self, name: str, value: float) -> None:
        with self._lock:
            self._observations[name, ""].append(value)

    def take_stats(self, stats: Stats, replica: int = 0) -> None:
        """The engine's numbers: it counts from its own start, so the difference to the last time is what counts
        here.
        """
        last, self._last_stats[replica] = self._last_stats.get(replica), stats
        if replica in self._inherits:
            last = stats
            self._inherits.discard(replica)
        if last is None or stats.num_steps < last.num_steps:  # the first of an engine
            last = _NOTHING
        with self._lock:
            self._gauges[replica] = gauges(stats, self._readies[replica], self._config)
            self._increments["paged_preemptions_total", ""] += stats.num_preemptions - last.num_preemptions
            self._increments["paged_prefix_cache_queries_total", ""] += stats.prefix_queries - last.prefix_queries
            self._increments["paged_prefix_cache_hits_total", ""] += stats.prefix_hits - last.prefix_hits
            if method := self._readies[replica].proposer:
                self._increments["paged_drafts_proposed_total", method] += stats.drafts_proposed - last.drafts_proposed
                self._increments["paged_drafts_accepted_total", method] += stats.drafts_accepted - last.drafts_accepted
                self._increments["paged_drafts_checked_total", method] += stats.drafts_checked - last.drafts_checked
            self._observations["paged_queue_seconds", ""].extend(stats.queue_times)

    def inherit(self, replica: int = 0) -> None:
        """The front end that told the engine's numbers so far died: what it counted is told already."""
        self._inherits.add(replica)

    def note_restart(self, replica: int = 0) -> None:
        """Another engine, which counts from zero."""
        self._last_stats.pop(replica, None)
        self._inherits.discard(replica)
        self.add("paged_engine_restarts_total")

    def note_gone(self, replica: int = 0) -> None:
        """There is no engine any more, and nothing in it."""
        with self._lock:
            self._gauges[replica] = gauges(_NOTHING, self._readies[replica], self._config)

    def drain(self) -> Measurements:
        """Everything since the last call."""
        with self._lock:
            num_calls = self.add_token()
            if num_calls > self._num_drained:
                self._increments["paged_generation_tokens_total", ""] += num_calls - self._num_drained
            self._num_drained = num_calls + 1
            drained = Measurements(self._gauges, dict(self._increments), dict(self._observations))
            self._gauges, self._increments, self._observations = {}, defaultdict(float), defaultdict(list)
        return drained
