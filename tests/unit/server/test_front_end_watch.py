"""Which front ends of a server live: processes that look like Triton Server's, under one that looks like it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paged_backend.server.front_end_watch import FrontEndWatch, front_ends_of, num_requests

_STUB = "import time; time.sleep(300)"
_SERVER = f"""
import subprocess, sys
for line in sys.stdin:
    arguments = ["/opt/backends/triton_python_backend_stub", "-c", {_STUB!r}, *line.split()]
    subprocess.Popen(arguments, executable=sys.executable)
"""


class _Server:
    """Starts a stub for each line that it is told."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "repository"
        self.process = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, text=True)

    def start(self, count: int) -> list[int]:
        """The processes of all front ends, once there are so many."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{self.model}/1/model.py\n" * (count - len(self.pids())))
        self.process.stdin.flush()
        _wait(lambda: len(self.pids()) == count)
        return self.pids()

    def pids(self) -> list[int]:
        return [front_end.pid for front_end in front_ends_of(self.process.pid, str(self.model).encode())]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr("paged_backend.server.front_end_watch._POLL_SECONDS", 0.05)
    started = _Server(tmp_path)
    yield started
    for pid in started.pids():
        os.kill(pid, signal.SIGKILL)
    started.process.kill()
    started.process.communicate()


def _wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_dead_front_end_is_told_once_with_the_number_of_those_that_live(server: _Server) -> None:
    pids = server.start(3)
    told: list[tuple[list[int], int]] = []
    watch = FrontEndWatch(
        server.process.pid, server.model, lambda: True, lambda dead, living: told.append((dead, living))
    )
    os.kill(pids[1], signal.SIGKILL)
    _wait(lambda: told)
    os.kill(pids[0], signal.SIGKILL)
    time.sleep(0.3)
    assert told == [([pids[1]], 2)]
    watch.close()


def test_unloading_and_loading_anew_are_no_deaths(server: _Server) -> None:
    ready = True
    told: list[tuple[list[int], int]] = []
    pids = server.start(2)
    watch = FrontEndWatch(
        server.process.pid, server.model, lambda: ready, lambda dead, living: told.append((dead, living))
    )
    ready = False
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)
    anew = server.start(2)
    ready = True
    time.sleep(0.3)
    assert told == []
    os.kill(anew[0], signal.SIGKILL)
    _wait(lambda: told)
    assert told == [([anew[0]], 1)]
    watch.close()


def test_the_documented_liveness_probe_fails_when_a_front_end_is_dead(server: _Server) -> None:
    page = (Path(__file__).parents[3] / "docs" / "reliability.md").read_text()
    documented = re.search(r"command: \[sh, -c, '(.*)'\]\n", page)
    assert documented is not None
    *folders, name = server.model.parts
    probe = (
        documented[1]
        .replace("/[p]aged_llm/", f"/[{folders[-1][0]}]{folders[-1][1:]}/{name}/")
        .replace("-ge 4", "-ge 2")
    )
    assert probe != documented[1]
    pids = server.start(2)
    assert subprocess.run(["sh", "-c", probe], check=False).returncode == 0
    os.kill(pids[0], signal.SIGKILL)
    _wait(lambda: len(server.pids()) == 1)
    assert subprocess.run(["sh", "-c", probe], check=False).returncode == 1


def test_requests_of_all_states_are_counted_and_a_page_without_any_says_nothing() -> None:
    page = (
        'paged_requests{model="m",state="running",version="1"} '
        '3\npaged_requests{model="m",state="waiting",version="1"} 2\npaged_requests_x{} 9\n'
    )
    assert (num_requests(page), num_requests("")) == (5, None)
