"""From snapshots to rates: what the terminal and the browser show."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from paged_backend.engine.snapshot import Snapshot

LENGTH = 240  # snapshots: a minute, at four a second
_RECENT = 8  # snapshots that the numbers beside the curves look back on


@dataclass(frozen=True)
class Moment:
    """Between two snapshots. None: nothing happened that could be measured."""

    tokens_per_second: float
    first_token_ms: float | None  # mean, of the requests that got their first token
    inter_token_ms: float | None  # mean, of the steps that brought tokens


class History:
    """The last minute of one engine."""

    def __init__(self) -> None:
        self.moments: deque[Moment] = deque(maxlen=LENGTH)
        self._snapshots: deque[Snapshot] = deque(maxlen=LENGTH + 1)
        self.num_used_cells = 0  # of the map, from its beginning: beyond them every page was free as long as we watch

    def add(self, snapshot: Snapshot) -> None:
        if self._snapshots and not _continues(self._snapshots[-1], snapshot):
            self._snapshots.clear()
            self.moments.clear()
            self.num_used_cells = 0
        if self._snapshots:
            last = self._snapshots[-1]
            self.moments.append(
                Moment(
                    (snapshot.num_tokens - last.num_tokens) / (snapshot.time - last.time),
                    _mean_ms(snapshot.first_token_seconds),
                    _mean_ms(snapshot.step_seconds),
                )
            )
        self._snapshots.append(snapshot)
        used = np.flatnonzero(np.frombuffer(snapshot.cells, "<u2"))
        self.num_used_cells = max(self.num_used_cells, int(used[-1]) + 1 if len(used) else 0)

    @property
    def tokens_per_second(self) -> float:
        """Of the last two seconds."""
        recent = list(self._snapshots)[-_RECENT - 1 :]
        if len(recent) < 2:
            return 0.0
        return (recent[-1].num_tokens - recent[0].num_tokens) / (recent[-1].time - recent[0].time)

    @property
    def first_token_ms(self) -> float | None:
        """Mean of the last minute's requests."""
        return _mean_ms([seconds for snapshot in self._snapshots for seconds in snapshot.first_token_seconds])

    @property
    def inter_token_ms(self) -> float | None:
        """Mean of the last two seconds' steps, or of the last ones that there were."""
        recent = [moment.inter_token_ms for moment in self.moments if moment.inter_token_ms is not None][-_RECENT:]
        return fmean(recent) if recent else None

    @property
    def hit_rate(self) -> float | None:
        """Prompt tokens found in the prefix cache, of those looked up in the last minute."""
        if not self._snapshots:
            return None
        first, last = self._snapshots[0], self._snapshots[-1]
        queries = last.prefix_queries - first.prefix_queries
        return (last.prefix_hits - first.prefix_hits) / queries if queries else None


def right_drafts(snapshot: Snapshot) -> tuple[float, float] | None:
    """Since the start: the share of drafts that were right, and how many of a sequence in a step; None: there were
    none.
    """
    if not snapshot.drafts_checked:
        return None
    return snapshot.drafts_accepted / snapshot.drafts_proposed, snapshot.drafts_accepted / snapshot.drafts_checked


def hit_rate_since_start(snapshot: Snapshot) -> float | None:
    return snapshot.prefix_hits / snapshot.prefix_queries if snapshot.prefix_queries else None


def utilisation(snapshot: Snapshot) -> float | None:
    """Live tokens per slot held; None if none is held."""
    slots = snapshot.pages_held * snapshot.page_size
    return snapshot.live_tokens / slots if slots else None


def _continues(last: Snapshot, snapshot: Snapshot) -> bool:
    """False for another engine, or the same one after nobody watched for a while."""
    return snapshot.time > last.time and snapshot.num_tokens >= last.num_tokens and snapshot.num_pages == last.num_pages


def _mean_ms(seconds: list[float] | tuple[float, ...]) -> float | None:
    return 1000 * fmean(seconds) if seconds else None
