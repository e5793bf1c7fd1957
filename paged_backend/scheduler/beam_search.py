"""Beam search as a pure decision: from the likeliest continuations of each beam to the next beams, and when to stop.
Rows and pages are beams.py's.

It decides what transformers' `generate(num_beams=…, do_sample=False)` decides (GenerationMixin._beam_search): of all
continuations the best `width` that do not end go on; those that end are answers if they are among the best `width`; the
`width` best answers by total / length ** length_penalty are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Candidates:
    """The likeliest continuations of one beam, the likeliest first. -inf: it must not come."""

    token_ids: Int32  # [n]
    logprobs: Float32  # [n]


@dataclass(frozen=True)
class BeamHypothesis:
    """An answer that goes on, or is complete."""

    token_ids: Int32 = field(default_factory=lambda: np.empty(0, np.int32))  # [t] of the answer
    logprobs: Float32 = field(default_factory=lambda: np.empty(0, np.float32))  # [t]
    total: np.float32 = field(default_factory=lambda: np.float32(0))  # sum of the logprobs

    def extended(self, token_id: int, logprob: np.float32) -> BeamHypothesis:
        return BeamHypothesis(
            np.append(self.token_ids, np.int32(token_id)), np.append(self.logprobs, logprob), self.total + logprob
        )


@dataclass(frozen=True)
class Fork:
    """A next beam, and which of the present ones it continues."""

    parent: int
    beam: BeamHypothesis


@dataclass(frozen=True)
class Ending:
    """A complete answer."""

    beam: BeamHypothesis
    score: float  # by which answers are ranked
    stopped: bool  # by a stop id, not by its length


class BeamSearch:
    """One request's search. Invariant: `beams` have one length, and there are at most `width` of them; `endings` are at
    most `width`, the best first.
    """

    def __init__(
        self,
        width: int,
        stop_ids: Sequence[int],
        max_tokens: int,
        length_penalty: float,
        early_stopping: bool | Literal["never"],
    ) -> None:
        self.width = width
        self.beams = [BeamHypothesis()]
        self.endings: list[Ending] = []
        self.over = False
        self._stop_ids = np.array(stop_ids, np.int32)
        self._max_tokens = max_tokens
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping

    @property
    def num_candidates(self) -> int:
        """So many of each beam's likeliest continuations must be known: `width` that go on, though all stop ids may be
        likelier.
        """
        return self.width + len(self._stop_ids)

    def advance(self, candidates: Sequence[Candidates]) -> list[Fork]:
        """One token further. candidates: of each of `beams`. Returns where the new `beams` come from; sets `over`, and
        then there are none.
        """
        length = len(self.beams[0].token_ids) + 1
        totals = np.concatenate([beam.total + mine.logprobs for beam, mine in zip(self.beams, candidates, strict=True)])
        parents = np.repeat(np.arange(len(self.beams)), [len(mine.token_ids) for mine in candidates])
        token_ids = np.concatenate([mine.token_ids for mine in candidates])
        logprobs = np.concatenate([mine.logprobs for mine in candidates])
        order = [at for at in np.argsort(-totals, kind="stable").tolist() if totals[at] > -np.inf]
        stops = np.isin(token_ids, self._stop_ids)

        def fork(at: int) -> Fork:
            return Fork(int(parents[at]), self.beams[parents[at]].extended(int(token_ids[at]), logprobs[at]))

        ends = np.full(len(stops), length >= self._max_tokens) | stops
        forks = [fork(at) for at in [at for at in order if not ends[at]][: self.width]]
        self._keep(
            [
                Ending(fork(at).beam, self._score(totals[at], length), bool(stops[at]))
                for at in order[: self.width]
                if ends[at]
            ]
        )
        self.over = not forks or self._is_settled(forks[0].beam.total, length)
        if self.over:
            return []
        self.beams = [one.beam for one in forks]
        return forks

    def _score(self, total: np.float32, length: int) -> float:
        return float(total / np.float32(length**self._length_penalty))

    def _keep(self, endings: list[Ending]) -> None:
        self.endings = sorted(self.endings + endings, key=lambda ending: -ending.score)[: self.width]

    def _is_settled(self, best_total: np.float32, length: int) -> bool:
        """No beam that goes on can improve the answers, as far as early_stopping says to look. best_total: of those
        beams.
        """
        if len(self.endings) < self.width:
            return False
        if self._early_stopping is True:
            return True
        hopes_to_grow = self._early_stopping == "never" and self._length_penalty > 0
        return not self._score(best_total, self._max_tokens if hopes_to_grow else length) > self.endings[-1].score
