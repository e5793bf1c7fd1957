"""Which adapter lies in which adapter slot of the device, and who may use it. Touches no tensor: what a thread has read
goes down to the device with a batch.

A sequence with an adapter waits (waiting.py) until its adapter lies in an adapter slot. From then on it holds that
adapter slot until it ends, through preemption too. An adapter slot that nobody holds keeps its adapter until another
needs the place; the one not used for longest goes first. An adapter slot is given out before anything is read, so there
are never more adapters in memory than adapter slots.

If every adapter slot is held, an adapter that is wanted gets, after a while, the promise of the one with the fewest
holders: nobody else is let in then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from paged_backend.batch import AdapterUse
from paged_backend.errors import ErrorKind, RequestError
from paged_backend.messages import Finish, Submit
from paged_backend.scheduler.features import SchedulerFeature, StepRows
from paged_backend.scheduler.sequence import Sequence, Status

_NUM_THREADS = 2
_PATIENCE_SECONDS = 2.0  # for which others may go on sharing all adapter slots while an adapter waits for one

log = logging.getLogger("paged")


class ReadAdapter(Protocol):
    """What the scheduler knows of an adapter that was read; the rest of it is the device's business
    (models/adapter_files.py).
    """

    @property
    def version(self) -> str:
        """Other if the files are others."""


class Library(Protocol):
    """Where adapters come from. Asked on threads; raises a RequestError, for the caller, if one cannot be used."""

    def check(self, name: str) -> None: ...
    def read(self, name: str) -> ReadAdapter: ...


@dataclass
class _AdapterSlot:
    number: int
    name: str | None = None
    reading: Future[ReadAdapter] | None = None  # until the adapter is there
    version: str = ""
    num_holders: int = 0
    last_use: int = 0
    promised_to: str | None = None  # the adapter that comes next


class AdapterSlots(SchedulerFeature):
    """Owns which sequence holds which adapter slot.

    Invariant (`check`): an adapter slot's holders are the living sequences that name it, and asked for its adapter; no
    two have the same adapter.
    """

    asks = AdapterUse

    def __init__(
        self, num_adapter_slots: int = 0, library: Library | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """num_adapter_slots: 0, and no library: this server has no adapters."""
        self._adapter_slots = [_AdapterSlot(number) for number in range(num_adapter_slots)]
        self._library = library
        self._clock = clock
        # of adapters that are wanted and in no adapter slot: a name that means nothing takes no place from anybody
        self._checks: dict[str, Future[None]] = {}
        self._checked: set[str] = set()  # and found to be good
        self._by_name: dict[str, _AdapterSlot] = {}
        self._arrived: dict[int, ReadAdapter] = {}  # adapter slot -> what the next batch brings there
        self._unusable: dict[str, RequestError] = {}  # name -> why, found out in this turn
        self._refused: list[tuple[Sequence, Finish]] = []
        self._wanted: set[str] = set()  # that somebody wanted in this turn and could not have yet
        self._waits: dict[str, float] = {}  # name -> since when it has waited for an adapter slot
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "adapter")
        self._num_uses = 0
        self._adapter_slot_of: dict[Sequence, int] = {}  # of those that hold one
        # since the step before: the device does not know their rows' adapter slots yet
        self._started: list[Sequence] = []
        self._num_users = 0  # sequences that want an adapter, or have it

    # ---- a request comes, waits, runs, ends

    def enter(self, sequence: Sequence, request: Submit) -> bool:
        if sequence.spec.sampling.lora_name is None:
            return False
        self._num_users += 1
        return True

    def prepared(self, sequence: Sequence) -> bool:
        return sequence in self._adapter_slot_of

    def started(self, sequence: Sequence) -> None:
        self._started.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """A sequence is over, whether it had an adapter slot or not."""
        number = self._adapter_slot_of.pop(sequence, None)
        if number is not None:
            self._adapter_slots[number].num_holders -= 1
        self._num_users -= 1
        if not self._num_users:  # nobody will call `review` before somebody wants an adapter again
            self._wanted.clear()
            self._forget_unwanted()

    # ---- once a step

    def review(self) -> None:
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
        for adapter_slot in self._adapter_slots:
            if adapter_slot.reading is not None and adapter_slot.reading.done():
                reading, adapter_slot.reading = adapter_slot.reading, None
                if (error := reading.exception()) is None:
                    adapter = reading.result()
                    adapter_slot.version, self._arrived[adapter_slot.number] = adapter.version, adapter
                else:
                    assert adapter_slot.name is not None
                    self._unusable[adapter_slot.name] = _reason(error)
                    self._empty(adapter_slot)

    def prepare(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence has the adapter it wants; it holds the adapter slot then. If it cannot ever, it is
        one of the next `endings`.
        """
        if sequence in self._adapter_slot_of:
            return True
        name = sequence.spec.sampling.lora_name
        assert name is not None
        reason = (
            self._unusable.get(name)
            if self._adapter_slots
            else RequestError("this server has no adapters (lora_directory)")
        )
        if reason is not None:
            self._refused.append(
                (sequence, Finish(sequence.request_id, error=reason.kind, message=f"lora_name: '{name}': {reason}"))
            )
            return False
        if name in self._wanted:  # the answer is what it was a moment ago
            return False
        adapter_slot = self._by_name.get(name)
        if adapter_slot is not None and adapter_slot.reading is None and adapter_slot.promised_to is None:
            self._hold(adapter_slot, sequence)
            return True
        self._wanted.add(name)
        if adapter_slot is None:
            self._want(name)
        return False

    def endings(self, let_in: list[Sequence]) -> Iterator[tuple[Sequence, Finish]]:
        """Those whose adapters cannot be used."""
        refused, self._refused = self._refused, []
        yield from ((sequence, finish) for sequence, finish in refused if sequence.status is Status.WAITING)

    def ask(self, step: StepRows) -> AdapterUse | None:
        arrivals, self._arrived = tuple(self._arrived.items()), {}
        started, self._started = self._started, []
        new = [(runner.row, self._adapter_slot_of[sequence]) for sequence in started for runner in sequence.runners]
        rows = set(step.rows.tolist())
        in_use = any(runner.row in rows for sequence in self._adapter_slot_of for runner in sequence.runners)
        return (
            AdapterUse(arrivals, in_use, np.array(new, np.int32).reshape(-1, 2)) if arrivals or in_use or new else None
        )

    # ---- adapter slots

    def _hold(self, adapter_slot: _AdapterSlot, sequence: Sequence) -> None:
        self._num_uses += 1
        self._adapter_slot_of[sequence] = adapter_slot.number
        adapter_slot.last_use = self._num_uses
        adapter_slot.num_holders += 1
        # pages are shared with those alone that have the same adapter, from the same files; a name has no zero byte in
        # it
        for table in {sequence.page_table, *(runner.page_table for runner in sequence.runners)}:
            if table.salt is not None:
                table.salt = f"adapter {adapter_slot.version}\0{adapter_slot.name}\0{table.salt}"

    def _want(self, name: str) -> None:
        """Has an adapter looked at, and then read for an adapter slot that nobody holds. If there is none, sees to it
        that the wait does not last for ever.
        """
        assert self._library is not None
        if name not in self._checked:
            if name not in self._checks:
                self._checks[name] = self._threads.submit(self._library.check, name)
            return
        free = [
            adapter_slot
            for adapter_slot in self._adapter_slots
            if adapter_slot.num_holders == 0
            and adapter_slot.reading is None
            and adapter_slot.promised_to in (None, name)
        ]
        if free:
            adapter_slot = min(free, key=lambda adapter_slot: adapter_slot.last_use)
            self._empty(adapter_slot)
            adapter_slot.name, adapter_slot.reading = name, self._threads.submit(self._library.read, name)
            self._by_name[name] = adapter_slot
            self._checked.discard(name)
            self._keep_promise(name)
            return
        now = self._clock()
        since = self._waits.setdefault(name, now)
        in_use = [adapter_slot for adapter_slot in self._adapter_slots if adapter_slot.num_holders > 0]
        if (
            in_use
            and now - since > _PATIENCE_SECONDS
            and all(adapter_slot.promised_to is None for adapter_slot in self._adapter_slots)
        ):
            min(in_use, key=lambda adapter_slot: (adapter_slot.num_holders, adapter_slot.last_use)).promised_to = name

    def _empty(self, adapter_slot: _AdapterSlot) -> None:
        if adapter_slot.name is not None:
            del self._by_name[adapter_slot.name]
        self._arrived.pop(adapter_slot.number, None)
        adapter_slot.name, adapter_slot.last_use = None, 0

    def _keep_promise(self, name: str) -> None:
        """It has an adapter slot, or wants none any more."""
        self._waits.pop(name, None)
        for adapter_slot in self._adapter_slots:
            if adapter_slot.promised_to == name:
                adapter_slot.promised_to = None

    def _forget_unwanted(self) -> None:
        """Who waited for an adapter in the turn before may have left."""
        for name in [name for name in self._waits if name not in self._wanted]:
            self._keep_promise(name)
        self._wanted.clear()

    def check(self, living: Iterable[Sequence]) -> None:
        """Raises AssertionError if the invariant is broken."""
        counts = [0] * len(self._adapter_slots)
        alive = set(living)
        for sequence, number in self._adapter_slot_of.items():
            counts[number] += 1
            assert sequence in alive, "a sequence that is over holds an adapter slot"
            assert self._adapter_slots[number].name == sequence.spec.sampling.lora_name, (
                "a sequence holds the adapter slot of another adapter"
            )
        assert counts == [adapter_slot.num_holders for adapter_slot in self._adapter_slots], (
            "an adapter slot's count is not its number of holders"
        )
        assert {
            adapter_slot.name: adapter_slot for adapter_slot in self._adapter_slots if adapter_slot.name is not None
        } == self._by_name, "the adapter slots and their names differ"
        assert not any(
            adapter_slot.num_holders and adapter_slot.reading is not None for adapter_slot in self._adapter_slots
        ), "an adapter slot is held before its adapter is there"


def _reason(error: BaseException) -> RequestError:
    if isinstance(error, RequestError):
        return error
    log.exception("an adapter could not be read", exc_info=error)
    return RequestError("it cannot be read", ErrorKind.INTERNAL)
