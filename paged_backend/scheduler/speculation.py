"""Sequences whose steps may bring several tokens: how many drafts of each a step computes.

Drafts are guesses at a sequence's next tokens, which the device makes (kernels/ngram.py) and checks; those of a
sequence with a grammar the host makes, since each place needs its mask (grammar_masks.py). A draft is right if it is
the token that is sampled there anyway, with the random number that its position has. So no token ever depends on
whether there were drafts, how many, or how good they were; only how soon it comes does. That leaves this room free to
decide by what pays: drafts get what the others leave of a step's budget and of the pages, a text that does not repeat
itself has none from itself (repetition.py), a sequence whose drafts are wrong pauses, longer each time, and where it is
to be found out whether drafts pay at all, they are had as far as they do (step_costs.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.batch import MOST_DRAFTING, Drafts, Feature, TokenEdit
from paged_backend.messages import Submit
from paged_backend.scheduler.features import SchedulerFeature
from paged_backend.scheduler.grammar_masks import GrammarMasks
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.repetition import Repetition, continuation
from paged_backend.scheduler.running import RunningSequences
from paged_backend.scheduler.sequence import Sequence
from paged_backend.scheduler.step_costs import DraftCosts

_LONGEST_PAUSE = 15  # steps that might have had drafts
_LONGEST_IF_IT_MUST_PAY = 63
_LATEST = 0.2  # what the newest draft counts, and of those of earlier sequences the newest
_UNKNOWN_SHARE = 0.5
_RELIABLE_SHARE = 0.35  # of a model's drafts, at which one miss says little
_LONGEST_SILENCE = 16  # steps until one is heard again, where nothing repeats or drafts do not pay
_SILENCE_OF_MANY = 4  # the same while there are too many sequences, of which some may end at any time
_NONE = np.empty(0, np.int32)


@dataclass
class _Pace:
    """How many drafts a sequence's next step has."""

    most: int
    now: int
    shortest_pause: int  # after drafts of which none was right
    longest_pause: int
    guided: bool  # its drafts must be known before its step is launched, and have masks: the host makes them
    share: float  # of the drafts after right ones that are right, too, lately
    repetition: Repetition = field(default_factory=Repetition)  # of its text
    pause: int = 0  # steps without any, from now on
    next_pause: int = field(init=False)

    def __post_init__(self) -> None:
        self.next_pause = self.shortest_pause

    def next(self) -> int:
        if self.pause:
            self.pause -= 1
            return 0
        return self.now

    def note(self, num_drafts: int, num_right: int) -> None:
        """After a pause one draft is tried; where it is right there are more. A model that is right often enough goes
        on after a step in which it was not.
        """
        for _ in range(num_right):
            self.share += _LATEST * (1 - self.share)
        if num_right < num_drafts:
            self.share -= _LATEST * self.share
        reliable = self.shortest_pause == 0 and self.share >= _RELIABLE_SHARE
        if num_right or (num_drafts and reliable):
            self.now, self.next_pause = self.most, self.shortest_pause
        elif num_drafts:
            self.now, self.pause = 1, self.next_pause
            self.next_pause = min(2 * self.next_pause + 1, self.longest_pause)


