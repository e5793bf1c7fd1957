"""Engines that die or hang are replaced, by the process that stands by where there is one; live requests go on."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paged_backend.config import EngineConfig
from paged_backend.engine_client.client import EngineClient
from paged_backend.engine_client.supervisor import EngineSupervisor
from paged_backend.errors import EngineError, ErrorKind
from paged_backend.process_id import ProcessId
from tests.server import fake_engine
from tests.unit.engine_client.clients import (
    COMMAND,
    TOKENIZER,
    ask,
    close_all,
    connect,
    connect_all,
    engine_pid,
    wait,
)

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.long
def test_live_requests_go_on_in_the_next_engine_again_and_again(key: str) -> None:
    """Killed five times while they run, and asked for more while there is no engine: every answer whole, no token
    twice.
    """
    clients = connect_all(key, 3, max_engine_restarts=100)
    try:
        asked = [
            (f"tokens=60 delay=0.02 {number}", ask(clients[number % 3], f"tokens=60 delay=0.02 {number}")[1])
            for number in range(30)
        ]

        def num_tokens() -> int:
            return sum(len(inbox.ids) for _, inbox in asked)

        for _ in range(5):
            aim = num_tokens() + 60
            while num_tokens() < aim:
                time.sleep(0.01)
            os.kill(engine_pid(clients[0]), signal.SIGKILL)
            asked += [(f"tokens=9 {number}", ask(clients[number % 3], f"tokens=9 {number}")[1]) for number in range(3)]
        assert all(client.alive for client in clients)
        for prompt, inbox in asked:
            assert inbox.finished.wait(20)
            assert inbox.ids == fake_engine.answer_ids(TOKENIZER, prompt, len(inbox.ids))
            assert [piece.finish.reason for piece in inbox.pieces if piece.finish is not None] == ["length"]
        assert len({engine_pid(client) for client in clients}) == 1
    finally:
        close_all(clients)


def test_an_engine_that_says_nothing_is_killed_and_replaced(key: str) -> None:
    client = connect(key, engine_hang_seconds=0.5)
    try:
        _, inbox = ask(client, "tokens=60 delay=0.01")
        wait(lambda: len(inbox.ids) > 3)
        os.kill(engine_pid(client), signal.SIGSTOP)
        assert inbox.finished.wait(30)
        assert inbox.ids == fake_engine.answer_ids(TOKENIZER, "tokens=60 delay=0.01", 60)
    finally:
        client.close()


@pytest.mark.long
def test_an_engine_that_hangs_while_it_loads_after_a_restart_is_killed_and_replaced(key: str) -> None:
    client = connect(key, model="slow", engine_hang_seconds=5)
    try:
        client._supervisor._load_seconds = 0.1
        _, inbox = ask(client, "tokens=60 delay=0.01")
        wait(lambda: len(inbox.ids) > 3)
        first = engine_pid(client)
        os.kill(first, signal.SIGKILL)
        wait(lambda: engine_pid(client) != first)
        os.kill(engine_pid(client), signal.SIGSTOP)
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
    clients = connect_all(key, 3)
    try:
        (owner,) = [client for client in clients if client._supervisor.owner]
        seen = [engine_pid(owner)]
        for number in range(3):
            asked = [
                (f"tokens=60 delay=0.02 {number}", ask(client, f"tokens=60 delay=0.02 {number}")[1])
                for client in clients
            ]
            wait(lambda: _standby_pid(owner) not in (None, *seen))
            standby = _standby_pid(owner)
            assert standby is not None
            os.kill(engine_pid(owner), signal.SIGKILL)
            for prompt, inbox in asked:
                assert inbox.finished.wait(30)
                assert inbox.ids == fake_engine.answer_ids(TOKENIZER, prompt, 60)
            assert [engine_pid(client) for client in clients] == [standby] * 3
            seen.append(standby)
        wait(lambda: _standby_pid(owner) is not None)
        last = ProcessId.of(_standby_pid(owner) or 0)
        assert last is not None and last.alive
    finally:
        close_all(clients)
    assert not last.alive
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("soon")
def test_without_its_standby_an_engine_is_replaced_by_a_new_process(key: str) -> None:
    client = connect(key)
    try:
        _, inbox = ask(client, "tokens=60 delay=0.02")
        wait(lambda: _standby_pid(client) is not None)
        standby = _standby_pid(client)
        assert standby is not None
        os.kill(standby, signal.SIGKILL)
        os.kill(engine_pid(client), signal.SIGKILL)
        assert inbox.finished.wait(30)
        assert inbox.ids == fake_engine.answer_ids(TOKENIZER, "tokens=60 delay=0.02", 60)
        assert engine_pid(client) != standby
    finally:
        client.close()


@pytest.mark.usefixtures("soon")
def test_a_standby_that_was_killed_is_replaced_and_none_is_left_when_there_is_no_engine_any_more(key: str) -> None:
    client = connect(key, max_engine_restarts=0)
    try:
        wait(lambda: _standby_pid(client) is not None)
        first = _standby_pid(client)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait(lambda: _standby_pid(client) not in (None, first))
        assert not Path(f"/proc/{first}").exists()
        os.kill(engine_pid(client), signal.SIGKILL)
        wait(lambda: not client.alive and _standby_pid(client) is None)
    finally:
        client.close()


@pytest.mark.usefixtures("soon")
@pytest.mark.long
@pytest.mark.parametrize("hang_seconds", [0, 300])  # 0: nobody else looks
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
        _, inbox = ask(client, "tokens=60 delay=0.02")
        wait(lambda: len(inbox.ids) > 3 and _standby_pid(client) is not None)
        os.kill(engine_pid(client), signal.SIGKILL)
        assert inbox.finished.wait(60)
        assert inbox.ids == fake_engine.answer_ids(TOKENIZER, "tokens=60 delay=0.02", 60)
    finally:
        client.close()


@pytest.mark.long
def test_an_engine_has_as_long_to_begin_as_the_first_one_took_and_more(
    key: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where imports take longer than patience lasts otherwise: without a standby, and with a single restart left."""
    monkeypatch.setattr("paged_backend.engine_client.supervisor._BEGIN_SECONDS", 0.5)
    program = folder / "engine.py"
    program.write_text(
        f"import runpy, time\ntime.sleep(2)\nrunpy.run_path({fake_engine.__file__!r}, run_name='__main__')\n"
    )
    config = EngineConfig(model="fake", max_engine_restarts=1, standby_engine=False)
    client = EngineClient.connect(config, key, 1, [sys.executable, str(program)])
    client.start(lambda stats: None)
    try:
        _, inbox = ask(client, "tokens=60 delay=0.02")
        wait(lambda: len(inbox.ids) > 3)
        os.kill(engine_pid(client), signal.SIGKILL)
        assert inbox.finished.wait(60)
        assert inbox.ids == fake_engine.answer_ids(TOKENIZER, "tokens=60 delay=0.02", 60)
    finally:
        client.close()


