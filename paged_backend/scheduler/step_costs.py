"""What drafts cost: how long steps take, by how many tokens they compute.

A draft is computed beside the rows' own tokens. On an idle GPU that is almost free, on two CPU cores or beside many
rows it is not; which it is, is measured, while serving. So speculation=auto knows how many drafts pay: as many as bring
the most tokens a second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paged_backend.batch import MOST_DRAFTING, Batch

_LATEST = 0.3  # what the newest step counts
_LEAST_GAIN = 1.02  # for less it is not worth being wrong
_PLAIN_AFTER = 32  # steps with drafts, then one without: what it takes changes, too
_SHORTEST_PAUSE, _LONGEST_PAUSE = 32, 1024  # steps that had no drafts for their costs, then they are tried again


class StepCosts:
    """Owns the seconds of decode steps with drafts and without, each a moving average; 0: not known yet.

    Steps that compute prompts, or more than MOST_DRAFTING rows, never have drafts and are no concern here.
    """

    def __init__(self, num_drafts: int) -> None:
        """num_drafts: of a row in a step, at most."""
        self._plain = [0.0] * (MOST_DRAFTING + 1)  # by rows
        self._drafting = np.zeros(MOST_DRAFTING * (1 + num_drafts) + 1)  # by rows and drafts together
        self._since_plain = [0] * (MOST_DRAFTING + 1)  # steps with drafts, by rows
        self._begun: dict[int, float] = {}  # steps in flight
        self._ended = 0.0  # the newest that has
        # One that takes longer than so many without drafts was held up by something else: no drafts could pay for it.
        self._most_times = 2.0 * (1 + num_drafts)
        self._refused = 0  # steps that had no drafts for their costs, since they were tried
        self._pause = _SHORTEST_PAUSE

    def begins(self, step: int, now: float) -> None:
        self._begun[step] = now

    def ends(self, batch: Batch, now: float) -> None:
        """A step is over that may have been launched while the one before was computed."""
        begun = self._begun.pop(batch.step, now)
        seconds = now - max(begun, self._ended)
        self._ended = now
        rows = batch.num_sequences
        if rows > MOST_DRAFTING or seconds <= 0:
            return
        drafts = 0 if batch.drafts is None else int(batch.drafts.counts.sum())
        if batch.num_tokens - drafts != rows:
            return
        usual = self._plain[rows]
        seconds = min(seconds, self._most_times * usual) if usual else seconds
        if drafts:
            before = float(self._drafting[rows + drafts]) or usual or seconds
            self._drafting[rows + drafts] = before + _LATEST * (seconds - before)
            self._since_plain[rows] += 1
        else:
            self._plain[rows] = (usual or seconds) + _LATEST * (seconds - (usual or seconds))
            self._since_plain[rows] = 0

    def most_drafts(self, wanted: Sequence[int], shares: Sequence[float]) -> int:
        """How many drafts a row may have in a step: rows i would have wanted[i], each right with probability
        shares[i] if those before it are. 0: they do not pay, or a step without any is due.
        """
        rows, most = len(wanted), max(wanted)
        if not most:
            return 0
        plain = self._plain[rows]
        if not plain or self._since_plain[rows] >= _PLAIN_AFTER:
            return 0
        capped = np.minimum(np.arange(most + 1)[:, None], np.array(wanted))  # [most + 1, rows]
        share = np.minimum(np.array(shares), 0.99)
        brought = (1 + share * (1 - share**capped) / (1 - share)).sum(axis=1)
        known = np.flatnonzero(self._drafting)
        known = known[known > rows]
        tokens, seconds = np.append(rows, known), np.append(plain, self._drafting[known])
        rates = brought / np.interp(rows + capped.sum(axis=1), tokens, seconds)
        best = int(rates.argmax())
        if rates[best] >= _LEAST_GAIN * rates[0]:
            self._refused, self._pause = 0, _SHORTEST_PAUSE
            return best
        self._refused += 1
        if self._refused <= self._pause:
            return 0
        self._refused, self._pause = 0, min(2 * self._pause, _LONGEST_PAUSE)
        return most