class Speculation(SchedulerFeature):
    """Owns the pace of each sequence that may have drafts, and the counts of drafts."""

    in_steps = False

    def __init__(
        self, limits: SchedulerLimits, running: RunningSequences, guides: GrammarMasks, costs: DraftCosts | None
    ) -> None:
        """costs: of steps, if drafts are had as far as they pay; None: they are had anyway."""
        self._guides = guides
        guides.guesses = self._guesses
        self._most = limits.num_drafts
        self._from_text = limits.drafts_from_text
        self._budget = limits.max_batched_tokens
        self._running = running
        self._paces: dict[Sequence, _Pace] = {}
        self._num_guided = 0  # of them
        self._repeating: list[int] = []  # rows that have just got a token with which their text may repeat itself
        self._costs = costs
        self._usual_share = _UNKNOWN_SHARE  # of a model's drafts
        self._has_model = self._most > 0 and not self._from_text
        self.in_use = self._has_model  # `drafts` is to be asked of each step: sequences may have some, or a model reads
        self.listens = False  # `heard` is to be called
        self._silence = 0  # steps until it is
        self._last_silence = 0
        self._num_unheard = 0  # steps since the costs were asked
        # the newest step is one that a model which makes drafts reads: its rows may have some in the next
        self.reads = False
        self.num_proposed = 0
        self.num_accepted = 0
        self.num_checked = 0  # times that a sequence had any in a step

    # ---- sequences come and go

    def enter(self, sequence: Sequence, request: Submit) -> bool:
        spec = sequence.spec
        sampling = spec.sampling
        if not self._most or sampling.speculation == "off":
            return False
        if spec.features & Feature.BEAM:  # what comes next depends on the others' tokens, too
            return False
        # one is over with a token; of the other a token may be replaced when it is known
        if sampling.pooling is not None or sampling.max_thinking_tokens is not None:
            return False
        guided = bool(spec.features & Feature.GUIDED)
        # a text that goes on otherwise than before does so for a while; a model that was wrong may be right at once
        shortest = 1 if guided or self._from_text else 0
        longest = _LONGEST_PAUSE if self._costs is None else _LONGEST_IF_IT_MUST_PAY
        share = _UNKNOWN_SHARE if shortest else self._usual_share
        self._paces[sequence] = _Pace(self._most, self._most, shortest, longest, guided, share)
        self._num_guided += guided
        self.listens, self.in_use = self._from_text, True
        self._silence = self._last_silence = 0
        if self._costs is not None:
            self._costs.wake()
        return True

    def leave(self, sequence: Sequence) -> None:
        pace = self._paces.pop(sequence)
        self._num_guided -= pace.guided
        if not pace.shortest_pause:
            self._usual_share += _LATEST * (pace.share - self._usual_share)
        if not self._paces:
            self.listens, self.in_use = False, self._has_model

    # ---- before a step

    def drafts(self, rows: Int32, counts: Int32) -> Drafts | None:
        """For a step that computes counts[i] tokens of rows[i], all of which have their pages. Pages for drafts are
        taken, if nobody else misses them. None: there are no drafts, and all lengths are known.
        """
        wanted = self._of_texts(rows, counts) if self._from_text else self._of_a_model(rows, counts)
        if not any(wanted):
            if not self._running.num_unsure:
                return None
            unsure = self.rows.unsure[rows]
            return Drafts(np.zeros_like(counts), unsure) if unsure.any() else None
        numbers, given = [], []
        left = self._budget - len(rows)
        for row, most in zip(rows.tolist(), wanted, strict=True):
            num_drafts = self._with_pages(row, min(most, left)) if most and left > 0 else 0
            numbers.append(num_drafts)
            left -= num_drafts
            if num_drafts and self._num_guided and self.rows.features[row] & Feature.GUIDED:
                token_ids = self._guides.drafts(row)[:num_drafts]
                given.append(TokenEdit(row, int(self.rows.num_known[row]), token_ids))
        unsure = self.rows.unsure[rows]
        return Drafts(np.array(numbers, np.int32), unsure, tuple(given)) if any(numbers) or unsure.any() else None

    def _of_texts(self, rows: Int32, counts: Int32) -> list[int]:
        """Drafts of each row, as far as they pay; [] if nothing repeats, which takes no look at any row."""
        if self._silence:
            self._silence -= 1
            self._num_unheard += 1
            self.listens = not self._silence
        if not (self._repeating or self._num_guided) or len(rows) > MOST_DRAFTING or counts.max() > 1:
            return []
        if self._costs is not None:
            num_steps, self._num_unheard = 1 + self._num_unheard, 0
            if self._costs.rests(num_steps) and not self._num_guided:
                self._hear_nothing(_LONGEST_SILENCE)
                return []
        wanted, shares = self._wanted(rows)
        return self._paying(wanted, shares)

    def _of_a_model(self, rows: Int32, counts: Int32) -> list[int]:
        """As `_of_texts`. Where its drafts do not pay the model does not read the steps, either, but prompts: it has
        guesses again once it has read a step.
        """
        has_read, costs = self.reads, self._costs
        self.reads = costs is None
        if len(rows) > MOST_DRAFTING:
            return []
        if costs is not None and costs.rests() and not self._num_guided:  # forms pay where others do not
            self.reads = not costs.resting
            return []
        if counts.max() > 1:
            self.reads = True
            return []
        wanted, shares = self._wanted(rows)
        paying = self._paying(wanted, shares)
        self.reads = costs is None or any(paying) or (bool(self._paces) and not any(wanted))
        return paying if has_read else []

    def _wanted(self, rows: Int32) -> tuple[list[int], list[float]]:
        """Drafts that each row would have, and the share of its drafts that are right."""
        sequences, wanted, shares = self.rows.sequences, [], []
        for row in rows.tolist():
            pace = self._paces.get(sequences[row])
            wanted.append(0 if pace is None else self._wanted_of(row, pace))
            shares.append(0.0 if pace is None else pace.share)
        return wanted, shares

    def _paying(self, wanted: list[int], shares: list[float]) -> list[int]:
        if self._costs is None or not any(wanted):
            return wanted
        most = self._costs.most_drafts(wanted, shares)
        return [min(num_drafts, most) for num_drafts in wanted]

    def _wanted_of(self, row: int, pace: _Pace) -> int:
        """So many that the row does not reach its limit, even if all of those in flight are right."""
        if self._from_text and not pace.guided and row not in self._repeating:
            return 0
        table = self.rows
        start = int(table.num_computed[row])
        if int(table.num_tokens[row]) != start + 1:
            return 0
        if pace.guided:
            return len(self._guides.drafts(row))
        most = int(table.length_limit[row]) - 2 - start
        wanted = min(pace.next(), most) if most > 0 else 0
        if wanted and self._from_text:
            wanted = min(wanted, max(pace.repetition.num_alike(table.token_ids[row, : table.num_known[row]]) - 1, 0))
        return wanted

    def _guesses(self, row: int) -> tuple[Int32, int]:
        """For a guided row: what may come next by its own text, and how many drafts its next step may have."""
        pace = self._paces.get(self.rows.sequences[row])  # type: ignore[arg-type]
        num_known = int(self.rows.num_known[row])
        if pace is None or len(self._running) > MOST_DRAFTING:
            return _NONE, 0
        most = min(pace.next(), int(self.rows.length_limit[row]) - 1 - num_known)
        if most <= 0:
            return _NONE, 0
        return continuation(self.rows.token_ids[row, :num_known])[:most], most

    def _with_pages(self, row: int, wanted: int) -> int:
        """As many of the drafts as the row can have pages for, even if all of those in flight are right."""
        table = self.rows
        runner, start = table.sequences[row], int(table.num_computed[row])
        assert runner is not None
        while wanted > 0 and table.capacity[row] < start + 1 + wanted:
            room, groups = self._running.pages.pool.num_available, len(self._running.pages.windows)
            if room < self._running.headroom() + groups or not self._running.append_page(runner):
                wanted = int(table.capacity[row]) - start - 1
        return max(wanted, 0)

    # ---- after it

    def heard(self, rows: list[int], num_known: list[int], token_ids: list[int]) -> None:
        """A step has brought rows[i] a token or several: so many are known now, token_ids[i] is the newest. Nothing of
        a text that does not repeat itself is looked at later on.
        """
        self._repeating = repeating = []
        if len(rows) > MOST_DRAFTING:
            self._hear_nothing(_SILENCE_OF_MANY)
            return
        table = self.rows
        for row, known, token_id in zip(rows, num_known, token_ids, strict=True):
            pace = self._paces.get(table.sequences[row])  # type: ignore[arg-type]
            if pace is not None and pace.repetition.hears(known, token_id):
                repetition = pace.repetition
                if repetition.num_noted == known or repetition.reads(table.token_ids[row, :known]):
                    repeating.append(row)
        if repeating:
            self._last_silence = 0
        else:
            self._hear_nothing(min(2 * self._last_silence + 1, _LONGEST_SILENCE))

    def _hear_nothing(self, num_steps: int) -> None:
        """But of the num_steps-th from now on: to hear each token would take a small model's steps longer than it
        gains. What comes meanwhile is read then.
        """
        self._repeating, self.listens = [], False
        self._silence = self._last_silence = num_steps

    def note(self, sequence: Sequence, num_drafts: int, num_right: int) -> None:
        """How many of a sequence's drafts were right in a step."""
        pace = self._paces.get(sequence)
        if pace is not None:
            pace.note(num_drafts, num_right)
        self.num_proposed += num_drafts
        self.num_accepted += num_right
        self.num_checked += num_drafts > 0
