"""Front ends and their engine process: one engine for all, however they arrive; clear errors when it fails; nothing
left behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from paged_backend.config import EngineConfig
from paged_backend.engine_client.client import EngineClient
from paged_backend.engine_client.election import Election
from paged_backend.engine_client.live_requests import Piece
from paged_backend.engine_client.starter import engine_command
from paged_backend.engine_client.supervisor import EngineSupervisor
from paged_backend.errors import EngineError, ErrorKind, RequestError
from paged_backend.messages import Prompt, Stats, Tokens, encode
from paged_backend.process_id import ProcessId
from paged_backend.request import SamplingParams
from tests.server import fake_engine

COMMAND = [sys.executable, str(Path(fake_engine.__file__))]
TOKENIZER = fake_engine.make_tokenizer()


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short temporary folder: socket addresses end at 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)


@pytest.fixture
def key() -> str:
    return uuid.uuid4().hex


def _connect(key: str, num_front_ends: int = 1, model: str = "fake", **options: Any) -> EngineClient:
    client = EngineClient.connect(EngineConfig(model=model, **options), key, num_front_ends, COMMAND)
    client.start(lambda stats: None)
    return client


def _connect_all(key: str, num_front_ends: int, model: str = "fake", **options: Any) -> list[EngineClient]:
    """At the same time, as instances initialise."""
    with ThreadPoolExecutor(num_front_ends) as threads:
        return list(threads.map(lambda _: _connect(key, num_front_ends, model, **options), range(num_front_ends)))


def _close_all(clients: list[EngineClient]) -> None:
    """One after another, as instances are finalized."""
    for client in clients:
        client.close()


def _prompt(text: str, **sampling: object) -> Prompt:
    params = SamplingParams(**{"max_tokens": 64, **sampling})  # type: ignore[arg-type]
    return Prompt(np.array(TOKENIZER.encode(text).ids, np.int32), params, ())


class Inbox:
    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.finished = threading.Event()

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.finish is not None:
            self.finished.set()

    @property
    def ids(self) -> list[int]:
        return [token_id for piece in self.pieces for token_id in piece.token_ids]


def _ask(client: EngineClient, text: str, **sampling: object) -> tuple[int, Inbox]:
    inbox = Inbox()
    return client.submit(_prompt(text, **sampling), "", time.monotonic(), inbox), inbox


def _wait(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Generous: a new process takes seconds on a busy machine. What must be quick is measured where it is claimed."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _engine_pid(client: EngineClient) -> int:
    return client.engine_pid


def test_front_ends_that_arrive_together_share_one_engine_and_have_their_own_numbers(key: str) -> None:
    clients = _connect_all(key, 4)
    try:
        assert len({_engine_pid(client) for client in clients}) == 1
        assert sorted(client.front_end for client in clients) == [0, 1, 2, 3]
        answers = [_ask(client, f"tokens=9 {client.front_end}")[1] for client in clients for _ in range(5)]
        assert all(inbox.finished.wait(5) for inbox in answers)
        for number, inbox in enumerate(answers):
            assert inbox.ids == fake_engine.answer_ids(TOKENIZER, f"tokens=9 {clients[number // 5].front_end}", 9)
    finally:
        _close_all(clients)


def test_the_last_token_and_the_finish_come_in_one_piece(key: str) -> None:
    client = _connect(key)
    try:
        _, inbox = _ask(client, "tokens=3 delay=0.01", logprobs=2)
        assert inbox.finished.wait(5)
        assert [len(piece.token_ids) for piece in inbox.pieces] == [1, 1, 1]
        assert [piece.num_cached_tokens for piece in inbox.pieces] == [3, None, None]
        assert [piece.finish is not None for piece in inbox.pieces] == [False, False, True]
        token = inbox.ids[0]
        assert list(inbox.pieces[0].logprobs[0].items()) == [(token, (-0.5, 1)), (token + 1, (-1.5, 2))]
    finally:
        client.close()


def test_nothing_is_left_after_the_last_close(key: str, folder: Path) -> None:
    clients = _connect_all(key, 3)
    engine = ProcessId.of(_engine_pid(clients[0]))
    assert engine is not None
    _close_all(clients)
    assert not engine.alive
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("order", ["owner first", "owner last"])
def test_closing_takes_little_time_in_any_order(key: str, order: str) -> None:
    clients = sorted(_connect_all(key, 3), key=lambda client: client.front_end, reverse=order == "owner last")
    started = time.monotonic()
    _close_all(clients)
    assert time.monotonic() - started < 4


def test_a_reload_gets_its_own_engine_while_the_old_front_ends_run(key: str) -> None:
    old = _connect_all(key, 2)
    new = _connect_all(key, 2)
    try:
        assert _engine_pid(old[0]) == _engine_pid(old[1]) != _engine_pid(new[0]) == _engine_pid(new[1])
        _close_all(old)
        _, inbox = _ask(new[1], "tokens=3")
        assert inbox.finished.wait(5)
    finally:
        _close_all(old + new)


def test_a_front_end_that_arrives_after_the_owner_left_starts_anew(key: str) -> None:
    first = _connect(key, 3)
    first.close()
    second = _connect(key, 3)
    try:
        assert second.front_end == 0
    finally:
        second.close()


def test_a_broken_load_tells_every_front_end_why_and_does_not_poison_the_next(key: str) -> None:
    errors = []
    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(_connect, key, 4, "broken") for _ in range(4)]:
            with pytest.raises(EngineError) as caught:
                future.result()
            errors.append(str(caught.value))
    assert errors == ["model 'broken': the checkpoint is broken"] * 4
    _close_all(_connect_all(key, 4))


def test_an_engine_that_dies_while_loading_is_noticed(key: str) -> None:
    with pytest.raises(EngineError, match="ended with status 3 before it was ready"):
        _connect(key, model="crash")


def test_an_engine_that_cannot_be_started_is_an_error(key: str, folder: Path) -> None:
    with pytest.raises(EngineError, match="cannot be started: No such file"):
        EngineClient.connect(EngineConfig(), key, 1, [str(folder / "nothing")])
    with pytest.raises(EngineError, match="cannot be started"):
        EngineClient.connect(EngineConfig(), key, 1, [str(folder / "nothing")])


def test_live_requests_go_on_in_the_next_engine_again_and_again(key: str) -> None:
    """Killed five times while they run, and asked for more while there is no engine: every answer whole, no token
    twice.
    """
    clients = _connect_all(key, 3, max_engine_restarts=100)
    try:
        asked = [
            (f"tokens=60 delay=0.02 {number}", _ask(clients[number % 3], f"tokens=60 delay=0.02 {number}")[1])
            for number in range(30)
        ]

        def num_tokens() -> int:
            return sum(len(inbox.ids) for _, inbox in asked)

        for _ in range(5):
            aim = num_tokens() + 60
            while num_tokens() < aim:
                time.sleep(0.01)
            os.kill(_engine_pid(clients[0]), signal.SIGKILL)
            asked += [(f"tokens=9 {number}", _ask(clients[number % 3], f"tokens=9 {number}")[1]) for number in range(3)]
        assert all(client.alive for client in clients)
        for prompt, inbox in asked:
            assert inbox.finished.wait(20)
            assert inbox.ids == fake_engine.answer_ids(TOKENIZER, prompt, len(inbox.ids))
            assert [piece.finish.reason for piece in inbox.pieces if piece.finish is not None] == ["length"]
        assert len({_engine_pid(client) for client in clients}) == 1
    finally:
        _close_all(clients)


def test_an_engine_that_says_nothing_is_killed_and_replaced(key: str) -> None:
    client = _connect(key, engine_hang_seconds=0.5)
    try:
        _, inbox = _ask(client, "tokens=60 delay=0.01")
        _wait(lambda: len(inbox.ids) > 3)
        os.kill(_engine_pid(client), signal.SIGSTOP)
        assert inbox.finished.wait(30)
        assert inbox.ids == fake_engine.answer_ids(TOKENIZER, "tokens=60 delay=0.01", 60)
    finally:
        client.close()


def test_an_engine_that_hangs_while_it_loads_after_a_restart_is_killed_and_replaced(key: str) -> None:
    client = _connect(key, model="slow", engine_hang_seconds=5)
    try:
        client._supervisor._load_seconds = 0.1
        _, inbox = _ask(client, "tokens=60 delay=0.01")
        _wait(lambda: len(inbox.ids) > 3)
        first = _engine_pid(client)
        os.kill(first, signal.SIGKILL)
        _wait(lambda: _engine_pid(client) != first)
        os.kill(_engine_pid(client), signal.SIGSTOP)
        assert inbox.finished.wait(30)
        assert inbox.ids == fake_engine.answer_ids(TOKENIZER, "tokens=60 delay=0.01", 60)
    finally:
        client.close()


def _standby_pid(client: EngineClient) -> int | None:
    standby = client._supervisor._starter._standby
    return None if standby is None else standby.pid


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standbys are started as soon as the engine serves."""
    monkeypatch.setattr("paged_backend.engine_client.starter.STANDBY_AFTER_SECONDS", 0.0)


