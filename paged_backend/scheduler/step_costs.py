"""What steps cost: how long they take, found out while serving, from steps that have ended.

Two questions are answered from it. How many drafts pay (speculation=auto)? A draft is computed beside the rows' own
tokens; on an idle GPU that is almost free, on two CPU cores or beside many rows it is not. And how many prompt tokens
may a step have beside sequences that decode (max_step_seconds)? A chunk of a prompt takes the longer the more tokens it
has, and the more stand before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paged_backend.arrays import Int32
from paged_backend.batch import MOST_DRAFTING, Batch

_LATEST = 0.3  # what the newest step with drafts counts
_LEAST_GAIN = 1.02  # for less it is not worth being wrong
_PLAIN_AFTER = 32  # steps with drafts, then one without: what it takes changes, too
_SHORTEST_PAUSE, _LONGEST_PAUSE = 32, 1024  # steps that had no drafts for their costs, then they are tried again
# Guessed of the first step that is measured: that being a step took as long as so many tokens, and that each token that
# its tokens read took such a part of one. Few for the first, much for the second: chunks that are too short at first
# cost little, chunks that are too long stall those who decode.
_TOKENS_OF_A_STEP = 20.0
_TOKENS_OF_A_READ = 1 / 2000
# The next three were tried out on simulated devices, with noise, steps that are held up, and changes of speed.
# One that takes longer or shorter than so many times what was expected was held up by something else, or its clock was
# read late: no step counts for more.
_MOST_TIMES = 2.0
_CHANGE = 0.05  # how much what a step costs may change from one step to the next, as a part of it
_NOISE = 0.2  # how much a step may differ from others like it, as a part of its time
# Of a step, of a token or of one that is read: nothing is as fast, and sums with it stay numbers.
_LEAST_SECONDS = 1e-15


class StepCosts:
    """Owns the clock of the steps in flight that are measured: those that compute prompts and are told of, or all."""

    def __init__(
        self, num_drafts: int = 0, windows: tuple[int | None, ...] = (None,), every_step: bool = False
    ) -> None:
        """num_drafts: of a row in a step, at most. windows: tokens that each KV group's layers read at most; None:
        all.
        """
        self.drafts = DraftCosts(num_drafts)
        self.prompts = PromptCosts(windows)
        self.measures_next = every_step  # `begins` is to be called for the next step
        self.begun: dict[int, float] = {}  # steps in flight that are measured; while there are any, `ends` is called
        self._every_step = every_step
        self._ended = 0.0  # the newest step that has

    def begins(self, step: int, now: float) -> None:
        """A step is about to be launched."""
        self.begun[step] = now
        self.measures_next = self._every_step

    def ends(self, batch: Batch, now: float) -> None:
        """A step's result is here. It may have been launched while the step before was computed, and began then where
        that one ended.
        """
        begun, ended = self.begun.pop(batch.step, now), self._ended
        self._ended = now
        seconds = now - max(begun, ended)
        if seconds <= 0:
            return
        num_drafts = 0 if batch.drafts is None else int(batch.drafts.counts.sum())
        if batch.num_tokens - num_drafts == batch.num_sequences:
            self.drafts.learn(batch.num_sequences, num_drafts, seconds)
        else:
            self.prompts.learn(batch.starts, batch.counts, seconds)


class PromptCosts:
    """Owns the seconds of steps that compute prompts: so many for being a step, so many more for each token, and so
    many for each token that one of them reads, which are all before it and itself.

    A Kalman filter (Kalman, 1960) estimates the three: it keeps how sure of them it is, so that a step corrects what
    earlier ones have left open, and what they have settled only slowly. The device need not be as simple as that, as
    long as it is so for steps like the latest ones.
    """

    def __init__(self, windows: tuple[int | None, ...] = (None,)) -> None:
        self._windows = np.array([np.inf if window is None else window for window in windows])
        self._seconds = np.zeros(3)  # of a step, of a token, of a token that is read; 0: not known yet
        self._doubt = np.zeros((3, 3))  # their covariance
        self._surprise = 0.0  # how much longer the newest step took than expected, as a part of that

    @property
    def known(self) -> bool:
        return bool(self._seconds[1])

    def learn(self, starts: Int32, counts: Int32, seconds: float) -> None:
        """A step took so many seconds that computed counts[i] tokens of each sequence, the first at starts[i]."""
        work = self._work(starts, counts)
        if not self.known:
            guess = np.array([_TOKENS_OF_A_STEP, 1.0, _TOKENS_OF_A_READ])
            self._seconds = guess * (seconds / float(guess @ work))
            self._doubt = np.diag(self._seconds**2)
            return
        expected = float(self._seconds @ work)
        surprise = min(max(seconds / expected, 1 / _MOST_TIMES), _MOST_TIMES) - 1
        before, self._surprise = self._surprise, surprise
        # two in a row that are more than noise, and no outlier: the device has changed
        lasting = min(abs(before), abs(surprise)) if before * surprise > 0 else 0.0
        self._doubt += np.diag(((_CHANGE + max(lasting - _NOISE, 0.0)) * self._seconds) ** 2)
        doubt = self._doubt @ work
        variance = float(work @ doubt) + (_NOISE * expected) ** 2
        self._doubt -= np.outer(doubt, doubt) / variance
        correction = doubt * (surprise * expected / variance)
        # none may become nothing, for no step takes less than no time
        found = np.maximum(self._seconds + correction, np.maximum(self._seconds / 2, _LEAST_SECONDS))
        # what that left of one must not make more of the step than the correction did
        self._seconds = found * min(1.0, (expected + float(correction @ work)) / float(found @ work))

    def expected(self, starts: Int32, counts: Int32) -> float:
        """The seconds of such a step."""
        return float(self._seconds @ self._work(starts, counts))

    def more(self, start: int, count: int) -> float:
        """The seconds that a step takes longer with `count` more tokens of a sequence, the first at `start`."""
        return count * self._a_token(start, count)

    def fitting(self, seconds: float, start: int) -> int:
        """How many tokens of a sequence, the first at `start`, make a step take so many seconds longer, at most."""
        too_many = seconds / self._a_token(start, 1)  # as if the later ones read no more than the first
        too_few = seconds / self._a_token(start, too_many)  # as if all read as much as those of so many
        # Their geometric mean is too many still, and near: what comes of that is too few by a twelfth at most.
        return int(seconds / self._a_token(start, math.sqrt(too_many * too_few)))

    def _a_token(self, start: int, count: float) -> float:
        """The seconds of each of `count` tokens, on average."""
        return float(self._seconds[1] + self._seconds[2] * self._read(start, count))

    def _work(self, starts: Int32, counts: Int32) -> NDArray[np.float64]:
        return np.array([1.0, counts.sum(), counts @ self._read(starts, counts)])

    def _read(self, starts: Int32 | int, counts: Int32 | float) -> NDArray[np.float64]:
        """How many tokens each of counts[i] tokens reads, the first at starts[i], on average over them and the
        layers.
        """
        read: NDArray[np.float64] = np.minimum.outer(starts + (counts + 1) / 2, self._windows).mean(axis=-1)
        return read


class DraftCosts:
    """Owns the seconds of decode steps with drafts and without, each a moving average; 0: not known yet.

    Steps of more than MOST_DRAFTING rows never have drafts and are no concern here.
    """

    def __init__(self, num_drafts: int) -> None:
        """num_drafts: of a row in a step, at most."""
        self._plain = [0.0] * (MOST_DRAFTING + 1)  # by rows
        self._drafting = np.zeros(MOST_DRAFTING * (1 + num_drafts) + 1)  # by rows and drafts together
        self._since_plain = [0] * (MOST_DRAFTING + 1)  # steps with drafts, by rows
        # One that takes longer than so many without drafts was held up by something else: no drafts could pay for it.
        self._most_times = 2.0 * (1 + num_drafts)
        self._refused = 0  # steps that had no drafts for their costs, since they were tried
        self._pause = _SHORTEST_PAUSE

    def learn(self, rows: int, drafts: int, seconds: float) -> None:
        """A step took so many seconds that computed a token of each row, and so many drafts."""
        if rows > MOST_DRAFTING:
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
