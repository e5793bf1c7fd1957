"""A front end that dies takes its own callers with it and nobody else: another one inherits the engine, which goes on,
and dies with the last.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paged_backend.process_id import ProcessId
from tests.front_end_process import FrontEndProcess
from tests.server import fake_engine

TOKENIZER = fake_engine.make_tokenizer()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short temporary folder: socket addresses end at 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


Start = Callable[..., list[FrontEndProcess]]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    started: list[FrontEndProcess] = []

    def begin(count: int, **options: object) -> list[FrontEndProcess]:
        """In the order of their numbers; the first owns the engine."""
        key = uuid.uuid4().hex
        front_ends = [FrontEndProcess(key, count, folder, **options) for _ in range(count)]
        started.extend(front_ends)
        _wait(lambda: all(front_end.told for front_end in front_ends), 20)
        return sorted(front_ends, key=lambda front_end: front_end.told["front_end"])

    yield begin
    for front_end in started:
        front_end.process.kill()
        front_end.process.wait()


def _wait(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _gone(pid: int) -> bool:
    return ProcessId.of(pid) is None


def _check(front_end: FrontEndProcess, prompt: str, num_tokens: int) -> None:
    answer = front_end.answers[prompt]
    assert (answer["reason"], answer["error"]) == ("length", "")
    assert answer["ids"] == fake_engine.answer_ids(TOKENIZER, prompt, num_tokens)


def test_the_streams_of_others_go_on_in_the_same_engine_when_its_owner_is_killed(start: Start) -> None:
    owner, *others = start(3)
    engine = owner.told["engine"]
    for number, front_end in enumerate([owner, *others]):
        front_end.ask(f"tokens=100 delay=0.02 {number}")
    _wait(lambda: all(front_end.num_tokens > 5 for front_end in others))
    owner.kill()
    _wait(lambda: others[0].told["owner"])
    _wait(lambda: others[0].answers and others[1].answers)
    for number, front_end in enumerate(others, start=1):
        _check(front_end, f"tokens=100 delay=0.02 {number}", 100)
        assert (front_end.told["engine"], front_end.told["owner"]) == (engine, number == 1)


@pytest.mark.parametrize("first", ["engine", pytest.param("owner", marks=pytest.mark.long)])
def test_the_heir_restarts_the_engine_and_keeps_a_standby(start: Start, first: str) -> None:
    """Whichever of the two dies first, and when both die at once."""
    owner, *others = start(3)
    engine, standby = owner.told["engine"], None
    for number, front_end in enumerate(others):
        front_end.ask(f"tokens=100 delay=0.03 {number}")
    _wait(lambda: all(front_end.num_tokens > 5 for front_end in others))
    if first == "engine":
        os.kill(engine, signal.SIGKILL)
        owner.kill()
    else:
        owner.kill()
        _wait(lambda: others[0].told["standby"])
        standby = others[0].told["standby"]
        os.kill(engine, signal.SIGKILL)
    _wait(lambda: others[0].answers and others[1].answers, 20)
    for number, front_end in enumerate(others):
        _check(front_end, f"tokens=100 delay=0.03 {number}", 100)
    assert others[0].told["engine"] == others[1].told["engine"] == (standby or others[0].told["engine"]) != engine


def test_an_heir_counts_the_restarts_that_were_before_it(start: Start) -> None:
    owner, heir = start(2, max_engine_restarts=1)
    first = heir.told["engine"]
    os.kill(first, signal.SIGKILL)
    _wait(lambda: heir.told["engine"] != first and heir.told["alive"])
    second = heir.told["engine"]
    owner.kill()
    _wait(lambda: heir.told["owner"])
    heir.ask("silent")
    os.kill(second, signal.SIGKILL)
    _wait(lambda: not heir.told["alive"] and heir.answers)
    assert heir.told["engine"] == second and heir.answers["silent"]["error"]


def test_the_loss_of_all_replicas_is_told_though_the_front_end_that_lost_the_first_was_killed(start: Start) -> None:
    killed, *others = start(3, replicas=2, max_engine_restarts=0, prefix_cache=False)
    first, second = killed.told["engines"]
    os.kill(first, signal.SIGKILL)
    _wait(lambda: all(front_end.told["engines"] == [second] for front_end in (killed, *others)))
    killed.kill()
    time.sleep(0.6)  # it owned the second engine, too, whose heir looks twice a second
    os.kill(second, signal.SIGKILL)
    _wait(lambda: not any(front_end.told["alive"] for front_end in others))
    _wait(lambda: any(front_end.told["losses"] for front_end in others))
    time.sleep(0.3)
    assert sum(front_end.told["losses"] for front_end in others) == 1


@pytest.mark.parametrize("state", ["serves", "is stopped"])
def test_an_engine_and_its_standby_are_gone_when_all_front_ends_are(start: Start, state: str) -> None:
    front_ends = start(2)
    _wait(lambda: front_ends[0].told["standby"])
    engine, standby = front_ends[0].told["engine"], front_ends[0].told["standby"]
    if state == "is stopped":
        os.kill(engine, signal.SIGSTOP)
    front_ends[0].kill()
    time.sleep(0.3)
    assert not _gone(engine)
    front_ends[1].kill()
    _wait(lambda: _gone(engine), 2)
    _wait(lambda: _gone(standby), 20)  # which notices when it reads on


@pytest.mark.long
def test_the_last_to_leave_in_peace_ends_an_inherited_engine_and_removes_the_folder(start: Start, folder: Path) -> None:
    front_ends = start(3)
    engine = front_ends[0].told["engine"]
    front_ends[0].kill()
    front_ends[1].kill()
    _wait(lambda: front_ends[2].told["owner"])
    front_ends[2].ask("tokens=3")
    _wait(lambda: front_ends[2].answers)
    assert front_ends[2].leave() == 0
    assert _gone(engine)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_front_ends_engines_and_standbys_die_in_any_order_and_the_survivors_answers_are_whole(
    start: Start, seed: int
) -> None:
    chance = random.Random(seed)
    front_ends = start(5, max_engine_restarts=100)
    prompts = {id(front_end): f"tokens=150 delay=0.02 {number}" for number, front_end in enumerate(front_ends)}
    for front_end in front_ends:
        front_end.ask(prompts[id(front_end)])
    _wait(lambda: all(front_end.num_tokens > 3 for front_end in front_ends))
    living = list(front_ends)
    for what in chance.sample(["front end", "front end", "front end", "engine", "engine", "standby"], 6):
        if what == "front end":
            living.pop(chance.randrange(len(living))).kill()
        else:
            owners = [front_end for front_end in living if front_end.told["owner"]]
            pid = owners[0].told[what] if owners else None
            if pid and not _gone(pid):
                os.kill(pid, signal.SIGKILL)
        time.sleep(chance.choice([0.0, 0.1, 0.7]))
    for front_end in living:
        _wait(lambda front_end=front_end: front_end.answers, 20)
        _check(front_end, prompts[id(front_end)], 150)