@pytest.mark.usefixtures("soon")
def test_the_process_that_stands_by_takes_the_dead_engines_place_and_another_takes_its_own(
    key: str, folder: Path
) -> None:
    clients = _connect_all(key, 3)
    try:
        (owner,) = [client for client in clients if client._supervisor.owner]
        seen = [_engine_pid(owner)]
        for number in range(3):
            asked = [
                (f"tokens=60 delay=0.02 {number}", _ask(client, f"tokens=60 delay=0.02 {number}")[1])
                for client in clients
            ]
            _wait(lambda: _standby_pid(owner) not in (None, *seen))
            standby = _standby_pid(owner)
            assert standby is not None
            os.kill(_engine_pid(owner), signal.SIGKILL)
            for prompt, inbox in asked:
                assert inbox.finished.wait(30)
                assert inbox.ids == fake_engine.answer_ids(TOKENIZER, prompt, 60)
            assert [_engine_pid(client) for client in clients] == [standby] * 3
            seen.append(standby)
        _wait(lambda: _standby_pid(owner) is not None)
        last = ProcessId.of(_standby_pid(owner) or 0)
        assert last is not None and last.alive
    finally:
        _close_all(clients)
    assert not last.alive
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("soon")
def test_without_its_standby_an_engine_is_replaced_by_a_new_process(key: str) -> None:
    client = _connect(key)
    try:
        _, inbox = _ask(client, "tokens=60 delay=0.02")
        _wait(lambda: _standby_pid(client) is not None)
        standby = _standby_pid(client)
        assert standby is not None
        os.kill(standby, signal.SIGKILL)
        os.kill(_engine_pid(client), signal.SIGKILL)
        assert inbox.finished.wait(30)
        assert inbox.ids == fake_engine.answer_ids(TOKENIZER, "tokens=60 delay=0.02", 60)
        assert _engine_pid(client) != standby
    finally:
        client.close()