@pytest.mark.parametrize(
    "loss", ["state", *(pytest.param(name, marks=pytest.mark.long) for name in ("half of the state", "folder"))]
)
def test_what_a_cleaner_of_temporary_files_removes_is_made_again_and_the_engine_restarted(key: str, loss: str) -> None:
    clients = connect_all(key, 2)
    asked = [
        (f"tokens=60 delay=0.02 {number}", ask(client, f"tokens=60 delay=0.02 {number}")[1])
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
            before = engine_pid(clients[0])
            os.kill(before, signal.SIGKILL)
            wait(
                lambda before=before: all(engine_pid(client) != before and client._live.link for client in clients), 20
            )  # type: ignore[misc]
        for prompt, inbox in asked:
            assert inbox.finished.wait(20)
            assert inbox.ids == fake_engine.answer_ids(TOKENIZER, prompt, 60)
    finally:
        close_all(clients)
    assert not election.exists()


def test_nobody_waits_for_ever_when_the_folder_of_the_engine_cannot_be_used(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that is full: the engine goes on, but there cannot be another one."""
    clients = connect_all(key, 2, max_engine_restarts=1)
    inboxes = [ask(client, "silent")[1] for client in clients]

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paged_backend.engine_client.election_state.make_private", full)
    os.kill(engine_pid(clients[0]), signal.SIGKILL)
    try:
        for inbox in inboxes:
            assert inbox.finished.wait(20)
            (finish,) = [piece.finish for piece in inbox.pieces if piece.finish is not None]
            assert finish.error is ErrorKind.OVERLOADED
        wait(lambda: not any(client.alive for client in clients))
    finally:
        monkeypatch.undo()
        close_all(clients)


def test_files_are_kept_fresh_against_cleaners(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paged_backend.engine_client.supervisor._FRESHEN_SECONDS", 0.2)
    client = connect(key)
    try:
        for path in (
            client._supervisor.engine_folder,
            client._supervisor._election._folder / "state.json",
            client._supervisor.engine_folder / "tokenizer.json",
        ):
            os.utime(path, (1, 1))
            wait(lambda path=path: path.stat().st_mtime > 1)  # type: ignore[misc]
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
        connect(key)


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
        _, inbox = ask(client, "tokens=20 delay=0.02")
        assert inbox.finished.wait(30)
        assert _standby_pid(client) is None
        assert [command[-1] for command in asked] == ([] if mishap == "off" else ["--standby"])
    finally:
        client.close()
