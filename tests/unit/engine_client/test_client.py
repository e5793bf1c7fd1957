"""Front ends and their engine process: one engine for all, however they arrive; clear errors when it fails; nothing
left behind.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import zmq

from paged_backend.config import EngineConfig
from paged_backend.engine_client.client import EngineClient
from paged_backend.engine_client.election import Election
from paged_backend.engine_client.live_requests import Piece
from paged_backend.engine_client.starter import engine_command
from paged_backend.errors import EngineError, ErrorKind, RequestError
from paged_backend.messages import Stats, Tokens, encode
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
    prompt,
    wait,
)

pytestmark = pytest.mark.usefixtures("folder")


def test_front_ends_that_arrive_together_share_one_engine_and_have_their_own_numbers(key: str) -> None:
    clients = connect_all(key, 4)
    try:
        assert len({engine_pid(client) for client in clients}) == 1
        assert sorted(client.front_end for client in clients) == [0, 1, 2, 3]
        answers = [ask(client, f"tokens=9 {client.front_end}")[1] for client in clients for _ in range(5)]
        assert all(inbox.finished.wait(5) for inbox in answers)
        for number, inbox in enumerate(answers):
            assert inbox.ids == fake_engine.answer_ids(TOKENIZER, f"tokens=9 {clients[number // 5].front_end}", 9)
    finally:
        close_all(clients)


def test_the_last_token_and_the_finish_come_in_one_piece(key: str) -> None:
    client = connect(key)
    try:
        _, inbox = ask(client, "tokens=3 delay=0.01", logprobs=2)
        assert inbox.finished.wait(5)
        assert [len(piece.token_ids) for piece in inbox.pieces] == [1, 1, 1]
        assert [piece.num_cached_tokens for piece in inbox.pieces] == [3, None, None]
        assert [piece.finish is not None for piece in inbox.pieces] == [False, False, True]
        token = inbox.ids[0]
        assert list(inbox.pieces[0].logprobs[0].items()) == [(token, (-0.5, 1)), (token + 1, (-1.5, 2))]
    finally:
        client.close()


def test_nothing_is_left_after_the_last_close(key: str, folder: Path) -> None:
    clients = connect_all(key, 3)
    engine = ProcessId.of(engine_pid(clients[0]))
    assert engine is not None
    close_all(clients)
    assert not engine.alive
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("order", ["owner first", "owner last"])
def test_closing_takes_little_time_in_any_order(key: str, order: str) -> None:
    clients = sorted(connect_all(key, 3), key=lambda client: client.front_end, reverse=order == "owner last")
    started = time.monotonic()
    close_all(clients)
    assert time.monotonic() - started < 4


def test_a_reload_gets_its_own_engine_while_the_old_front_ends_run(key: str) -> None:
    old = connect_all(key, 2)
    new = connect_all(key, 2)
    try:
        assert engine_pid(old[0]) == engine_pid(old[1]) != engine_pid(new[0]) == engine_pid(new[1])
        close_all(old)
        _, inbox = ask(new[1], "tokens=3")
        assert inbox.finished.wait(5)
    finally:
        close_all(old + new)


def test_a_front_end_that_arrives_after_the_owner_left_starts_anew(key: str) -> None:
    first = connect(key, 3)
    first.close()
    second = connect(key, 3)
    try:
        assert second.front_end == 0
    finally:
        second.close()


def test_a_broken_load_tells_every_front_end_why_and_does_not_poison_the_next(key: str) -> None:
    errors = []
    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(connect, key, 4, "broken") for _ in range(4)]:
            with pytest.raises(EngineError) as caught:
                future.result()
            errors.append(str(caught.value))
    assert errors == ["model 'broken': the checkpoint is broken"] * 4
    close_all(connect_all(key, 4))


def test_an_engine_that_dies_while_loading_is_noticed(key: str) -> None:
    with pytest.raises(EngineError, match="ended with status 3 before it was ready"):
        connect(key, model="crash")


def test_an_engine_that_cannot_be_started_is_an_error(key: str, folder: Path) -> None:
    with pytest.raises(EngineError, match="cannot be started: No such file"):
        EngineClient.connect(EngineConfig(), key, 1, [str(folder / "nothing")])
    with pytest.raises(EngineError, match="cannot be started"):
        EngineClient.connect(EngineConfig(), key, 1, [str(folder / "nothing")])


def test_a_request_that_kills_its_engine_fails_alone(key: str) -> None:
    clients = connect_all(key, 2, max_engine_restarts=8)
    try:
        asked = [
            (f"tokens=60 delay=0.03 {number}", ask(clients[number % 2], f"tokens=60 delay=0.03 {number}")[1])
            for number in range(12)
        ]
        _, killer = ask(clients[1], "die")
        assert killer.finished.wait(30)
        (finish,) = [piece.finish for piece in killer.pieces if piece.finish is not None]
        assert finish.error is ErrorKind.INTERNAL
        assert "died 4 times while it ran this request alone" in finish.message
        for prompt, inbox in asked:
            assert inbox.finished.wait(20)
            assert inbox.ids == fake_engine.answer_ids(TOKENIZER, prompt, 60)
        assert all(client.alive for client in clients)
    finally:
        close_all(clients)


def test_only_those_that_ran_when_an_engine_died_are_suspected(key: str) -> None:
    client = connect(key)
    try:
        runs, waits = (ask(client, "silent")[0] for _ in range(2))
        folder = client._supervisor.engine_folder
        wait(lambda: (folder / "running").exists())
        os.kill(engine_pid(client), signal.SIGSTOP)  # which writes that file, too
        (folder / "running").write_bytes(np.array([runs, -1], np.int64).tobytes())
        client._live.note_death(*client._supervisor.last_running())
        assert (client._live._requests[runs].deaths, client._live._requests[waits].deaths) == (1, 0)
        client._live.note_death(*client._supervisor.last_running())
        assert (client._live._requests[runs].resumed().suspect, client._live._requests[waits].resumed().suspect) == (
            True,
            False,
        )
    finally:
        os.kill(engine_pid(client), signal.SIGCONT)
        client.close()


def test_an_aborted_request_does_not_come_back(key: str) -> None:
    client = connect(key)
    try:
        request_id, inbox = ask(client, "tokens=60 delay=0.02")
        _, other = ask(client, "tokens=30 delay=0.02")
        wait(lambda: len(inbox.ids) > 3)
        os.kill(engine_pid(client), signal.SIGKILL)
        client.abort(request_id)
        assert other.finished.wait(30)
        assert len(inbox.ids) < 30
    finally:
        client.close()


def test_draws_without_a_seed_are_given_one_that_survives_the_engine(key: str) -> None:
    client = connect(key)
    try:
        ids = [ask(client, "silent", temperature=0.8)[0] for _ in range(2)] + [
            ask(client, "silent", temperature=0.0)[0]
        ]
        seeds = [client._live._requests[request_id].submit.sampling.seed for request_id in ids]
        assert None not in seeds[:2]
        assert len(set(seeds)) == 3
    finally:
        client.close()


def test_while_the_engine_restarts_no_more_requests_wait_than_the_queue_holds(key: str) -> None:
    client = connect(key, model="slow", max_queue_size=3)
    try:
        _, first = ask(client, "tokens=60 delay=0.02")
        wait(lambda: len(first.ids) > 3)
        os.kill(engine_pid(client), signal.SIGKILL)
        wait(lambda: client._live.link is None)
        inboxes = [first, *(ask(client, "tokens=3")[1] for _ in range(2))]
        with pytest.raises(RequestError, match=r"3 requests wait for the engine.*max_queue_size") as caught:
            ask(client, "tokens=3")
        assert caught.value.kind is ErrorKind.OVERLOADED
        assert all(inbox.finished.wait(30) for inbox in inboxes)
        assert [len(inbox.ids) for inbox in inboxes] == [60, 3, 3]
    finally:
        client.close()


def test_only_what_an_engine_had_is_resumed(key: str) -> None:
    client = connect(key)
    try:
        request_id, _ = ask(client, "silent")
        live = client._live._requests[request_id]
        assert live.resumed().resumed
        live.sent = False
        assert not live.resumed().resumed
        assert live.resumed().resumed
    finally:
        client.close()


def test_closing_while_the_engine_restarts_takes_little_time(key: str) -> None:
    clients = connect_all(key, 2, model="slow")
    os.kill(engine_pid(clients[0]), signal.SIGKILL)
    time.sleep(0.3)
    started = time.monotonic()
    close_all(clients)
    assert time.monotonic() - started < 3


def test_after_too_many_deaths_every_live_request_ends_with_one_error(key: str) -> None:
    clients = connect_all(key, 2, max_engine_restarts=0)
    try:
        inboxes = [ask(client, "silent")[1] for client in clients for _ in range(10)]
        _, streaming = ask(clients[0], "tokens=60 delay=0.01")
        wait(lambda: len(streaming.ids) > 3)
        os.kill(engine_pid(clients[0]), signal.SIGKILL)
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
            ask(clients[1], "tokens=3")
        assert caught.value.kind is ErrorKind.OVERLOADED
    finally:
        started = time.monotonic()
        close_all(clients)
        assert time.monotonic() - started < 2


def test_nothing_is_heard_of_an_aborted_request(key: str) -> None:
    client = connect(key)
    try:
        request_id, inbox = ask(client, "tokens=60 delay=0.005")
        wait(lambda: len(inbox.pieces) > 2)
        client.abort(request_id)
        num_pieces = len(inbox.pieces)
        client.abort(request_id)
        time.sleep(0.1)
        assert len(inbox.pieces) <= num_pieces + 1  # one may have been on its way to the receiver
        assert not inbox.finished.is_set()
    finally:
        client.close()


def test_a_failing_receiver_does_not_silence_other_requests(key: str) -> None:
    client = connect(key)
    try:

        def fail(piece: Piece) -> None:
            raise ValueError("broken")

        client.submit(prompt("tokens=5"), "", time.monotonic(), fail)
        _, inbox = ask(client, "tokens=5")
        assert inbox.finished.wait(5)
    finally:
        client.close()


def test_requests_of_many_threads_arrive_whole(key: str) -> None:
    client = connect(key)
    try:
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda number: ask(client, f"tokens=20 {number}"), range(100)))
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
        wait(lambda: len(seen[0]) > 2)
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
    client = connect(key)
    client.close()


def test_what_killed_servers_left_behind_is_swept_but_not_what_live_ones_use(key: str, folder: Path) -> None:
    live = connect(key)
    dead = Election("a dead server", 1)
    seat = dead.take_seat(lambda _: 2**22 + 1)  # no process has this number
    assert seat.folder.exists()
    state = dead._folder / "state.json"
    state.write_text(state.read_text().replace(f'"pid":{os.getpid()}', f'"pid":{2**22 + 2}'))
    other = connect("another")
    try:
        assert not dead._folder.exists()
        assert live._supervisor._seat.folder.exists()
    finally:
        close_all([live, other])
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
    client = connect(key)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        _, inbox = ask(client, "tokens=60 delay=0.02")
        wait(lambda: len(inbox.ids) > 3)
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
        wait(lambda: len([record for record in caplog.records if "dropped" in record.getMessage()]) == 5)
    finally:
        context.destroy(linger=0)
        client.close()
