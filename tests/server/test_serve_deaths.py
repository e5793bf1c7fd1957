"""`paged serve` when a process of its server dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import pytest

from paged_backend.server import files as server_files
from tests.server import fake_engine
from tests.server.front_end_server import WITH_FAKE_ENGINE
from tests.server.serve_command import Command, command_of, save_nothing, wait_until

pytest.importorskip("tritonclient.grpc")
pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

FREE_PORTS = ("--http-port=0", "--grpc-port=0", "--metrics-port=0")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_nothing(tmp_path / "checkpoint")


def test_a_death_is_a_line_with_cause_and_count_and_the_last_one_ends_the_server(
    tmp_path: Path, checkpoint: Path
) -> None:
    """Without --log-verbose: an operator must hear of it at once, and an orchestrator must see that the process has
    ended.
    """
    command = Command(
        with_fake_engine(tmp_path),
        checkpoint,
        tmp_path,
        "--instances=1",
        "--set=max_engine_restarts=1",
        "--set=standby_engine=false",
        *FREE_PORTS,
    )
    command.wait_until_ready()
    for number in (0, 1):
        deadline = time.monotonic() + 30
        while not (
            engines := [pid for pid in command.servers() if re.search(rf"fake_engine.*/{number}\0$", command_of(pid))]
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


@pytest.mark.long
@pytest.mark.parametrize("instances", [2, *(pytest.param(count, marks=pytest.mark.long) for count in (1, 3))])
def test_a_front_end_that_is_killed_is_noticed_and_the_others_streams_end_well(
    checkpoint: Path, tmp_path: Path, instances: int
) -> None:
    """No more front ends than processors in CI: Triton Server 2.51.0 aborts when one does not run for a second while it
    gets a request, and then nobody's stream ends well.
    """
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


@pytest.mark.long  # in CI how often, and when no more: tests/unit/client/test_serve_restarts.py
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
