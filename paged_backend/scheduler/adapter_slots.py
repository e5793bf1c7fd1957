"""Which adapter lies in which berth of the device, and who may use it. Touches no tensor: what a thread has read goes down to the device with a batch.

A sequence with an adapter waits (waiting.py) until its adapter lies in a berth. From then on it holds the berth until it ends, through preemption too. A
berth that nobody holds keeps its adapter until another needs the place; the one not used for longest goes first. A berth is given out before anything is
read, so there are never more adapters in memory than berths.

If every berth is held, an adapter that is wanted gets, after a while, the promise of the berth with the fewest holders: nobody else is let in to that one then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from paged_backend.errors import ErrorKind, RequestError
from paged_backend.messages import Finish
from paged_backend.scheduler.sequence import NO_BERTH, Sequence

_NUM_THREADS = 2
_PATIENCE_SECONDS = 2.0  # for which others may go on sharing all berths while an adapter waits for one

log = logging.getLogger("paged")


class ReadAdapter(Protocol):
    """What the scheduler knows of an adapter that was read; the rest of it is the device's business (models/adapter_files.py)."""

    @property
    def version(self) -> str:
        """Other if the files are others."""


class Library(Protocol):
    """Where adapters come from. Asked on threads; raises a RequestError, for the caller, if one cannot be used."""

    def check(self, name: str) -> None: ...
    def read(self, name: str) -> ReadAdapter: ...


@dataclass
class _Berth:
    number: int
    name: str | None = None
    reading: Future[ReadAdapter] | None = None  # until the adapter is there
    version: str = ""
    num_holders: int = 0
    last_use: int = 0
    promised_to: str | None = None  # the adapter that comes next


