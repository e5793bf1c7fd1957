"""Who gets which adapter slot, when: with a scheduler, a library that reads when it is told to, and no device."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_backend.batch import AdapterUse, Batch, StepOutput, StepResult
from paged_backend.errors import ErrorKind, RequestError
from paged_backend.messages import Finish, Submit
from paged_backend.request import parse_sampling
from paged_backend.scheduler.adapter_slots import AdapterSlots
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler

LIMITS = SchedulerLimits(page_size=4, num_pages=64, max_model_len=64, max_num_sequences=4, max_batched_tokens=64)
PROMPT = np.arange(9, dtype=np.int32)


@dataclass(frozen=True)
class Read:
    name: str
    version: str = "1"


class Library:
    def __init__(self) -> None:
        self.broken: dict[str, Exception] = {}
        self.reads: list[str] = []
        self.version = "1"
        self.gate = threading.Event()
        self.gate.set()

    def check(self, name: str) -> None:
        if name in self.broken:
            raise self.broken[name]

    def read(self, name: str) -> Read:
        self.gate.wait(10)
        self.reads.append(name)
        if f"{name} later" in self.broken:
            raise self.broken[f"{name} later"]
        return Read(name, self.version)


class Desk:
    """A scheduler that runs as fast as its threads read."""

    def __init__(self, num_adapter_slots: int, **limits: Any) -> None:
        self.library, self.now = Library(), 0.0
        self.adapters = AdapterSlots(num_adapter_slots, self.library, clock=lambda: self.now)
        self.scheduler = Scheduler(SchedulerLimits(**{**LIMITS.__dict__, **limits}), adapters=self.adapters)
        self.lying: dict[int, str] = {}  # adapter slot -> the adapter that the device has there
        self.rows: dict[int, str | None] = {}  # request id -> the adapter that its last step used
        self.finishes: dict[int, Finish] = {}
        self.cached: dict[int, int] = {}

    def submit(self, request_id: int, name: str | None = None, max_tokens: int = 5, **sampling: Any) -> None:
        params = parse_sampling({"lora_name": name, "max_tokens": max_tokens, **sampling})
        self.scheduler.submit(Submit(request_id, PROMPT.tobytes(), params, (), "", 1e18))

    def step(self) -> list[int]:
        """Request ids of a step, once nothing is being read."""
        self._settle()
        batch = self.scheduler.schedule()
        self.scheduler.check()
        if batch is not None:
            self._run(batch)
        self._take(self.scheduler.refusals())
        return [] if batch is None else sorted(batch.request_ids.tolist())

    def run(self, num_steps: int = 200) -> None:
        for _ in range(num_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("it does not end")

    def _settle(self) -> None:
        """Waits for the threads."""
        futures = [
            *self.adapters._checks.values(),
            *(
                adapter_slot.reading
                for adapter_slot in self.adapters._adapter_slots
                if adapter_slot.reading is not None
            ),
        ]
        for future in futures if self.library.gate.is_set() else []:
            future.exception(10)

    def _run(self, batch: Batch) -> None:
        use = batch.ask(AdapterUse)
        if use is not None:
            self.lying |= {adapter_slot: adapter.name for adapter_slot, adapter in use.arrivals}
        told = {} if use is None else dict(use.new_rows.tolist())
        assert set(told) <= {new.row for new in batch.new_rows}
        for new in batch.new_rows:
            sequence = self.scheduler._running.table.sequences[new.row]
            assert sequence is not None
            wanted = sequence.spec.sampling.lora_name
            assert (self.lying[told[new.row]] if new.row in told else None) == wanted, (
                "the device has another adapter there"
            )
            self.rows[sequence.request_id] = wanted
        adapted = any(
            runner.leader in self.adapters._adapter_slot_of
            for runner in self.scheduler._running.runners
            if runner.row in batch.rows
        )
        assert (use is not None and use.in_use) == adapted
        answers = (None,) * len(batch.asks)
        self._take(
            self.scheduler.commit(batch, StepResult(np.full(int(batch.samples.sum()), 3, np.int32), answers=answers))
        )

    def _take(self, output: StepOutput | None) -> None:
        if output is not None:
            self.finishes |= {finish.request_id: finish for finish in output.finishes}
            self.cached |= output.started


def test_requests_run_with_their_adapters_and_others_without_waiting_for_them() -> None:
    desk = Desk(2)
    desk.library.gate.clear()
    for request_id, name in enumerate(["a", None, "b", "a"]):
        desk.submit(request_id, name)
    assert desk.step() == [1] and desk.step() == [1], "who wants no adapter waits for none"
    desk.library.gate.set()
    desk.run()
    assert desk.rows == {0: "a", 1: None, 2: "b", 3: "a"}
    assert sorted(desk.library.reads) == ["a", "b"]
    assert all(finish.reason == "length" for finish in desk.finishes.values())


def test_the_adapter_not_used_for_longest_goes_and_one_in_use_stays() -> None:
    desk = Desk(2)
    for request_id, name in enumerate(["a", "b", "a"]):
        desk.submit(request_id, name)
        desk.run()
    desk.submit(3, "c")
    desk.run()
    assert {adapter_slot.name for adapter_slot in desk.adapters._adapter_slots} == {"a", "c"}
    desk.submit(4, "a", max_tokens=30)
    desk.submit(5, "c", max_tokens=3)
    desk.step()
    desk.submit(6, "b", max_tokens=3)
    desk.run()
    assert desk.library.reads == ["a", "b", "c", "b"]
    assert {adapter_slot.name for adapter_slot in desk.adapters._adapter_slots} == {"a", "b"}


def test_who_finds_no_adapter_slot_waits_while_others_are_served_and_then_gets_one() -> None:
    desk = Desk(1)
    desk.submit(0, "a", max_tokens=12)
    desk.submit(1, "b")
    desk.submit(2, None)
    desk.submit(3, "a")
    ran = [desk.step() for _ in range(4)]
    assert {request_id for step in ran for request_id in step} == {0, 2, 3}
    desk.run()
    assert desk.rows == {0: "a", 1: "b", 2: None, 3: "a"}


def test_nobody_waits_for_ever_for_a_adapter_slot_that_others_keep_busy() -> None:
    desk = Desk(1, max_num_sequences=2)
    desk.submit(0, "a", max_tokens=8)
    desk.step()
    desk.submit(1, "b")
    served_at = None
    for number in range(2, 60):
        desk.submit(number, "a", max_tokens=8)  # there is always another one
        for _ in range(4):
            desk.now += 0.1
            desk.step()
        if 1 in desk.finishes:
            served_at = number
            break
    assert served_at is not None
    desk.run()
    assert len(desk.finishes) == served_at + 1


def test_a_promised_adapter_slot_is_given_up_when_the_one_who_waits_for_it_leaves() -> None:
    desk = Desk(1)
    desk.submit(0, "a", max_tokens=30)
    desk.step()
    desk.submit(1, "b")
    for _ in range(3):
        desk.step()
        desk.now += 3
    desk.submit(2, "a")
    assert desk.step() == [0], "promised to b"
    desk.scheduler.abort(1)
    desk.step()
    assert desk.step() == [0, 2]


@pytest.mark.parametrize("when", ["looked at", "read"])
def test_an_adapter_that_cannot_be_used_ends_all_who_want_it_and_is_looked_at_again_for_the_next(when: str) -> None:
    desk = Desk(1)
    desk.library.broken["a" if when == "looked at" else "a later"] = RequestError("it is broken")
    for request_id, name in enumerate(["a", "a", None]):
        desk.submit(request_id, name)
    desk.run()
    assert [desk.finishes[index].message for index in (0, 1)] == ["lora_name: 'a': it is broken"] * 2
    assert [desk.finishes[index].error for index in (0, 1, 2)] == [ErrorKind.INVALID, ErrorKind.INVALID, None]
    desk.library.broken.clear()
    desk.submit(3, "a")
    desk.run()
    assert desk.finishes[3].reason == "length"


def test_our_own_failure_is_told_without_its_text() -> None:
    desk = Desk(1)
    desk.library.broken["a"] = RuntimeError("/secret/path")
    desk.submit(0, "a")
    desk.run()
    assert desk.finishes[0].error is ErrorKind.INTERNAL and "secret" not in desk.finishes[0].message


def test_names_that_mean_nothing_take_no_adapter_slot_from_anybody() -> None:
    desk = Desk(1)
    desk.submit(0, "a")
    desk.run()
    for request_id in range(1, 5):
        desk.library.broken[f"x{request_id}"] = RequestError("there is none")
        desk.submit(request_id, f"x{request_id}")
        desk.run()
    assert desk.lying == {0: "a"} and [adapter_slot.name for adapter_slot in desk.adapters._adapter_slots] == ["a"]


def test_one_who_leaves_while_its_adapter_is_read_leaves_nothing_behind() -> None:
    desk = Desk(1)
    desk.library.gate.clear()
    desk.submit(0, "a")
    desk.step()
    while desk.adapters._adapter_slots[0].reading is None:
        desk.step()
    desk.scheduler.abort(0)
    assert not desk.scheduler.has_work
    desk.library.gate.set()
    desk.submit(1, "b")
    desk.run()
    assert desk.rows == {1: "b"}


def test_pages_are_shared_by_those_with_the_same_adapter_alone() -> None:
    desk = Desk(3)
    for request_id, name in enumerate([None, "a", "b", "a", None, "b"]):
        desk.submit(request_id, name)
        desk.run()
    assert desk.cached == {0: 0, 1: 0, 2: 0, 3: 8, 4: 8, 5: 8}


def test_no_salt_of_a_caller_finds_an_adapters_pages() -> None:
    desk = Desk(1)
    desk.submit(0, "a")
    desk.run()
    for request_id, salt in enumerate(["adapter 1\0a\0salt ", "salt ", "adapter 1\0a\0"], start=1):
        desk.scheduler.submit(Submit(request_id, PROMPT.tobytes(), parse_sampling({"max_tokens": 2}), (), salt, 1e18))
        desk.run()
    assert all(num_cached == 0 for num_cached in desk.cached.values())


def test_a_preempted_sequence_keeps_its_adapter_slot() -> None:
    desk = Desk(1, num_pages=8, max_model_len=32)
    desk.submit(0, "a", max_tokens=20)
    desk.submit(1, "a", max_tokens=20)
    desk.submit(2, "b", max_tokens=3)
    desk.run()
    assert desk.scheduler.num_preemptions > 0
    assert desk.library.reads == ["a", "b"]


NAMES = [None, "a", "b", "c", "d", "broken", "broken later"]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_adapter_slots=st.integers(1, 3), num_pages=st.sampled_from([8, 64]))
def test_whatever_comes_and_goes_everybody_gets_his_adapter_or_a_reason(
    data: st.DataObject, num_adapter_slots: int, num_pages: int
) -> None:
    """`step` checks after every turn that no invariant is broken and that the device has each row's adapter in its
    adapter slot.
    """
    desk = Desk(num_adapter_slots, num_pages=num_pages, max_model_len=32)
    desk.library.broken = {"broken": RequestError("it is broken"), "broken later later": RequestError("it broke")}
    asked: dict[int, str | None] = {}
    gone = set()
    for request_id in range(data.draw(st.integers(1, 14))):
        asked[request_id] = data.draw(st.sampled_from(NAMES))
        desk.submit(
            request_id,
            asked[request_id],
            max_tokens=data.draw(st.integers(1, 12)),
            priority_level=data.draw(st.integers(0, 1)),
        )
        for _ in range(data.draw(st.integers(0, 3))):
            desk.now += data.draw(st.sampled_from([0.0, 1.5]))
            desk.step()
        if data.draw(st.integers(0, 4)) == 0:
            gone.add(leaver := data.draw(st.sampled_from(sorted(asked))))
            desk.scheduler.abort(leaver)
    for _ in range(400):
        if not desk.scheduler.has_work:
            break
        desk.now += 0.5
        desk.step()
    assert not desk.scheduler.has_work
    for request_id, name in asked.items():
        if request_id not in gone:
            finish = desk.finishes[request_id]
            assert (finish.error is ErrorKind.INVALID) == (name is not None and "broken" in name)
            assert finish.error is not None or desk.rows[request_id] == name
    assert not desk.adapters._adapter_slot_of and not desk.adapters._waits
