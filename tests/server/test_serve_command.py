"""`paged serve` around a real tritonserver: starting, telling, stopping, failing. The model is a stand-in that echoes
words, slowly if asked to.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from paged_backend.errors import EngineError
from paged_backend.server import files as server_files
from paged_backend.server.launch import Server, ServerSettings, StoppedEarlyError
from tests.server.serve_command import CONFIG, MODEL, Command, ask, command_of, save_nothing, wait_until

pytest.importorskip("tritonclient.grpc")
pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A model repository with the stand-in in place of the shipped model."""
    repository = tmp_path / "stand_in"
    (repository / "paged_llm" / "1").mkdir(parents=True)
    (repository / "paged_llm" / "config.pbtxt").write_text(CONFIG)
    (repository / "paged_llm" / "1" / "model.py").write_text(MODEL)
    return repository


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_nothing(tmp_path / "checkpoint")


Start = Callable[..., Command]


@pytest.fixture
def start(stand_in: Path, checkpoint: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts `paged serve` on free ports; whatever is left at the end is ended."""
    commands = []

    def start(*arguments: str, **environment: str) -> Command:
        free_ports = ("--http-port=0", "--grpc-port=0", "--metrics-port=0")
        commands.append(Command(stand_in, checkpoint, tmp_path, *free_ports, *arguments, **environment))
        return commands[-1]

    yield start
    for command in commands:
        for pid in [command.process.pid, *command.servers()]:
            if command.process.poll() is None or pid != command.process.pid:
                os.kill(pid, signal.SIGKILL)
        command.process.wait()
    for folder in tmp_path.rglob("paged-serve-*"):  # what the killed ones leave beside their folders
        for region in Path("/dev/shm").glob(f"{folder.name}-*"):
            region.unlink()


def test_the_ready_block_tells_where_the_server_answers(start: Start) -> None:
    command = start()
    block = command.wait_until_ready()
    assert ask(block["HTTP"], "one two three") == "one two three"
    assert "nv_inference_request_success" in urlopen(block["metrics"]).read().decode()
    curl = shlex.split(block["curl"])
    assert curl[1] == f"{block['HTTP']}/v2/models/paged_llm/generate_stream"
    assert json.loads(curl[curl.index("-d") + 1])["stream"] is True
    command.process.send_signal(signal.SIGTERM)
    exit_code, stderr = command.finish()
    assert exit_code == 0
    assert stderr.count("paged: stand-in starts with 32") == 2  # both instances, with our option
    assert all(line.startswith("paged: ") for line in stderr.splitlines()), stderr


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)], ids=["SIGTERM", "SIGINT"]
)
def test_a_stop_lets_the_stream_in_flight_end_and_leaves_nothing_behind(start: Start, number: signal.Signals) -> None:
    command = start(WORD_SECONDS="0.3")
    url = command.wait_until_ready()["HTTP"]
    shared_memory = f"{command.server_folder().name}-*"
    assert list(Path("/dev/shm").glob(shared_memory))
    answers: list[str] = []
    caller = threading.Thread(target=lambda: answers.append(ask(url, "a b c d e f")))
    caller.start()
    time.sleep(0.5)
    command.process.send_signal(number)
    assert command.finish()[0] == 0
    caller.join()
    assert answers == ["a b c d e f"]
    assert command.servers() == []
    assert list(command.temporary.iterdir()) == []
    assert not list(Path("/dev/shm").glob(shared_memory))


def test_a_second_ctrl_c_hurries(start: Start) -> None:
    command = start(WORD_SECONDS="1")
    url = command.wait_until_ready()["HTTP"]
    shared_memory = f"{command.server_folder().name}-*"
    request = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import urllib.request as u; u.urlopen({url!r} + '/v2/models/paged_llm/generate_stream', "
            f'b\'{{"text_input": "{"w " * 60}"}}\').read()',
        ],
        stderr=subprocess.DEVNULL,
    )
    time.sleep(1.5)
    command.process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert command.process.poll() is None  # draining
    command.process.send_signal(signal.SIGINT)
    assert command.finish(5)[0] == 130
    assert request.wait(10) != 0  # the answer was cut off
    assert command.servers() == []
    assert list(command.temporary.iterdir()) == []
    assert not list(Path("/dev/shm").glob(shared_memory))


def test_answers_that_outlast_the_drain_time_are_cut_off_and_told(start: Start) -> None:
    command = start("--drain-seconds=1", WORD_SECONDS="5")
    url = command.wait_until_ready()["HTTP"]

    def ask_in_vain() -> None:
        with contextlib.suppress(OSError, HTTPException):
            answers.append(ask(url, "a b c"))

    answers: list[str] = []
    caller = threading.Thread(target=ask_in_vain)
    caller.start()
    time.sleep(1.0)
    command.process.send_signal(signal.SIGTERM)
    exit_code, stderr = command.finish(15)
    caller.join()
    assert (exit_code, answers) == (1, [])
    assert stderr.splitlines()[-1] == "paged: error: requests were still running after the drain time and were cut off"


def test_a_stop_while_the_model_loads_is_prompt_and_clean(start: Start) -> None:
    command = start(LOAD_SECONDS="60")
    both_load = wait_until(lambda: len(command.front_ends()) == 2 or command.process.poll() is not None, 40)
    assert command.process.poll() is None, command.finish()
    assert both_load
    command.process.send_signal(signal.SIGTERM)
    assert command.finish(10)[0] == 0
    assert command.servers() == []
    assert list(command.temporary.iterdir()) == []


def test_a_model_that_cannot_be_loaded_is_one_sentence(start: Start) -> None:
    command = start(LOAD_ERROR="weights of layer 3 are missing")
    exit_code, stderr = command.finish()
    assert exit_code == 1
    assert [line for line in stderr.splitlines() if "error" in line] == ["paged: error: weights of layer 3 are missing"]
    assert list(command.temporary.iterdir()) == []


def test_a_busy_port_is_refused_at_once(start: Start) -> None:
    port = start().wait_until_ready()["gRPC"].split(":")[1]
    started = time.monotonic()
    exit_code, stderr = start(f"--grpc-port={port}").finish()
    assert exit_code == 1
    assert stderr == f"paged: error: port {port} on 127.0.0.1 is already in use: choose another with --grpc-port\n"
    assert time.monotonic() - started < 10


def test_a_server_that_dies_is_reported(start: Start) -> None:
    command = start()
    command.wait_until_ready()
    tritonserver = next(pid for pid in command.servers() if command_of(pid).split("\0")[0].endswith("/tritonserver"))
    os.kill(tritonserver, signal.SIGKILL)
    exit_code, stderr = command.finish()
    assert exit_code == 1
    assert stderr.splitlines()[-1] == "paged: error: tritonserver was killed by SIGKILL; --log-verbose shows its log"
    assert command.servers() == []


def test_the_server_ends_when_its_starter_is_killed(start: Start) -> None:
    command = start()
    command.wait_until_ready()
    assert len(command.servers()) >= 3
    command.process.kill()
    command.process.wait()
    assert wait_until(lambda: not command.servers(), 15)


@pytest.mark.long
def test_servers_on_one_machine_do_not_disturb_each_other(start: Start) -> None:
    first, second = start(), start()
    urls = [command.wait_until_ready() for command in (first, second)]
    assert not set(urls[0].values()) & set(urls[1].values())
    assert [ask(block["HTTP"], "hello") for block in urls] == ["hello", "hello"]
    first.process.send_signal(signal.SIGTERM)
    assert first.finish()[0] == 0
    assert ask(urls[1]["HTTP"], "still here") == "still here"


@pytest.mark.long
def test_log_verbose_shows_the_servers_own_log_and_arguments_are_passed_on(start: Start) -> None:
    command = start("--log-verbose", "--", "--metrics-interval-ms=1234")
    command.wait_until_ready()
    command.process.send_signal(signal.SIGTERM)
    exit_code, stderr = command.finish()
    assert exit_code == 0
    assert "Started HTTPService" in stderr


@pytest.mark.skipif(importlib.util.find_spec("pytriton") is None, reason="nvidia-pytriton is not installed")
def test_a_tritonserver_on_path_serves_with_its_own_backends(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    wheel = server_files.find_installation()
    backends = server_files.prepare_backends(wheel, tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "tritonserver").write_text(
        f'#!/bin/sh\ntouch {tmp_path}/used\nLD_LIBRARY_PATH={wheel.libraries} exec {wheel.executable} "$@"\n'
    )
    (programs / "tritonserver").chmod(0o755)
    command = start(PATH=f"{programs}:/usr/bin:/bin", TRITON_BACKENDS=str(backends))
    assert ask(command.wait_until_ready()["HTTP"], "from path") == "from path"
    assert (tmp_path / "used").exists()


def test_a_wrong_argument_for_the_server_is_a_failure(start: Start) -> None:
    exit_code, stderr = start("--", "--no-such-option").finish()
    assert exit_code == 1
    assert stderr == "paged: error: tritonserver has no option --no-such-option\n"


@pytest.fixture
def in_process(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_files, "repository_folder", lambda: stand_in)


@pytest.mark.long
@pytest.mark.usefixtures("in_process")
def test_a_server_outlives_the_thread_that_started_it(checkpoint: Path) -> None:
    server = Server(ServerSettings(model=str(checkpoint), options={"page_size": 32}, instances=1))
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    time.sleep(0.5)
    assert ask(server.addresses.http_url, "alive") == "alive"
    assert server.stop() == 0
    assert server.stop() == 0  # again, without effect


@pytest.mark.long
@pytest.mark.usefixtures("in_process")
def test_a_server_with_restricted_apis_becomes_ready(checkpoint: Path) -> None:
    arguments = ("--http-restricted-api=health,metadata:admin-key=secret",)
    with Server(ServerSettings(model=str(checkpoint), options={"page_size": 32}, arguments=arguments)) as server:
        with pytest.raises(HTTPError, match="403"):
            urlopen(f"{server.addresses.http_url}/v2")
        assert ask(server.addresses.http_url, "open") == "open"


@pytest.mark.usefixtures("in_process")
def test_a_start_that_takes_too_long_is_given_up(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOAD_SECONDS", "60")
    with pytest.raises(EngineError, match="not ready in time"):
        Server(ServerSettings(model=str(checkpoint), options={"page_size": 32})).start(timeout_seconds=2)


@pytest.mark.usefixtures("in_process")
def test_a_start_can_be_abandoned_from_another_thread(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOAD_SECONDS", "60")
    server = Server(ServerSettings(model=str(checkpoint), options={"page_size": 32}))
    threading.Timer(2, server.terminate).start()
    with pytest.raises(StoppedEarlyError):
        server.start()
