"""`paged serve` around a real tritonserver: starting, telling, stopping, failing. The model is a stand-in that echoes
words, slowly if asked to.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
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
from tests.server import fake_engine
from tests.server.front_end_server import WITH_FAKE_ENGINE

pytest.importorskip("tritonclient.grpc")
pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

CONFIG = """
name: "paged_llm"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [ { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]
instance_group [ { count: 2 kind: KIND_MODEL } ]
"""
MODEL = """
import json, os, sys, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, arguments):
        page_size = json.loads(arguments["model_config"])["parameters"]["page_size"]["string_value"]
        print("paged: stand-in starts with", page_size, file=sys.stderr, flush=True)
        time.sleep(float(os.environ.get("LOAD_SECONDS", "0")))
        if "LOAD_ERROR" in os.environ:
            print("paged: error:", os.environ["LOAD_ERROR"], file=sys.stderr, flush=True)
            raise RuntimeError("not shown")

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for word in pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()[0].split():
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("text_output", np.array([word], object))]))
                time.sleep(float(os.environ.get("WORD_SECONDS", "0")))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
PAGED = """
import sys
from pathlib import Path
from paged_backend.server import files as server_files
repository = Path(sys.argv.pop(1))
server_files.repository_folder = lambda: repository
from paged_client.cli import main
main()
"""


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
    """A folder that passes for a checkpoint at first sight."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


class Command:
    """A `paged serve` process."""

    def __init__(self, stand_in: Path, checkpoint: Path, folder: Path, *arguments: str, **environment: str) -> None:
        self.temporary = folder / f"temporary_{time.monotonic_ns()}"
        self.temporary.mkdir()
        options = ["serve", f"--model={checkpoint}", "--set=page_size=32", *arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PAGED, str(stand_in), *options],
            env={**os.environ, "TMPDIR": str(self.temporary), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self) -> dict[str, str]:
        """Reads the ready block: {"HTTP": url, "gRPC": url, "metrics": url, "curl": command}."""
        assert self.process.stdout is not None
        block = {}
        while line := self.process.stdout.readline():
            words = line.split(maxsplit=1)
            if words and words[0] in ("HTTP", "gRPC", "metrics", "curl"):
                block[words[0]] = words[1].strip()
            if line.startswith("Ctrl-C"):
                return block
        raise AssertionError(f"never ready: {self.process.communicate()[1]}")

    def server_folder(self) -> Path:
        return next(self.temporary.glob("paged-serve-*"))

    def finish(self, seconds: float = 30) -> tuple[int, str]:
        """Exit code and stderr."""
        stderr = self.process.communicate(timeout=seconds)[1]
        return self.process.returncode, stderr

    def servers(self) -> list[int]:
        """tritonserver and its stubs: every process whose environment or command names our temporary folder."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.process.pid:
                try:
                    known = (
                        str(self.temporary).encode()
                        in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                    )
                except OSError:
                    continue
                if known:
                    found.append(int(entry.name))
        return found

    def front_ends(self) -> list[int]:
        """The stubs that run a model; without the short-lived ones that tritonserver asks for their version."""
        commands = {pid: _command_of(pid).split("\0") for pid in self.servers()}
        return [
            pid
            for pid, command in commands.items()
            if command[0].endswith("/triton_python_backend_stub") and any("model.py" in word for word in command)
        ]


def _command_of(pid: int) -> str:
    """Its words, each ended by a null byte; empty if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


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


def ask(url: str, words: str) -> str:
    with urlopen(f"{url}/v2/models/paged_llm/generate_stream", json.dumps({"text_input": words}).encode()) as answer:
        return " ".join(re.findall(r'"text_output":"(\w+)"', answer.read().decode()))


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Counts naps, not time: a machine may have stood still meanwhile."""
    for _ in range(round(seconds / 0.05)):
        if condition():
            return True
        time.sleep(0.05)
    return condition()


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
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
    tritonserver = next(pid for pid in command.servers() if _command_of(pid).split("\0")[0].endswith("/tritonserver"))
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


def test_servers_on_one_machine_do_not_disturb_each_other(start: Start) -> None:
    first, second = start(), start()
    urls = [command.wait_until_ready() for command in (first, second)]
    assert not set(urls[0].values()) & set(urls[1].values())
    assert [ask(block["HTTP"], "hello") for block in urls] == ["hello", "hello"]
    first.process.send_signal(signal.SIGTERM)
    assert first.finish()[0] == 0
    assert ask(urls[1]["HTTP"], "still here") == "still here"


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


def test_a_death_is_a_line_with_cause_and_count_and_the_last_one_ends_the_server(
    tmp_path: Path, checkpoint: Path
) -> None:
    """Without --log-verbose: an operator must hear of it at once, and an orchestrator must see that the process has
    ended.
    """
    repository = tmp_path / "front_ends"
    (repository / "paged_llm" / "1").mkdir(parents=True)
    shutil.copy(server_files.repository_folder() / "paged_llm" / "config.pbtxt", repository / "paged_llm")
    (repository / "paged_llm" / "1" / "model.py").write_text(WITH_FAKE_ENGINE)
    ports = ("--http-port=0", "--grpc-port=0", "--metrics-port=0")
    command = Command(
        repository,
        checkpoint,
        tmp_path,
        "--instances=1",
        "--set=max_engine_restarts=1",
        "--set=standby_engine=false",
        *ports,
    )
    command.wait_until_ready()
    for number in (0, 1):
        deadline = time.monotonic() + 30
        while not (
            engines := [pid for pid in command.servers() if re.search(rf"fake_engine.*/{number}\0$", _command_of(pid))]
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)
        os.kill(engines[0], signal.SIGKILL)
    code, stderr = command.finish()
    assert code == 1
    first, second = (line for line in stderr.splitlines() if "error: the engine died" in line)
    assert re.search(
        r"process ended by SIGKILL; restart 1 of at most 1 within 10 minutes \(max_engine_restarts\)$", first
    )
    assert re.search(
        r"process ended by SIGKILL.*; no restart is left, there were 1 within 10 minutes \(max_engine_restarts 1\)$",
        second,
    )
    assert "the server ends, for there is no engine any more" in stderr
    assert command.servers() == []


