"""Sequences whose steps may bring several tokens: how many drafts of each a step computes.

Drafts are guesses at a sequence's next tokens, which the device makes (kernels/ngram.py) and checks: a draft is
right if it is the token that is sampled there anyway, with the random number that its position has. So no token ever
depends on whether there were drafts, how many, or how good they were; only how soon it comes does. That leaves this
room free to decide by what pays: drafts get what the others leave of a step's budget and of the pages, and a sequence
whose drafts are wrong pauses, longer each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.batch import MOST_DRAFTING, Drafts, Feature
from paged_backend.messages import Submit
from paged_backend.scheduler.features import SchedulerFeature
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.running import RunningSequences
from paged_backend.scheduler.sequence import Sequence

_LONGEST_PAUSE = 15  # steps
# What comes next depends on all tokens before, and the host must know them.
_KEEPS_STILL = Feature.GUIDED | Feature.BEAM


@dataclass
class _Pace:
    """How many drafts a sequence's next step has."""

    most: int
    now: int
    pause: int = 0  # steps without any, from now on
    next_pause: int = 1

    def next(self) -> int:
        if self.pause:
            self.pause -= 1
            return 0
        return self.now

    def note(self, num_drafts: int, num_right: int) -> None:
        """After a pause one draft is tried; where it is right there are more."""
        if num_right:
            self.now, self.next_pause = self.most, 1
        elif num_drafts:
            self.now, self.pause = 1, self.next_pause
            self.next_pause = min(2 * self.next_pause + 1, _LONGEST_PAUSE)


class Speculation(SchedulerFeature):
    """Owns the pace of each sequence that may have drafts, and the counts of drafts."""

    def __init__(self, limits: SchedulerLimits, running: RunningSequences) -> None:
        self._most = limits.num_drafts
        self._budget = limits.max_batched_tokens
        self._running = running
        self._paces: dict[Sequence, _Pace] = {}
        self.in_use = False  # some living sequence may have drafts
        self.num_proposed = 0
        self.num_accepted = 0

    def enter(self, sequence: Sequence, request: Submit) -> bool:
        spec = sequence.spec
        sampling = spec.sampling
        if not self._most or sampling.speculation == "off" or spec.features & _KEEPS_STILL:
            return False
        # one is over with a token; of the other a token may be replaced when it is known
        if sampling.pooling is not None or sampling.max_thinking_tokens is not None:
            return False
        self._paces[sequence] = _Pace(self._most, self._most)
        self.in_use = True
        return True

    def leave(self, sequence: Sequence) -> None:
        del self._paces[sequence]
        self.in_use = bool(self._paces)

    def drafts(self, rows: Int32, counts: Int32) -> Drafts | None:
        """For a step that computes counts[i] tokens of rows[i], all of which have their pages. Pages for drafts are
        taken, if nobody else misses them. None: there are no drafts, and all lengths are known.
        """
        unsure = self.rows.unsure[rows]
        drafts = np.zeros_like(counts)
        if len(rows) <= MOST_DRAFTING and bool((counts == 1).all()):
            left = self._budget - len(rows)
            for entry, row in enumerate(rows.tolist()):
                if left > 0:
                    drafts[entry] = self._drafts_of(row, left)
                    left -= int(drafts[entry])
        return Drafts(drafts, unsure) if drafts.any() or unsure.any() else None

    def _drafts_of(self, row: int, most: int) -> int:
        """So many that the row reaches neither its limit nor the end of its pages, even if all of those in flight are
        right.
        """
        table = self.rows
        runner = table.sequences[row]
        pace = None if runner is None else self._paces.get(runner)
        start = int(table.num_computed[row])
        if pace is None or table.num_tokens[row] != start + 1:
            return 0
        assert runner is not None
        wanted = min(pace.next(), most, int(table.length_limit[row]) - 2 - start)
        while wanted > 0 and table.capacity[row] < start + 1 + wanted:
            room, groups = self._running.pages.pool.num_available, len(self._running.pages.windows)
            if room < self._running.headroom() + groups or not self._running.append_page(runner):
                wanted = int(table.capacity[row]) - start - 1
        return max(wanted, 0)

    def note(self, sequence: Sequence, num_drafts: int, num_right: int) -> None:
        """A step's result is here."""
        pace = self._paces.get(sequence)
        if pace is not None:
            pace.note(num_drafts, num_right)
        self.num_proposed += num_drafts
        self.num_accepted += num_right