class Adapters:
    """Invariant (`check`): a berth's holders are the living sequences that name it; no two berths have the same adapter; who holds one asked for it."""

    def __init__(self, num_berths: int = 0, library: Library | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """num_berths: 0, and no library: this server has no adapters."""
        self._berths = [_Berth(number) for number in range(num_berths)]
        self._library = library
        self._clock = clock
        # of adapters that are wanted and in no berth: a name that means nothing takes no place from anybody
        self._checks: dict[str, Future[None]] = {}
        self._checked: set[str] = set()  # and found to be good
        self._by_name: dict[str, _Berth] = {}
        self._arrived: dict[int, ReadAdapter] = {}  # berth -> what the next batch brings there
        self._unusable: dict[str, RequestError] = {}  # name -> why, found out in this turn
        self._refused: list[tuple[Sequence, Finish]] = []
        self._wanted: set[str] = set()  # that somebody wanted in this turn and could not have yet
        self._waits: dict[str, float] = {}  # name -> since when it has waited for a berth
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "adapter")
        self._num_uses = 0
        self._num_holders = 0

    # ---- once a turn

    def collect(self) -> None:
        """Takes in what the threads have found out and read."""
        self._unusable.clear()
        self._forget_unwanted()
        for name, checking in list(self._checks.items()):
            if checking.done():
                del self._checks[name]
                if (error := checking.exception()) is None:
                    self._checked.add(name)
                else:
                    self._unusable[name] = _reason(error)
        for berth in self._berths:
            if berth.reading is not None and berth.reading.done():
                reading, berth.reading = berth.reading, None
                if (error := reading.exception()) is None:
                    adapter = reading.result()
                    berth.version, self._arrived[berth.number] = adapter.version, adapter
                else:
                    assert berth.name is not None
                    self._unusable[berth.name] = _reason(error)
                    self._empty(berth)

    def take(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence has the adapter it wants, if any; it holds the berth then. If it cannot ever, it is one of the next `refusals`."""
        name = sequence.sampling.lora_name
        if name is None or sequence.berth != NO_BERTH:
            return True
        reason = self._unusable.get(name) if self._berths else RequestError("this server has no adapters (lora_directory)")
        if reason is not None:
            self._refused.append((sequence, Finish(sequence.request_id, error=reason.kind, message=f"lora_name: '{name}': {reason}")))
            return False
        if name in self._wanted:  # the answer is what it was a moment ago
            return False
        berth = self._by_name.get(name)
        if berth is not None and berth.reading is None and berth.promised_to is None:
            self._hold(berth, sequence)
            return True
        self._wanted.add(name)
        if berth is None:
            self._want(name)
        return False

    def refusals(self) -> Iterator[tuple[Sequence, Finish]]:
        """Ends of sequences whose adapters cannot be used."""
        refused, self._refused = self._refused, []
        yield from refused

    def arrivals(self) -> tuple[tuple[int, ReadAdapter], ...]:
        """(berth, adapter) of those that the next batch must bring to the device."""
        arrived, self._arrived = tuple(self._arrived.items()), {}
        return arrived

    @property
    def in_use(self) -> bool:
        """Some sequence holds a berth."""
        return self._num_holders > 0

    # ---- berths

    def release(self, sequence: Sequence) -> None:
        """A sequence is over, whether it had a berth or not."""
        if sequence.berth != NO_BERTH:
            self._berths[sequence.berth].num_holders -= 1
            self._num_holders -= 1
            sequence.berth = NO_BERTH

    def _hold(self, berth: _Berth, sequence: Sequence) -> None:
        self._num_uses += 1
        self._num_holders += 1
        berth.last_use = self._num_uses
        berth.num_holders += 1
        # pages are shared with those alone that have the same adapter, from the same files; a name has no zero byte in it
        salt = f"adapter {berth.version}\0{berth.name}\0{sequence.cache_salt}"
        for one in (sequence, *sequence.runners):
            one.berth, one.cache_salt = berth.number, salt

    def _want(self, name: str) -> None:
        """Has an adapter looked at, and then read for a berth that nobody holds. If there is none, sees to it that the wait does not last for ever."""
        assert self._library is not None
        if name not in self._checked:
            if name not in self._checks:
                self._checks[name] = self._threads.submit(self._library.check, name)
            return
        free = [berth for berth in self._berths if berth.num_holders == 0 and berth.reading is None and berth.promised_to in (None, name)]
        if free:
            berth = min(free, key=lambda berth: berth.last_use)
            self._empty(berth)
            berth.name, berth.reading = name, self._threads.submit(self._library.read, name)
            self._by_name[name] = berth
            self._checked.discard(name)
            self._keep_promise(name)
            return
        now = self._clock()
        since = self._waits.setdefault(name, now)
        held = [berth for berth in self._berths if berth.num_holders > 0]
        if held and now - since > _PATIENCE_SECONDS and all(berth.promised_to is None for berth in self._berths):
            min(held, key=lambda berth: (berth.num_holders, berth.last_use)).promised_to = name

    def _empty(self, berth: _Berth) -> None:
        if berth.name is not None:
            del self._by_name[berth.name]
        self._arrived.pop(berth.number, None)
        berth.name, berth.last_use = None, 0

    def _keep_promise(self, name: str) -> None:
        """It has a berth, or wants none any more."""
        self._waits.pop(name, None)
        for berth in self._berths:
            if berth.promised_to == name:
                berth.promised_to = None

    def _forget_unwanted(self) -> None:
        """Who waited for an adapter in the turn before may have left."""
        for name in [name for name in self._waits if name not in self._wanted]:
            self._keep_promise(name)
        self._wanted.clear()

    def check(self, living: Iterable[Sequence]) -> None:
        """Raises AssertionError if the invariant is broken."""
        counts = [0] * len(self._berths)
        for sequence in living:
            if sequence.berth != NO_BERTH:
                counts[sequence.berth] += 1
                assert self._berths[sequence.berth].name == sequence.sampling.lora_name, "a sequence holds the berth of another adapter"
        assert counts == [berth.num_holders for berth in self._berths], "a berth's count is not its number of holders"
        assert self._num_holders == sum(counts)
        assert {berth.name: berth for berth in self._berths if berth.name is not None} == self._by_name, "the berths and their names differ"
        assert not any(berth.num_holders and berth.reading is not None for berth in self._berths), "a berth is held before its adapter is there"


def _reason(error: BaseException) -> RequestError:
    if isinstance(error, RequestError):
        return error
    log.exception("an adapter could not be read", exc_info=error)
    return RequestError("it cannot be read", ErrorKind.INTERNAL)