FREE_PORTS = ("--http-port=0", "--grpc-port=0", "--metrics-port=0")


def with_fake_engine(folder: Path) -> Path:
    """A model repository with the shipped model, whose engine is the fake one."""
    repository = folder / "front_ends"
    (repository / "paged_llm" / "1").mkdir(parents=True)
    shutil.copy(server_files.repository_folder() / "paged_llm" / "config.pbtxt", repository / "paged_llm")
    (repository / "paged_llm" / "1" / "model.py").write_text(WITH_FAKE_ENGINE)
    return repository


class Stream(threading.Thread):
    """A generate_stream request whose pieces are told with their times."""

    def __init__(self, url: str, prompt: str) -> None:
        super().__init__(daemon=True)
        self.url, self.prompt = f"{url}/v2/models/paged_llm/generate_stream", prompt
        self.text, self.last = "", 0.0
        self.start()

    def run(self) -> None:
        body = json.dumps(
            {"text_input": self.prompt, "stream": True, "max_tokens": 400, "exclude_input_in_output": True}
        )
        with contextlib.suppress(OSError, HTTPException), urlopen(self.url, body.encode()) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    self.text += json.loads(line[6:]).get("text_output", "")
                    self.last = time.monotonic()


@pytest.mark.parametrize("instances", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_front_end_that_is_killed_is_noticed_and_the_others_streams_end_well(
    stand_in: Path, checkpoint: Path, tmp_path: Path, instances: int
) -> None:
    command = Command(with_fake_engine(tmp_path), checkpoint, tmp_path, f"--instances={instances}", *FREE_PORTS)
    url = command.wait_until_ready()["HTTP"]
    streams = [Stream(url, f"tokens=350 delay=0.02 {number}") for number in range(6)]
    assert wait_until(lambda: all(stream.text for stream in streams), 20)
    front_ends = command.front_ends()
    assert len(front_ends) == instances
    assert {path.stat().st_mode & 0o777 for path in Path("/dev/shm").glob(f"{command.server_folder().name}-*")} == {
        0o600
    }
    os.kill(front_ends[0], signal.SIGKILL)
    killed = time.monotonic()
    assert wait_until(lambda: not is_ready(url), 5)
    code, stderr = command.finish(60)
    assert code == 1
    assert time.monotonic() - killed < 20  # the streams took seven, and the server's exit timeout is thirty
    assert (
        f"error: front end process {front_ends[0]} died, with its callers' requests; no more requests are taken, "
        f"{instances - 1} others finish theirs" in stderr
    )
    assert stderr.splitlines()[-1].endswith("the server must be started again")
    assert command.servers() == []
    for stream in streams:
        stream.join(5)
    survivors = [stream for stream in streams if stream.last > killed + 1]
    assert bool(survivors) == (instances > 1)
    tokenizer = fake_engine.make_tokenizer()
    for stream in survivors:
        assert stream.text == tokenizer.decode(fake_engine.answer_ids(tokenizer, stream.prompt, 350))


@pytest.mark.parametrize("victim", ["a front end", "tritonserver"])
def test_a_server_that_lost_a_front_end_or_crashed_is_replaced_at_the_same_ports_if_told_so(
    checkpoint: Path, tmp_path: Path, victim: str
) -> None:
    """Triton Server 2.51.0 aborts when a front end does not run for a second while it gets a request."""
    command = Command(
        with_fake_engine(tmp_path), checkpoint, tmp_path, "--instances=2", "--on-front-end-death=restart", *FREE_PORTS
    )
    block = command.wait_until_ready()
    if victim == "a front end":
        killed = command.front_ends()[1]
        os.kill(killed, signal.SIGKILL)
        words = f"front end process {killed} died, with its callers' requests; the server must be started again"
    else:
        status = Path(f"/proc/{command.front_ends()[0]}/stat").read_text()
        os.kill(int(status.rpartition(")")[2].split()[1]), signal.SIGABRT)  # their parent
        words = "tritonserver was killed by SIGABRT; --log-verbose shows its log"
    assert command.wait_until_ready() == block
    stream = Stream(block["HTTP"], "tokens=5")
    stream.join(20)
    tokenizer = fake_engine.make_tokenizer()
    assert stream.text == tokenizer.decode(fake_engine.answer_ids(tokenizer, "tokens=5", 5))
    command.process.send_signal(signal.SIGTERM)
    code, stderr = command.finish()
    assert code == 0
    assert f"{words}: restart 1 of at most 4" in stderr
    assert command.servers() == []


def is_ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/v2/models/paged_llm/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, HTTPException):
        return False
