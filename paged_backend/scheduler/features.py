"""Features hang off rooms: what a request may ask for beyond plain tokens (a grammar, an adapter, beams, …) is one file
here, behind one small protocol.

The scheduler walks only the features that some living sequence uses. A step of sequences that use none enters none of
their files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from paged_backend.arrays import Int32
from paged_backend.batch import Answer, Ask, Batch, Drafts
from paged_backend.errors import ErrorKind
from paged_backend.messages import FeatureOutput, Finish, Found, Submit
from paged_backend.scheduler.rows import Rows
from paged_backend.scheduler.running import RowChanges
from paged_backend.scheduler.sequence import Sequence

NO_LIMIT = int(np.iinfo(np.int32).max)
_NONE = np.empty(0, np.intp)


@dataclass(frozen=True)
class StepRows:
    """The rows of a step that is being put together: it computes counts[i] tokens of rows[i] from starts[i], and
    samples the successor where samples[i]; and drafts beside them.
    """

    rows: Int32
    starts: Int32
    counts: Int32
    samples: NDArray[np.bool_]
    drafts: Drafts | None


class Takings(Protocol):
    """Where a feature puts what a step has brought (commit.py)."""

    def tell(self, output: FeatureOutput) -> None:
        """Goes out with the step's tokens."""

    def replace_token(self, place: int, token_id: int) -> bool:
        """The step's sampled sequence at that place has this token instead, certain as it is. False: it has it
        anyway.
        """

    def conclude(self, sequence: Sequence, found: Found | None) -> None:
        """A search is over, with its answers; None: it must begin again, for want of a page."""


class SchedulerFeature:
    """What the scheduler asks of a feature. It overrides what it has something to say to; the rest says that there is
    nothing to it.
    """

    asks: type[Ask] | None = None  # what it asks of steps, whose answers it takes; None: it asks nothing
    in_steps = True  # False: nothing of what is asked "once a step" concerns it
    rows: Rows  # of the scheduler that it is a feature of, as are its row changes
    changes: RowChanges

    # ---- a request comes

    def refusal(self, sequence: Sequence, request: Submit) -> tuple[ErrorKind, str] | None:
        """Why a request that is about to become this sequence can never be served. Asked of every request; changes
        nothing.
        """
        return None

    def enter(self, sequence: Sequence, request: Submit) -> bool:
        """Whether a new sequence uses this feature. All else below is asked of sequences that do, until `leave`."""
        return False

    # ---- it waits, runs, ends

    def prepared(self, sequence: Sequence) -> bool:
        """It has what it must have before it can start. Changes nothing."""
        return True

    def prepare(self, sequence: Sequence) -> bool:
        """Asked once a step while it is not prepared: sees to it that it will be. Whether it can be let into the
        queue.
        """
        return True

    def num_reusable(self, sequence: Sequence) -> int:
        """How many of its first tokens need not be computed if the prefix cache has them."""
        return NO_LIMIT

    def started(self, sequence: Sequence) -> None:
        """Its runners have rows and pages now, and the device learns of them with this step."""

    def preempted(self, sequence: Sequence) -> None:
        """Its rows and pages are gone; it is about to wait again."""

    def leave(self, sequence: Sequence) -> None:
        """It is over."""

    def last_word(self, sequence: Sequence, token_id: int) -> Finish | None:
        """How it ends whose newest token is its last, if the feature does not let it end well."""
        return None

    # ---- once a step

    def review(self) -> None:
        """Takes in what has become known since the step before, before anybody is let into the queue."""

    def endings(self, let_in: list[Sequence]) -> Iterable[tuple[Sequence, Finish]]:
        """Waiting sequences that cannot go on, or need not. let_in: those that have just been let into the queue."""
        return ()

    def endings_of_running(self) -> Iterable[tuple[Sequence, Finish]]:
        """Sequences on rows that cannot go on, or need not."""
        return ()

    def holds_back(self, rows: Int32) -> NDArray[np.intp]:
        """Which of the rows, as indices, cannot compute anything in this step."""
        return _NONE

    def ask(self, step: StepRows) -> Ask | None:
        """What it asks of the step."""
        return None

    def take(self, batch: Batch, ask: Ask, answer: Answer | None, takings: Takings) -> None:
        """A step's result is here; its tokens have not reached their sequences yet."""

    def settle(self, batch: Batch, ask: Ask, answer: Answer | None, takings: Takings) -> None:
        """They have, and some of the sequences are over."""

    def check(self, living: Iterable[Sequence]) -> None:
        """Raises AssertionError if an invariant is broken."""


