"""What the engine tells those who watch: the truth about every page, only while somebody listens, and nothing of
prompts and answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from paged_backend.engine.engine import Engine
from paged_backend.engine.snapshot import (
    CACHED,
    FIRST_REQUEST,
    FREE,
    MAX_CELLS,
    SHARED,
    WATCH_SOCKET,
    Numbers,
    Snapshot,
    decode,
    page_cells,
)
from paged_backend.engine.snapshot_publisher import Watch
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from tests.simulated_runner import SimulatedRunner

PAGE_SIZE = 4
LIMITS = SchedulerLimits(
    page_size=PAGE_SIZE, num_pages=32, max_model_len=64, max_num_sequences=8, max_batched_tokens=64
)


class Watched:
    """An engine's loop as engine_process turns it, and one watcher."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, limits: SchedulerLimits = LIMITS) -> None:
        monkeypatch.setattr("paged_backend.engine.snapshot_publisher._PERIOD_SECONDS", 0.0)
        monkeypatch.setattr("paged_backend.engine.snapshot_publisher._SHARE", 1e9)
        self.context = zmq.Context()
        self.folder = folder
        self.scheduler = Scheduler(limits)
        runner = SimulatedRunner(
            limits.max_num_sequences,
            limits.num_pages,
            limits.page_size,
            limits.max_model_len,
            limits.max_batched_tokens,
        )
        self.engine = Engine(self.scheduler, runner, steps_ahead=1)
        self.watch = Watch(self.context, folder, "a model", self.scheduler, limits.page_size)

    def watcher(self) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.SUB)
        socket.subscribe(b"")
        socket.connect(f"ipc://{self.folder / WATCH_SOCKET}")
        time.sleep(0.1)  # the subscription is on its way
        return socket

    def submit(self, request_id: int, prompt: list[int], max_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        submit = Submit(request_id, np.array(prompt, np.int32).tobytes(), sampling, (), "", time.monotonic())
        self.engine.submit(submit)
        self.watch.note_request(submit)

    def turn(self) -> None:
        if not self.engine.idle:
            for output in self.engine.step():
                self.watch.note_step(output)
        self.watch.publish()

    def turn_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.turn()
            time.sleep(0.01)

    def hear(self, socket: zmq.Socket[bytes]) -> Snapshot:
        assert socket.poll(1000), "nothing was published"
        return decode(socket.recv())

    def hear_now(self, socket: zmq.Socket[bytes]) -> Snapshot:
        """What is true now, whatever is still on its way; a snapshot may be dropped if many are."""
        asked = time.monotonic()
        for _ in range(10):
            self.watch.publish()
            while socket.poll(1000):
                snapshot = decode(socket.recv())
                if snapshot.time >= asked:
                    return snapshot
        raise AssertionError("nothing new was published")

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    made = Watched(tmp_path, monkeypatch)
    yield made
    made.close()


def test_nothing_is_published_or_gathered_while_nobody_watches(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    snapshot = Watch._snapshot
    monkeypatch.setattr(Watch, "_snapshot", lambda watch, now: made.append(now) or snapshot(watch, now))
    watched.submit(1, [1, 2, 3], 20)
    for _ in range(30):
        watched.turn()
    assert (made, watched.watch._num_tokens, watched.watch._arrivals) == ([], 0, {})
    socket = watched.watcher()
    watched.turn()
    assert len(made) == 1
    socket.close()
    watched.turn_for(0.3)
    num_made = len(made)
    watched.turn_for(0.1)
    assert len(made) == num_made


def test_every_page_is_shown_as_what_it_is(watched: Watched) -> None:
    socket = watched.watcher()
    watched.turn()
    assert watched.hear(socket).cells == bytes(2 * 32)
    beginning = list(range(9))
    watched.submit(1, [50] * 9, 2)
    for _ in range(6):
        watched.turn()
    watched.submit(2, beginning, 20)
    watched.turn()
    watched.turn()
    watched.submit(3, [*beginning, 9, 10], 20)
    for _ in range(4):
        watched.turn()
    snapshot = watched.hear_now(socket)
    cells = np.frombuffer(snapshot.cells, "<u2")
    pool = watched.scheduler.pool
    two, three = (sequence.page_table.groups[0] for sequence in watched.scheduler.sequences)
    numbers = {request.arrival_index: request.number for request in snapshot.requests}
    assert set(two[:2]) == set(three[:2]), "the second and third request begin alike"
    expected = np.full(32, FREE)
    expected[list(pool.cached_pages)] = CACHED
    expected[two], expected[three] = numbers[2], numbers[3]
    expected[two[:2]] = SHARED
    assert cells.tolist() == expected.tolist()
    assert len(set(numbers.values())) == 2
    assert min(numbers.values()) >= FIRST_REQUEST
    assert (snapshot.pages_shared, snapshot.pages_cached, snapshot.pages_free) == (2, 2, pool.num_free)
    assert snapshot.pages_held == np.count_nonzero(cells >= SHARED)


def test_requests_are_told_with_their_tokens_and_times(watched: Watched) -> None:
    socket = watched.watcher()
    watched.turn()
    for request_id in range(10):
        watched.submit(request_id, [request_id] * 5, 12)
    told: list[Snapshot] = []
    while not watched.engine.idle:
        watched.turn()
        told.append(watched.hear(socket))
    told.append(watched.hear(socket)) if socket.poll(10) else None
    first, last = told[2], told[-1]
    assert (first.num_running, first.num_waiting) == (8, 2)
    assert [request.arrival_index for request in first.requests] == list(range(1, 11))
    assert [request.number > 0 for request in first.requests] == [True] * 8 + [False] * 2
    assert {request.num_prompt_tokens for request in first.requests} == {5}
    assert first.requests[0].num_tokens > first.requests[-1].num_tokens == 5
    assert last.num_tokens == 120
    assert sum(len(snapshot.first_token_seconds) for snapshot in told) == 10
    assert all(0 <= seconds < 5 for snapshot in told for seconds in snapshot.first_token_seconds)
    assert sum(len(snapshot.step_seconds) for snapshot in told) >= 20
    assert (last.num_running, last.requests) == (0, ())


def test_the_first_token_of_a_request_older_than_the_watching_is_timed_too(watched: Watched) -> None:
    watched.submit(1, [1] * 40, 30)
    for request_id in range(2, 4):
        watched.submit(request_id, [request_id] * 40, 5)
    watched.turn()
    socket = watched.watcher()
    told = []
    while not watched.engine.idle:
        watched.turn()
        told.append(watched.hear(socket))
    assert sum(len(snapshot.first_token_seconds) for snapshot in told) >= 2


def test_a_second_watcher_sees_the_same_and_the_last_ones_leaving_ends_it(watched: Watched) -> None:
    first, second = watched.watcher(), watched.watcher()
    watched.turn()
    assert watched.hear(first) == watched.hear(second)
    first.close()
    watched.turn_for(0.3)
    assert watched.hear(second).num_pages == 32
    assert watched.watch._watched
    second.close()
    watched.turn_for(0.3)
    assert not watched.watch._watched


def test_a_watcher_that_does_not_listen_holds_up_nobody(watched: Watched) -> None:
    watched.watcher()
    started = time.monotonic()
    for _ in range(2000):
        watched.turn()
    assert time.monotonic() - started < 2


def test_no_token_of_a_prompt_or_answer_is_in_a_snapshot(watched: Watched) -> None:
    socket = watched.watcher()
    watched.turn()
    watched.hear(socket)
    prompt = [1_000_003, 1_000_033, 1_000_037]
    watched.submit(1, prompt, 8)
    for _ in range(4):
        watched.turn()
        sent = socket.recv()
        for token in prompt:
            assert token.to_bytes(4, "little") not in sent
            assert token.to_bytes(4, "big") not in sent


@given(st.integers(1, 3 * MAX_CELLS), st.data())
def test_a_large_pool_is_told_in_groups_that_show_their_highest_page(num_pages: int, data: st.DataObject) -> None:
    pages = sorted(data.draw(st.sets(st.integers(0, num_pages - 1), max_size=20)))
    held, cached = pages[: len(pages) // 2], pages[len(pages) // 2 :]
    cells, per_cell, num_shared = page_cells(num_pages, dict.fromkeys(cached), [(7, held)] if held else [])
    assert len(cells) <= MAX_CELLS
    assert (len(cells) - 1) * per_cell < num_pages <= len(cells) * per_cell
    assert num_shared == 0
    for cell in {page // per_cell for page in pages}:
        assert cells[cell] == (7 if any(page // per_cell == cell for page in held) else CACHED)
    assert np.count_nonzero(cells) == len({page // per_cell for page in pages})


def test_a_request_keeps_its_number_and_the_smallest_free_one_is_given_next() -> None:
    numbers = Numbers()
    assert numbers.renew([10, 11, 12]) == {10: 3, 11: 4, 12: 5}
    assert numbers.renew([12, 13]) == {12: 5, 13: 3}
    assert numbers.renew([14, 12, 13]) == {12: 5, 13: 3, 14: 4}