@pytest.mark.usefixtures("soon")
def test_a_standby_that_was_killed_is_replaced_and_none_is_left_when_there_is_no_engine_any_more(key: str) -> None:
    client = _connect(key, max_engine_restarts=0)
    try:
        _wait(lambda: _standby_pid(client) is not None)
        first = _standby_pid(client)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        _wait(lambda: _standby_pid(client) not in (None, first))
        assert not Path(f"/proc/{first}").exists()
        os.kill(_engine_pid(client), signal.SIGKILL)
        _wait(lambda: not client.alive and _standby_pid(client) is None)
    finally:
        client.close()


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("hang_seconds", [0, 300])
def test_a_standby_that_hangs_is_not_waited_for(
    key: str, folder: Path, monkeypatch: pytest.MonkeyPatch, hang_seconds: float
) -> None:
    # more than a start takes on a busy machine
    monkeypatch.setattr("paged_backend.engine_client.supervisor._BEGIN_SECONDS", 4.0)
    program = folder / "engine.py"
    program.write_text(
        "import runpy, sys, time\nif '--standby' in sys.argv: "
        f"time.sleep(300)\nrunpy.run_path({fake_engine.__file__!r}, run_name='__main__')\n"
    )
    client = EngineClient.connect(
        EngineConfig(model="fake", engine_hang_seconds=hang_seconds), key, 1, [sys.executable, str(program)]
    )
    client.start(lambda stats: None)
    try:
        _, inbox = _ask(client, "tokens=60 delay=0.02")
        _wait(lambda: len(inbox.ids) > 3 and _standby_pid(client) is not None)
        os.kill(_engine_pid(client), signal.SIGKILL)
        assert inbox.finished.wait(60)
        assert inbox.ids == fake_engine.answer_ids(TOKENIZER, "tokens=60 delay=0.02", 60)
    finally:
        client.close()


