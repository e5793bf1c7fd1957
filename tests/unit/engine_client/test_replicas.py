"""Which replica a request goes to, and what front ends know of the replicas' prefix caches."""

from __future__ import annotations

import os
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from paged_backend.block_hashes import block_hashes_of
from paged_backend.config import EngineConfig
from paged_backend.engine.kv_event_publisher import KvEventPublisher
from paged_backend.engine_client.client import EngineClient
from paged_backend.engine_client.known_prefixes import KnownPrefixes
from paged_backend.engine_client.live_requests import LiveRequest
from paged_backend.engine_client.replicas import Replicas, best_of
from paged_backend.errors import ErrorKind, RequestError
from paged_backend.messages import KV_SOCKET, number_of
from paged_backend.scheduler.kv_events import Forgotten, Stored
from tests.unit.engine_client.clients import COMMAND, ask, prompt, short_folder

PAGE_SIZE = 4
PROMPT = np.arange(20, dtype=np.int32)
CONFIG = EngineConfig(model="fake", replicas=2, max_engine_restarts=0, prefix_cache=False)


@pytest.mark.parametrize(
    ("num_known", "num_under_way", "chosen"),
    [
        pytest.param([0, 0, 0], [3, 1, 2], 1, id="nobody knows it: the fewest requests"),
        pytest.param([2, 5, 5], [0, 3, 1], 2, id="the longest prefix, of equals the fewest requests"),
        pytest.param([0, 5, 0], [10, 15, 12], 1, id="half as many more are borne"),
        pytest.param([0, 5, 1], [10, 16, 10], 2, id="many more are not; of the idle the one that knows more"),
        pytest.param([0, 9, 0], [0, 4, 1], 1, id="a few more are always borne"),
    ],
)
def test_a_request_goes_where_its_prefix_is_unless_much_is_waiting_there(
    num_known: list[int], num_under_way: list[int], chosen: int
) -> None:
    assert best_of(range(3), num_known, num_under_way) == chosen


def test_a_replica_that_is_no_candidate_is_not_chosen() -> None:
    assert best_of([1, 2], [9, 0, 0], [0, 5, 3]) == 2


def stored(begin: int, end: int) -> Stored:
    """Pages of PROMPT, by keys that nobody else looks into."""
    keys = [str(index).encode() for index in range(begin, end)]
    parent = None if begin == 0 else str(begin - 1).encode()
    return Stored(keys, parent, PROMPT[begin * PAGE_SIZE : end * PAGE_SIZE].tobytes(), None, "")


