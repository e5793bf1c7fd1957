"""What steps cost: how long they take, found out while serving, from steps that have ended.

Two questions are answered from it. How many drafts pay (speculation=auto)? A draft is computed beside the rows' own
tokens; on an idle GPU that is almost free, on two CPU cores or beside many rows it is not. And how many prompt tokens
may a step have beside sequences that decode (max_step_seconds)? A chunk of a prompt takes the longer the more tokens it
has, and the more stand before it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from paged_backend.arrays import Int32
from paged_backend.batch import MOST_DRAFTING, Batch

_LATEST = 0.3  # what the newest step with drafts counts
_LEAST_GAIN = 1.02  # for less it is not worth being wrong
# steps with drafts, then one without: what it takes changes, too; twice as many each time that drafts paid still
_PLAIN_AFTER, _PLAIN_AFTER_AT_MOST = 32, 512
_SHORTEST_PAUSE, _LONGEST_PAUSE = 32, 1024  # steps that had no drafts for their costs, then they are tried again
_PLAIN_EVERY = 8  # where there are no drafts, so many steps are not looked at, then one is
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
        """num_drafts: of a row in a step, at most. windows: tokens that each KV group's layers read at most; None: all.
        every_step: it is to be found out what decode steps cost.
        """
        self.drafts = DraftCosts(num_drafts)
        self.prompts = PromptCosts(windows)
        self.measures_next = False  # `begins` is to be called for the next step
        self.every_step = every_step  # and for all that might have drafts
        # steps in flight that are measured, and when they were launched; while there are any, `ends` is called
        self.begun: dict[int, tuple[Batch, float]] = {}
        self._ended = 0.0  # the newest step that has
        self._kind_of_ended = ""
        self._num_skipped = _PLAIN_EVERY  # steps without drafts that were not looked at, in a row
        self._surplus = 0.0  # seconds that the newest one took longer than usual, for the drafts of the next

    def begins(self, batch: Batch, now: float) -> None:
        """A step is about to be launched."""
        if not self.begun:  # whatever was launched before was not measured
            self._kind_of_ended = ""
        self.begun[batch.step] = batch, now
        self.measures_next = False

    def ends(self, batch: Batch, now: float) -> None:
        """A step's result is here. It may have been launched while the step before was computed, and began then where
        that one ended.
        """
        _, begun = self.begun.pop(batch.step, (batch, now))
        seconds, self._ended = now - max(begun, self._ended), now
        after, _ = self.begun.get(batch.step + 1, (None, now))
        if self._num_skipped < _PLAIN_EVERY and batch.drafts is None and (after is None or after.drafts is None):
            self._num_skipped += 1
            return
        kind, before = _kind_of(batch), self._kind_of_ended
        self._kind_of_ended = kind
        surplus, self._surplus = self._surplus, 0.0
        if seconds <= 0:
            return
        if kind == "prompts":
            self.prompts.learn(batch.starts, batch.counts, seconds)
        # What the host does for a step falls into the time of the one before, which is computed meanwhile. So a step
        # without drafts is what it is without speculation if those beside it have none, either; and a step with drafts
        # behind one without took all that both took longer than usual.
        elif batch.drafts is not None and kind == "drafts":
            self.drafts.learn(batch.num_sequences, int(batch.drafts.counts.sum()), seconds + surplus)
            self._num_skipped = _PLAIN_EVERY
        elif after is not None and _drafting(after):
            self._surplus = max(seconds - self.drafts.plain(batch.num_sequences), 0.0) if before != "drafts" else 0.0
        elif kind == "plain" and (after is None or (before == "plain" and _kind_of(after) == "plain")):
            self.drafts.learn(batch.num_sequences, 0, seconds)
            self._num_skipped = 0


def _drafting(batch: Batch) -> bool:
    return batch.drafts is not None and batch.drafts.any


def _kind_of(batch: Batch) -> Literal["prompts", "drafts", "read", "plain"]:
    """read: by a model that makes drafts, which no step of speculation=off is."""
    if _drafting(batch):
        return "drafts"
    if batch.num_tokens != batch.num_sequences:
        return "prompts"
    return "read" if batch.read else "plain"


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
    """Owns the seconds of decode steps with drafts and without, each a moving average, and when drafts are had again
    that did not pay.

    Steps of more than MOST_DRAFTING rows never have drafts and are no concern here.
    """

    def __init__(self, num_drafts: int) -> None:
        """num_drafts: of a row in a step, at most."""
        self._plain = [0.0] * (MOST_DRAFTING + 1)  # by rows; 0: not known yet
        self._drafting: dict[int, float] = {}  # by rows and drafts together
        self._known: list[int] = []  # of those, in order
        self._since_plain = [0] * (MOST_DRAFTING + 1)  # steps with drafts, by rows
        self._plain_after = [_PLAIN_AFTER] * (MOST_DRAFTING + 1)
        # One that takes longer than so many without drafts was held up by something else: no drafts could pay for it.
        self._most_times = 2.0 * (1 + num_drafts)
        self._rest = 0  # steps that have no drafts, whatever they would bring
        self._pause = _SHORTEST_PAUSE  # the next rest
        self._try_after = False  # the rest
        self._woken = False

    def plain(self, rows: int) -> float:
        """Seconds of a step of so many rows without drafts; 0: not known yet."""
        return self._plain[rows] if rows <= MOST_DRAFTING else 0.0

    def learn(self, rows: int, drafts: int, seconds: float) -> None:
        """A step took so many seconds that computed a token of each row, and so many drafts."""
        if rows > MOST_DRAFTING:
            return
        usual = self._plain[rows]
        if drafts:
            tokens = rows + drafts
            seconds = min(seconds, self._most_times * usual) if usual else seconds
            if tokens not in self._drafting:
                insort(self._known, tokens)
            before = self._drafting.get(tokens) or usual or seconds
            self._drafting[tokens] = before + _LATEST * (seconds - before)
            self._since_plain[rows] += 1
            self._woken = True
        else:
            usual = usual or seconds
            self._plain[rows] = usual + _LATEST * (min(seconds, _MOST_TIMES * usual) - usual)
            if self._since_plain[rows] >= self._plain_after[rows]:
                self._plain_after[rows] = min(2 * self._plain_after[rows], _PLAIN_AFTER_AT_MOST)
            self._since_plain[rows] = 0

    def rests(self, num_steps: int = 1) -> bool:
        """Asked of steps that might have drafts, in their turn, the num_steps-th since it was asked: True if it has
        none without `most_drafts` being asked.
        """
        if not self._rest:
            return False
        self._rest = max(self._rest - num_steps, 0)
        woken, self._woken = self._woken, False
        return not woken

    @property
    def resting(self) -> bool:
        """The next step has no drafts, either, unless something happens meanwhile."""
        return self._rest > 0

    def wake(self) -> None:
        """Something has happened: `most_drafts` is asked of the next step. A rest goes on if nothing comes of it."""
        self._woken = True

    def most_drafts(self, wanted: Sequence[int], shares: Sequence[float]) -> int:
        """How many drafts a row may have in a step: rows i would have wanted[i], each right with probability
        shares[i] if those before it are. 0: they do not pay, or a step without any is due.
        """
        rows, most = len(wanted), max(wanted)
        plain = self._plain[rows]
        if not most or not plain or self._since_plain[rows] >= self._plain_after[rows]:
            return 0
        best = self._best(wanted, shares, plain)
        if best:
            self._rest, self._pause, self._try_after = 0, _SHORTEST_PAUSE, False
            return best
        self._plain_after[rows] = _PLAIN_AFTER
        if self._rest:
            return 0
        self._try_after = not self._try_after
        if not self._try_after:  # it has rested
            return most
        self._rest, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        return 0

    def _best(self, wanted: Sequence[int], shares: Sequence[float], plain: float) -> int:
        """How many drafts bring the most tokens a second; 0: none do for _LEAST_GAIN."""
        rows, drafting = len(wanted), [pair for pair in zip(wanted, shares, strict=True) if pair[0]]
        likely = [1.0] * len(drafting)  # that all of a row's drafts so far are right
        tokens, computed, best, best_rate = float(rows), rows, 0, _LEAST_GAIN * rows / plain
        for count in range(1, max(wanted) + 1):
            for index, (most, share) in enumerate(drafting):
                if count <= most:
                    likely[index] *= min(share, 0.99)
                    tokens += likely[index]
                    computed += 1
            rate = tokens / self._seconds_of(computed, rows, plain)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def _seconds_of(self, computed: int, rows: int, plain: float) -> float:
        """Of a step that computes so many tokens, between those that are known."""
        known, more = self._known, bisect_right(self._known, rows)
        place = bisect_left(known, computed, more)
        below = (known[place - 1], self._drafting[known[place - 1]]) if place > more else (rows, plain)
        if place == len(known):
            return below[1]
        above = known[place], self._drafting[known[place]]
        return below[1] + (above[1] - below[1]) * (computed - below[0]) / (above[0] - below[0])