@pytest.mark.parametrize("loss", ["state", "half of the state", "folder"])
def test_what_a_cleaner_of_temporary_files_removes_is_made_again_and_the_engine_restarted(key: str, loss: str) -> None:
    clients = _connect_all(key, 2)
    asked = [
        (f"tokens=60 delay=0.02 {number}", _ask(client, f"tokens=60 delay=0.02 {number}")[1])
        for number, client in enumerate(clients)
    ]
    try:
        for _ in range(2):
            election = clients[0]._supervisor._election._folder
            if loss == "state":
                (election / "state.json").unlink()
            elif loss == "half of the state":
                os.truncate(election / "state.json", 20)
            else:
                # at once: a process that is about to stand by may be writing into it
                election.rename(election.with_name("swept"))
                shutil.rmtree(election.with_name("swept"), ignore_errors=True)
            before = _engine_pid(clients[0])
            os.kill(before, signal.SIGKILL)
            _wait(
                lambda before=before: all(_engine_pid(client) != before and client._live.link for client in clients), 20
            )  # type: ignore[misc]
        for prompt, inbox in asked:
            assert inbox.finished.wait(20)
            assert inbox.ids == fake_engine.answer_ids(TOKENIZER, prompt, 60)
    finally:
        _close_all(clients)
    assert not election.exists()