class Caches:
    """Of two engines, as they tell of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders = [self._folder("0"), self._folder("1")]
        self.publishers = [self.open(folder) for folder in self.folders]
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def _folder(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir()
        return folder

    def open(self, folder: Path) -> KvEventPublisher:
        address = f"ipc://{folder}/{KV_SOCKET}"
        return KvEventPublisher(zmq.Context(), address, f"{address}.replay", PAGE_SIZE)

    def replace(self, replica: int) -> None:
        """Another engine takes its place."""
        self.publishers[replica].close()
        self.folders[replica] = self._folder(f"{replica} again")
        self.publishers[replica] = self.open(self.folders[replica])


@pytest.fixture
def caches() -> Iterator[Caches]:
    with tempfile.TemporaryDirectory(dir="/tmp") as root:
        caches = Caches(Path(root))
        yield caches
        for publisher in caches.publishers:
            publisher.close()


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_front_ends_know_what_replicas_have_cached(caches: Caches) -> None:
    """Also what was cached before they came, and not any more what was forgotten or died with its engine."""
    hashes = block_hashes_of(PROMPT, PAGE_SIZE)
    assert len(hashes) == 5
    caches.publishers[0].send([stored(0, 3)])
    known = KnownPrefixes([lambda: caches.folders[0], lambda: caches.folders[1]])
    wait(lambda: known.num_known(hashes) == [3, 0])
    caches.publishers[1].send([stored(0, 2)])
    caches.publishers[0].send([stored(3, 5)])
    wait(lambda: known.num_known(hashes) == [5, 2])
    caches.publishers[1].send([Forgotten([b"1"])])
    wait(lambda: known.num_known(hashes) == [5, 1])
    caches.replace(0)
    wait(lambda: known.num_known(hashes) == [0, 1])
    caches.publishers[0].send([stored(0, 4)])
    wait(lambda: known.num_known(hashes) == [4, 1])
    known.close()


def test_what_replicas_had_cached_is_forgotten_where_it_cannot_be_followed(caches: Caches) -> None:
    hashes = block_hashes_of(PROMPT, PAGE_SIZE)
    caches.publishers[0].send([stored(0, 3)])
    known = KnownPrefixes([lambda: caches.folders[0], lambda: caches.folders[1]])
    wait(lambda: known.num_known(hashes) == [3, 0])
    caches.folders.clear()  # the thread fails
    wait(lambda: known.num_known(hashes) == [0, 0])
    known.close()


# ---- engines that die


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replicas]:
    """Two fake engines, of which neither is restarted."""
    with short_folder(monkeypatch):
        replicas = Replicas.connect(CONFIG, uuid.uuid4().hex, 1, COMMAND)
        replicas.start(lambda stats, replica: None)
        yield replicas
        replicas.close()


def test_prompts_that_nobody_knows_go_to_each_in_turn_and_front_ends_begin_with_different_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with short_folder(monkeypatch):
        key = uuid.uuid4().hex
        front_ends = [Replicas(CONFIG, key, 2, COMMAND) for _ in range(2)]
        chosen = [[front_end._choose(prompt("tokens=1"), "", None) for _ in range(3)] for front_end in front_ends]
        for front_end in front_ends:
            front_end.close()
    assert chosen == [[0, 1, 0], [1, 0, 1]]


def test_requests_of_a_replica_that_is_lost_go_on_in_another_and_can_still_be_aborted(two: Replicas) -> None:
    losses: list[float] = []
    gone: list[int] = []
    two.on_loss = lambda: losses.append(time.monotonic())
    two.on_replica_gone = gone.append
    asked = [ask(two, f"tokens=60 delay=0.05 number={number}") for number in range(4)]
    wait(lambda: all(len(inbox.ids) > 3 for _, inbox in asked))
    assert [client.num_under_way for client in two._clients] == [2, 2]
    os.kill(two._clients[0].engine_pid, signal.SIGKILL)
    wait(lambda: not two._clients[0].alive and two._clients[1].num_under_way == 4)
    moved, stopped = [pair for pair in asked if number_of(pair[0]) % 2 == 0]
    two.abort(stopped[0])
    wait(lambda: two._clients[1].num_under_way == 3)
    assert two.alive and not losses
    wait(lambda: gone == [0])
    last = ask(two, "tokens=5 delay=0.01")
    kept = [inbox for _, inbox in asked if inbox is not stopped[1]]
    wait(lambda: all(inbox.finished.is_set() for inbox in (*kept, last[1])))
    assert {inbox.pieces[-1].finish.reason for inbox in kept} == {"length"}
    assert moved[1] in kept and len(moved[1].ids) == 60 and not two._moved
    assert not stopped[1].finished.is_set()


def test_a_request_that_is_aborted_on_its_way_to_another_replica_is_aborted_there(
    two: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [ask(two, f"tokens=2000 delay=0.05 number={number}") for number in range(2)]
    wait(lambda: all(len(inbox.ids) > 3 for _, inbox in asked))
    moved = next(request_id for request_id, _ in asked if number_of(request_id) % 2 == 0)
    adopted: list[int] = []

    def adopt(live: LiveRequest) -> int:
        two.abort(moved)
        adopted.append(EngineClient.adopt(two._clients[1], live))
        return adopted[-1]

    monkeypatch.setattr(two._clients[1], "adopt", adopt)
    os.kill(two._clients[0].engine_pid, signal.SIGKILL)
    wait(lambda: adopted and len(two._clients[1]._live) == 1)
    wait(lambda: two._settled == {0})
    assert not two._moved and not two._aborted


def test_nothing_is_kept_of_requests_that_are_over(two: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one that ends in its new replica before it is known which number it has there, and of aborts that come
    late.
    """
    (short, heard), (long, _) = ask(two, "tokens=40 delay=0.05"), ask(two, "tokens=2000 delay=0.05")
    assert number_of(short) % 2 == 0

    def adopt(live: LiveRequest) -> int:
        now = EngineClient.adopt(two._clients[1], live)
        assert heard.finished.wait(20)
        return now

    monkeypatch.setattr(two._clients[1], "adopt", adopt)
    wait(lambda: len(heard.ids) > 3)
    os.kill(two._clients[0].engine_pid, signal.SIGKILL)
    wait(lambda: two._settled == {0})
    assert len(heard.ids) == 40 and not two._moved
    for request_id in (short, long):
        two.abort(request_id)
    assert not two._aborted and not len(two._clients[1]._live)


def test_the_loss_of_the_last_replica_is_the_loss_of_the_model(two: Replicas) -> None:
    losses: list[float] = []
    two.on_loss = lambda: losses.append(time.monotonic())
    asked = [ask(two, "tokens=400 delay=0.1") for _ in range(2)]
    wait(lambda: all(inbox.ids for _, inbox in asked))
    for client in two._clients:
        os.kill(client.engine_pid, signal.SIGKILL)
    wait(lambda: losses and all(inbox.finished.is_set() for _, inbox in asked))
    assert {inbox.pieces[-1].finish.error for _, inbox in asked} == {ErrorKind.OVERLOADED}
    assert not two.alive and len(losses) == 1
    with pytest.raises(RequestError):
        ask(two, "tokens=1")
