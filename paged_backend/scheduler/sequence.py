"""A sequence: one generation in flight. What its request says of it never changes (`SequenceSpec`); the rest is where
it stands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from paged_backend.arrays import Int32
from paged_backend.request import SamplingParams
from paged_backend.scheduler.sequence_pages import PageTable


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class SequenceSpec:
    """All that is known of a sequence when its request comes (intake.py)."""

    request_id: int
    arrival_index: int  # order of arrival in the engine: the higher, the younger
    arrival: float  # seconds, CLOCK_MONOTONIC
    prompt_len: int
    length_limit: int  # finish ("length") at this many tokens
    sampling: SamplingParams
    seed: int  # 64 bits; the caller's, or drawn by the scheduler
    stop_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]
    features: int  # `Feature` bits of what it asks for
    resumed: bool = False  # an engine that died had let it in
    traced: bool = False  # its admission is told with its first token


@dataclass(eq=False)
class Sequence:
    """One generation. While it runs, its tokens and lengths are in its row; while it waits, `token_ids` has them all.

    Invariant: the pages of `page_table` are held by this sequence; `row` is set exactly while it runs.
    What waits, runs, is preempted and ends is a leader; what has a row and pages is a runner. Most sequences are both;
    with beams a leader has several.
    """

    spec: SequenceSpec
    token_ids: Int32  # [num_tokens] known tokens, as of the last time it waited
    page_table: PageTable
    status: Status = Status.WAITING
    row: int | None = None
    num_awaited: int = 0  # steps in flight for it when it was preempted: it must not start before they land
    admitted: float | None = None  # seconds, CLOCK_MONOTONIC, when it first left the queue
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache then
    answered: bool = False  # its first token has been told
    leader: Sequence = field(init=False, repr=False)
    runners: list[Sequence] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.leader, self.runners = self, [self]

    @property
    def request_id(self) -> int:
        return self.spec.request_id

    @property
    def awaits_token(self) -> bool:
        """Preempted while sampled tokens were in flight, which have not all landed."""
        return self.num_awaited > 0

    @property
    def held_pages(self) -> list[int]:
        """The pages of all its runners, each once."""
        return list(dict.fromkeys(page for runner in self.runners for page in runner.page_table.held))

    def priority_key(self) -> tuple[int, int]:
        """Who is admitted first: the smallest, i.e. the oldest of the lowest priority_level. Who is preempted first:
        the largest.
        """
        return self.spec.sampling.priority_level, self.spec.arrival_index