def test_nobody_waits_for_ever_when_the_folder_of_the_engine_cannot_be_used(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that is full: the engine goes on, but there cannot be another one."""
    clients = _connect_all(key, 2, max_engine_restarts=1)
    inboxes = [_ask(client, "silent")[1] for client in clients]

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paged_backend.engine_client.election_state.make_private", full)
    os.kill(_engine_pid(clients[0]), signal.SIGKILL)
    try:
        for inbox in inboxes:
            assert inbox.finished.wait(20)
            (finish,) = [piece.finish for piece in inbox.pieces if piece.finish is not None]
            assert finish.error is ErrorKind.OVERLOADED
        _wait(lambda: not any(client.alive for client in clients))
    finally:
        monkeypatch.undo()
        _close_all(clients)


def test_files_are_kept_fresh_against_cleaners(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paged_backend.engine_client.supervisor._FRESHEN_SECONDS", 0.2)
    client = _connect(key)
    try:
        for path in (
            client._supervisor.engine_folder,
            client._supervisor._election._folder / "state.json",
            client._supervisor.engine_folder / "tokenizer.json",
        ):
            os.utime(path, (1, 1))
            _wait(lambda path=path: path.stat().st_mtime > 1)  # type: ignore[misc]
    finally:
        client.close()


def test_a_folder_without_room_for_a_socket_is_one_sentence_and_nothing_hangs(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet = EngineSupervisor.meet_first

    def without_folder(supervisor: EngineSupervisor) -> Any:
        shutil.rmtree(supervisor.engine_folder)
        return meet(supervisor)

    monkeypatch.setattr(EngineSupervisor, "meet_first", without_folder)
    with pytest.raises(EngineError, match=r"no socket can be opened in '.*': No such file"):
        _connect(key)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("mishap", ["off", "exhausted"])
def test_nothing_stands_by_where_nothing_may(key: str, monkeypatch: pytest.MonkeyPatch, mishap: str) -> None:
    """By choice; or for want of memory for another process, which the engine that serves need not suffer from."""
    client = EngineClient.connect(EngineConfig(model="fake", standby_engine=mishap != "off"), key, 1, COMMAND)
    asked: list[list[str]] = []

    def refuse(command: list[str], **_: Any) -> Any:
        asked.append(command)
        raise OSError(12, "no memory")

    monkeypatch.setattr("subprocess.Popen", refuse)
    try:
        client.start(lambda stats: None)
        _, inbox = _ask(client, "tokens=20 delay=0.02")
        assert inbox.finished.wait(30)
        assert _standby_pid(client) is None
        assert [command[-1] for command in asked] == ([] if mishap == "off" else ["--standby"])
    finally:
        client.close()


def test_a_request_that_kills_its_engine_fails_alone(key: str) -> None:
    clients = _connect_all(key, 2, max_engine_restarts=8)
    try:
        asked = [
            (f"tokens=60 delay=0.03 {number}", _ask(clients[number % 2], f"tokens=60 delay=0.03 {number}")[1])
            for number in range(12)
        ]
        _, killer = _ask(clients[1], "die")
        assert killer.finished.wait(30)
        (finish,) = [piece.finish for piece in killer.pieces if piece.finish is not None]
        assert finish.error is ErrorKind.INTERNAL
        assert "died 4 times while it ran this request alone" in finish.message
        for prompt, inbox in asked:
            assert inbox.finished.wait(20)
            assert inbox.ids == fake_engine.answer_ids(TOKENIZER, prompt, 60)
        assert all(client.alive for client in clients)
    finally:
        _close_all(clients)


def test_only_those_that_ran_when_an_engine_died_are_suspected(key: str) -> None:
    client = _connect(key)
    try:
        runs, waits = (_ask(client, "silent")[0] for _ in range(2))
        folder = client._supervisor.engine_folder
        _wait(lambda: (folder / "running").exists())
        os.kill(_engine_pid(client), signal.SIGSTOP)  # which writes that file, too
        (folder / "running").write_bytes(np.array([runs, -1], np.int64).tobytes())
        client._live.note_death(*client._supervisor.last_running())
        assert (client._live._requests[runs].deaths, client._live._requests[waits].deaths) == (1, 0)
        client._live.note_death(*client._supervisor.last_running())
        assert (client._live._requests[runs].resumed().suspect, client._live._requests[waits].resumed().suspect) == (
            True,
            False,
        )
    finally:
        os.kill(_engine_pid(client), signal.SIGCONT)
        client.close()


def test_an_aborted_request_does_not_come_back(key: str) -> None:
    client = _connect(key)
    try:
        request_id, inbox = _ask(client, "tokens=60 delay=0.02")
        _, other = _ask(client, "tokens=30 delay=0.02")
        _wait(lambda: len(inbox.ids) > 3)
        os.kill(_engine_pid(client), signal.SIGKILL)
        client.abort(request_id)
        assert other.finished.wait(30)
        assert len(inbox.ids) < 30
    finally:
        client.close()


def test_draws_without_a_seed_are_given_one_that_survives_the_engine(key: str) -> None:
    client = _connect(key)
    try:
        ids = [_ask(client, "silent", temperature=0.8)[0] for _ in range(2)] + [
            _ask(client, "silent", temperature=0.0)[0]
        ]
        seeds = [client._live._requests[request_id].submit.sampling.seed for request_id in ids]
        assert None not in seeds[:2]
        assert len(set(seeds)) == 3
    finally:
        client.close()


def test_while_the_engine_restarts_no_more_requests_wait_than_the_queue_holds(key: str) -> None:
    client = _connect(key, model="slow", max_queue_size=3)
    try:
        _, first = _ask(client, "tokens=60 delay=0.02")
        _wait(lambda: len(first.ids) > 3)
        os.kill(_engine_pid(client), signal.SIGKILL)
        _wait(lambda: client._live.link is None)
        inboxes = [first, *(_ask(client, "tokens=3")[1] for _ in range(2))]
        with pytest.raises(RequestError, match=r"3 requests wait for the engine.*max_queue_size") as caught:
            _ask(client, "tokens=3")
        assert caught.value.kind is ErrorKind.OVERLOADED
        assert all(inbox.finished.wait(30) for inbox in inboxes)
        assert [len(inbox.ids) for inbox in inboxes] == [60, 3, 3]
    finally:
        client.close()


def test_only_what_an_engine_had_is_resumed(key: str) -> None:
    client = _connect(key)
    try:
        request_id, _ = _ask(client, "silent")
        live = client._live._requests[request_id]
        assert live.resumed().resumed
        live.sent = False
        assert not live.resumed().resumed
        assert live.resumed().resumed
    finally:
        client.close()


def test_closing_while_the_engine_restarts_takes_little_time(key: str) -> None:
    clients = _connect_all(key, 2, model="slow")
    os.kill(_engine_pid(clients[0]), signal.SIGKILL)
    time.sleep(0.3)
    started = time.monotonic()
    _close_all(clients)
    assert time.monotonic() - started < 3


def test_after_too_many_deaths_every_live_request_ends_with_one_error(key: str) -> None:
    clients = _connect_all(key, 2, max_engine_restarts=0)
    try:
        inboxes = [_ask(client, "silent")[1] for client in clients for _ in range(10)]
        _, streaming = _ask(clients[0], "tokens=60 delay=0.01")
        _wait(lambda: len(streaming.ids) > 3)
        os.kill(_engine_pid(clients[0]), signal.SIGKILL)
        for inbox in [*inboxes, streaming]:
            assert inbox.finished.wait(2)
        time.sleep(0.1)
        for inbox in [*inboxes, streaming]:
            finishes = [piece.finish for piece in inbox.pieces if piece.finish is not None]
            assert [(finish.error, finish.message) for finish in finishes] == [
                (ErrorKind.OVERLOADED, "the engine stopped; try again later")
            ]
        assert not any(client.alive for client in clients)
        with pytest.raises(RequestError, match="the engine stopped") as caught:
            _ask(clients[1], "tokens=3")
        assert caught.value.kind is ErrorKind.OVERLOADED
    finally:
        started = time.monotonic()
        _close_all(clients)
        assert time.monotonic() - started < 2


def test_nothing_is_heard_of_an_aborted_request(key: str) -> None:
    client = _connect(key)
    try:
        request_id, inbox = _ask(client, "tokens=60 delay=0.005")
        _wait(lambda: len(inbox.pieces) > 2)
        client.abort(request_id)
        num_pieces = len(inbox.pieces)
        client.abort(request_id)
        time.sleep(0.1)
        assert len(inbox.pieces) <= num_pieces + 1  # one may have been on its way to the receiver
        assert not inbox.finished.is_set()
    finally:
        client.close()


def test_a_failing_receiver_does_not_silence_other_requests(key: str) -> None:
    client = _connect(key)
    try:

        def fail(piece: Piece) -> None:
            raise ValueError("broken")

        client.submit(_prompt("tokens=5"), "", time.monotonic(), fail)
        _, inbox = _ask(client, "tokens=5")
        assert inbox.finished.wait(5)
    finally:
        client.close()


def test_requests_of_many_threads_arrive_whole(key: str) -> None:
    client = _connect(key)
    try:
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda number: _ask(client, f"tokens=20 {number}"), range(100)))
        assert all(inbox.finished.wait(30) for _, inbox in answers)
        assert len({request_id for request_id, _ in answers}) == 100
        for number, (_, inbox) in enumerate(answers):
            assert inbox.ids == fake_engine.answer_ids(TOKENIZER, f"tokens=20 {number}", 20)
    finally:
        client.close()


def test_the_engines_numbers_reach_one_front_end_only(key: str) -> None:
    """Two would add up the same counters."""
    seen: dict[int, list[Stats]] = {}
    with ExitStack() as stack:
        for _ in range(3):
            client = EngineClient.connect(EngineConfig(model="fake"), key, 3, COMMAND)
            stack.callback(client.close)
            client.start(seen.setdefault(client.front_end, []).append)
        _wait(lambda: len(seen[0]) > 2)
        assert not seen[1]
        assert not seen[2]


def test_a_stranger_cannot_provide_the_folder_of_the_sockets(key: str, folder: Path) -> None:
    election = Election(key, 1)
    election._folder.symlink_to(folder)
    with pytest.raises(EngineError, match="not a private folder"):
        election.take_seat(lambda _: os.getpid())
    election._folder.unlink()
    election._folder.mkdir(mode=0o755)
    with pytest.raises(EngineError, match="not a private folder"):
        election.take_seat(lambda _: os.getpid())


def test_socket_addresses_fit_even_if_the_temporary_folder_has_a_long_name(
    key: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = folder / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    client = _connect(key)
    client.close()


def test_what_killed_servers_left_behind_is_swept_but_not_what_live_ones_use(key: str, folder: Path) -> None:
    live = _connect(key)
    dead = Election("a dead server", 1)
    seat = dead.take_seat(lambda _: 2**22 + 1)  # no process has this number
    assert seat.folder.exists()
    state = dead._folder / "state.json"
    state.write_text(state.read_text().replace(f'"pid":{os.getpid()}', f'"pid":{2**22 + 2}'))
    other = _connect("another")
    try:
        assert not dead._folder.exists()
        assert live._supervisor._seat.folder.exists()
    finally:
        _close_all([live, other])
    assert list(folder.iterdir()) == []


def test_a_zombie_is_not_alive() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    deadline = time.monotonic() + 5
    while ProcessId.of(pid) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.waitpid(pid, 0)


def test_the_engine_is_started_with_this_interpreter_or_the_one_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_command()[0] == sys.executable
    assert engine_command()[-2:] == ["-m", "paged_backend.engine.process"]
    monkeypatch.setattr(sys, "executable", "")
    assert Path(engine_command()[0]).name == "python3"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EngineError, match="python3"):
        engine_command()


def test_garbage_in_a_front_ends_socket_is_dropped_and_told_and_its_streams_go_on(
    key: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = _connect(key)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        _, inbox = _ask(client, "tokens=60 delay=0.02")
        _wait(lambda: len(inbox.ids) > 3)
        socket = context.socket(zmq.PUSH)
        socket.connect(f"ipc://{client._supervisor.engine_folder}/front_end_0.sock")
        for garbage in (
            b"",
            b"\xff" * 100,
            b"\x81\xa4type\xa6Tokens",
            encode(Tokens(b"123", b"4")),
            encode(Tokens(b"\0" * 8, b"")),
        ):
            socket.send(garbage)
        assert inbox.finished.wait(30)
        assert inbox.ids == fake_engine.answer_ids(TOKENIZER, "tokens=60 delay=0.02", 60)
        _wait(lambda: len([record for record in caplog.records if "dropped" in record.getMessage()]) == 5)
    finally:
        context.destroy(linger=0)
        client.close()
