"""`paged top`: which engine of this machine is watched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paged_client.top.engines import (
    Choice,
    NoEngineError,
    RunningEngine,
    choose_engine,
    find_engines,
    port_of,
    spell_age,
)
from paged_client.top.processes import server_of


@contextmanager
def engine_that_is_none(folder: Path, *words: str) -> Iterator[int]:
    """A process that looks like an engine: its pid."""
    program = "import sys; print('up', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, "-m", "paged_backend.engine.process", *words, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


@pytest.fixture
def pretender(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    with engine_that_is_none(tmp_path) as pid:
        yield pid, tmp_path


def test_of_several_engines_there_is_a_list_and_a_choice_that_outlives_a_restart(tmp_path: Path) -> None:
    """Whatever else runs on this machine: the names are of this test only."""
    one, other = (f"{name}-{os.getpid()}" for name in ("chat", "code"))
    folders = [tmp_path / name for name in ("a/1/0", "b/1/0", "b/1/1")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "watch.sock").touch()
    with (
        engine_that_is_none(folders[0], f"--model-name={one}") as first,
        engine_that_is_none(folders[1], f"--model-name={other}") as second,
    ):
        with pytest.raises(NoEngineError) as several:
            choose_engine(Choice(os.getpid()))
        sentence, header, *rows = str(several.value).splitlines()
        assert sentence == "2 engines run on this machine: choose one with --model, --url, --replica or --pid"
        assert header.split() == ["model", "replica", "HTTP", "gRPC", "metrics", "age", "pid", "user"]
        assert [row.split()[0] for row in rows] == [one, other]
        assert [row.split()[-2] for row in rows] == [str(first), str(second)]
        chosen = choose_engine(Choice(model_name=other))
        assert (chosen.pid, chosen.model_name, chosen.folder) == (second, other, folders[1])
        with pytest.raises(NoEngineError, match=f"the server at port 1 and model {other} has no engine here"):
            choose_engine(Choice(port=1, model_name=other))
        os.kill(second, 9)
        with engine_that_is_none(folders[2], f"--model-name={other}") as third:
            assert choose_engine(Choice(model_name=other)).pid == third
            assert choose_engine(Choice(os.getpid()), chosen).pid == third


def test_a_servers_ports_are_those_it_was_told() -> None:
    assert server_of(7, []).ports == (8000, 8001, 8002)
    assert server_of(
        7, ["--http-port=9000", "--grpc-port", "9001", "--allow-metrics=false", "--http-port=9100"]
    ).ports == (9100, 9001, None)


def test_an_url_is_a_port_of_this_machine() -> None:
    assert [port_of(url) for url in ("localhost:8001", "http://127.0.0.1:8000", "8002", "[::1]:9")] == [
        8001,
        8000,
        8002,
        9,
    ]
    for url in ("localhost", "", "http://", "localhost:x", "localhost:99999", "nobody.invalid:8000", "192.0.2.1:8000"):
        with pytest.raises(NoEngineError, match="--url"):
            port_of(url)


def test_an_age_is_one_word() -> None:
    assert [spell_age(seconds) for seconds in (None, 3.9, 75, 7300, 200_000)] == ["–", "3 s", "1 min", "2 h", "2 d"]


def test_an_engine_is_found_by_its_command_line_and_its_ancestors(pretender: tuple[int, Path]) -> None:
    pid, folder = pretender
    assert RunningEngine(pid, folder) in find_engines()
    (folder / "watch.sock").touch()
    assert choose_engine(Choice(pid)).pid == pid
    assert RunningEngine(pid, folder).belongs_to(os.getpid())
    assert not RunningEngine(pid, folder).belongs_to(2**22 + 1)


def test_what_stands_by_is_no_engine_until_it_is_named_one(tmp_path: Path) -> None:
    program = (
        "import ctypes, sys; print(flush=True); sys.stdin.readline(); ctypes.CDLL(None).prctl(15, "
        "b'paged-engine'); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, "-m", "paged_backend.engine.process", str(tmp_path), "--standby"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        assert process.pid not in [engine.pid for engine in find_engines()]
        process.stdin.write(b"start\n")
        process.stdin.flush()
        process.stdout.readline()
        assert RunningEngine(process.pid, tmp_path) in find_engines()
        process.kill()


def test_an_engine_that_cannot_be_watched_is_one_sentence(pretender: tuple[int, Path]) -> None:
    pid, _ = pretender
    with pytest.raises(NoEngineError, match="still loading"):
        choose_engine(Choice(pid))
    with pytest.raises(NoEngineError, match=r"process 4194305 has no engine here"):
        choose_engine(Choice(2**22 + 1))
