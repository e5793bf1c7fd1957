"""The server's side of a run: reads its Prometheus page several times a second."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SERIES = re.compile(r"^(?P<name>[a-zA-Z_:]\w*)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_POLL_SECONDS = 0.1
_READ_SECONDS = 2.0
# the gauges' age when they are read: the engine and its front end each publish four times a second
_PUBLISH_SECONDS = 0.5
_FINISHED = "paged_requests_finished_total{"
_KEPT_LABELS = ("state", "reason")
COUNTERS = (
    "paged_preemptions_total",
    "paged_prefix_cache_queries_total",
    "paged_prefix_cache_hits_total",
    "paged_generation_tokens_total",
    "paged_drafts_proposed_total",
    "paged_drafts_accepted_total",
    "paged_drafts_checked_total",
)


@dataclass(frozen=True)
class PoolSample:
    """The gauges at one moment."""

    time: float  # seconds since 1970
    pages_held: float
    pages_cached: float
    pages_total: float
    page_size: float
    utilisation: float  # live tokens / slots of the held pages
    running: float
    waiting: float


@dataclass(frozen=True)
class PoolFigures:
    """The pool during one run. Means are over time, while pages were held."""

    pages_total: int
    page_size: int
    pages_held_mean: float
    pages_held_max: int
    utilisation: float  # live tokens / slots held, both summed over time
    running_mean: float
    running_max: int
    running_when_full: float  # mean while requests also waited: as many as memory lets run; NaN if none ever waited
    counters: dict[str, float]  # what came to the counters during the run


class PoolWatch:
    """Polls a metrics page from a thread of its own. A server without a page or without our gauges gives no samples."""

    def __init__(self, url: str | None, model_name: str) -> None:
        self._url = url
        self._model_name = model_name
        self._samples: list[PoolSample] = []
        self._last: dict[str, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="pool-watch", daemon=True)

    def __enter__(self) -> PoolWatch:
        if self._url is not None:
            self._last = read_metrics(self._url, self._model_name)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        if self._url is not None:
            self._thread.join()

    def _poll(self) -> None:
        assert self._url is not None
        while not self._stopping.wait(_POLL_SECONDS):
            now = time.time()
            metrics = read_metrics(self._url, self._model_name)
            if metrics:
                self._last = metrics
                sample = _sample(now, metrics)
                if sample is not None:
                    self._samples.append(sample)

    @property
    def num_finished(self) -> float:
        """Requests that the server has answered since it started. A model that does not tell is counted by the server,
        which takes a request of a decoupled model for answered when the model has taken it in.
        """
        reported = [value for name, value in self._last.items() if name.startswith(_FINISHED)]
        if reported:
            return sum(reported)
        return self._last.get("nv_inference_request_success", 0.0) + self._last.get("nv_inference_request_failure", 0.0)

    def counters(self) -> dict[str, float]:
        """Counters as last read."""
        return {name: self._last[name] for name in COUNTERS if name in self._last}

    def samples(self, start: float, end: float) -> list[PoolSample]:
        """What was published of the time between two moments (seconds since 1970), and what was still shown of the idle
        time before.
        """
        return [sample for sample in self._samples if start <= sample.time <= end + _PUBLISH_SECONDS]


def settle() -> None:
    """Waits until the numbers of a run that has just ended are published."""
    time.sleep(2 * _PUBLISH_SECONDS)


def read_metrics(url: str, model_name: str) -> dict[str, float]:
    """Values by `name` or `name{state}`, of one model's series and of those that name none; its versions are added up.
    Empty if unreadable.
    """
    try:
        with urllib.request.urlopen(url, timeout=_READ_SECONDS) as answer:
            page = answer.read().decode(errors="replace")
    except (OSError, ValueError):
        return {}
    values: dict[str, float] = defaultdict(float)
    for found in _SERIES.finditer(page):
        labels = dict(_LABEL.findall(found["labels"] or ""))
        if labels.get("model", model_name) == model_name:
            kept = [labels[name] for name in _KEPT_LABELS if name in labels]
            values[found["name"] + (f"{{{kept[0]}}}" if kept else "")] += float(found["value"])
    return dict(values)


def _sample(now: float, metrics: dict[str, float]) -> PoolSample | None:
    if not metrics.get("paged_pages_total"):
        return None
    return PoolSample(
        time=now,
        pages_held=metrics.get("paged_pages{held}", 0.0),
        pages_cached=metrics.get("paged_pages{cached}", 0.0),
        pages_total=metrics["paged_pages_total"],
        page_size=metrics.get("paged_page_size", 0.0),
        utilisation=metrics.get("paged_utilisation", 0.0),
        running=metrics.get("paged_requests{running}", 0.0),
        waiting=metrics.get("paged_requests{waiting}", 0.0),
    )


def pool_figures(samples: Sequence[PoolSample], counters: dict[str, float]) -> PoolFigures | None:
    """None if there are no samples with pages held: no gauges, or too short a run."""
    busy = [sample for sample in samples if sample.pages_held > 0]
    if not busy:
        return None
    held = np.array([sample.pages_held for sample in busy])
    live = held * np.array([sample.utilisation for sample in busy])
    running = np.array([sample.running for sample in busy])
    full = running[np.array([sample.waiting > 0 for sample in busy])]
    return PoolFigures(
        pages_total=int(busy[-1].pages_total),
        page_size=int(busy[-1].page_size),
        pages_held_mean=float(held.mean()),
        pages_held_max=int(held.max()),
        utilisation=float(live.sum() / held.sum()),
        running_mean=float(running.mean()),
        running_max=int(running.max()),
        running_when_full=float(full.mean()) if len(full) else float("nan"),
        counters=counters,
    )