class LiveFeatures:
    """Owns who uses what. Invariant (`check`): `active` are the features that some living sequence uses, in the order
    of `every`, but for those that steps do not concern.
    """

    def __init__(self, every: tuple[SchedulerFeature, ...], rows: Rows, changes: RowChanges) -> None:
        self.every = every
        for feature in every:
            feature.rows, feature.changes = rows, changes
        self.active: tuple[SchedulerFeature, ...] = ()
        self._used: dict[Sequence, tuple[SchedulerFeature, ...]] = {}  # of the sequences that use any
        self._num_users = [0] * len(every)
        self._by_ask = {feature.asks: feature for feature in every if feature.asks is not None}

    def refusal(self, sequence: Sequence, request: Submit) -> tuple[ErrorKind, str] | None:
        """The first that any feature has."""
        return next(
            (refusal for feature in self.every if (refusal := feature.refusal(sequence, request)) is not None), None
        )

    def enter(self, sequence: Sequence, request: Submit) -> None:
        """A new sequence. If a feature raises, nothing has changed."""
        used: list[SchedulerFeature] = []
        try:
            for feature in self.every:
                if feature.enter(sequence, request):
                    used.append(feature)
        except Exception:
            for feature in used:
                feature.leave(sequence)
            raise
        if used:
            self._used[sequence] = tuple(used)
            self._count(used, 1)

    def leave(self, sequence: Sequence) -> None:
        used = self._used.pop(sequence, ())
        for feature in used:
            feature.leave(sequence)
        if used:
            self._count(used, -1)

    def of(self, sequence: Sequence) -> tuple[SchedulerFeature, ...]:
        """Those that a living sequence uses."""
        return self._used.get(sequence, ())

    def prepared(self, sequence: Sequence) -> bool:
        return all(feature.prepared(sequence) for feature in self.of(sequence))

    def prepare(self, sequence: Sequence) -> bool:
        return all(feature.prepare(sequence) for feature in self.of(sequence))

    def num_reusable(self, sequence: Sequence) -> int:
        return min((feature.num_reusable(sequence) for feature in self.of(sequence)), default=NO_LIMIT)

    def last_word(self, sequence: Sequence, token_id: int, reason: str) -> Finish:
        """How a sequence ends whose newest token is its last."""
        words = (feature.last_word(sequence, token_id) for feature in self.of(sequence))
        return next((word for word in words if word is not None), Finish(sequence.request_id, reason))

    def asks(self, step: StepRows) -> tuple[Ask, ...]:
        """What the active features ask of a step."""
        return tuple(ask for feature in self.active if (ask := feature.ask(step)) is not None)

    def asked(self, ask: Ask) -> SchedulerFeature:
        """Who asked that."""
        return self._by_ask[type(ask)]

    def _count(self, used: Iterable[SchedulerFeature], change: int) -> None:
        for feature in used:
            self._num_users[self.every.index(feature)] += change
        self.active = tuple(
            feature
            for feature, num_users in zip(self.every, self._num_users, strict=True)
            if num_users and feature.in_steps
        )

    def check(self, living: Iterable[Sequence]) -> None:
        """Raises AssertionError if an invariant is broken."""
        alive = list(living)
        assert set(self._used) <= set(alive), "a sequence that is over uses a feature"
        counts = [sum(feature in used for used in self._used.values()) for feature in self.every]
        assert counts == self._num_users and self.active == tuple(
            feature for feature, count in zip(self.every, counts, strict=True) if count and feature.in_steps
        )
        for feature in self.every:
            feature.check(alive)
