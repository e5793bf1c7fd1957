"""The process that ends a front end with its server, with two processes that stand for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from paged_backend.frontend import server_death_process
from paged_backend.frontend.server_death_process import GRACE_SECONDS

_SLEEPS = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


class _Three:
    """A server, its front end, and the process that watches both."""

    def __init__(self, shared: Path) -> None:
        self.server, self.front_end = (
            subprocess.Popen([sys.executable, "-c", _SLEEPS], stdout=subprocess.PIPE) for _ in range(2)
        )
        for process in (self.server, self.front_end):
            assert process.stdout is not None and process.stdout.readline()
        descriptors = [os.pidfd_open(process.pid) for process in (self.server, self.front_end)]
        script = [sys.executable, "-I", "-S", server_death_process.__file__, *map(str, descriptors), str(shared)]
        self.watch = subprocess.Popen(script, pass_fds=descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def close(self) -> None:
        for process in (self.watch, self.server, self.front_end):
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def three(tmp_path: Path) -> Iterator[_Three]:
    (tmp_path / "shared").write_bytes(b"prompts")
    processes = _Three(tmp_path / "shared")
    yield processes
    processes.close()


def test_a_front_end_that_stays_after_its_server_is_killed_and_what_they_shared_is_removed(
    three: _Three, tmp_path: Path
) -> None:
    three.server.kill()  # nobody waits for it: a zombie is dead, too
    started = time.monotonic()
    assert three.front_end.wait(GRACE_SECONDS + 10) == -signal.SIGKILL
    assert time.monotonic() > started + GRACE_SECONDS - 0.5
    assert three.watch.wait(10) == 0
    assert not (tmp_path / "shared").exists()


def test_a_front_end_that_ends_before_its_server_leaves_the_shared_memory_to_it(three: _Three, tmp_path: Path) -> None:
    three.front_end.kill()
    assert three.watch.wait(10) == 0
    assert three.server.poll() is None
    assert (tmp_path / "shared").exists()


def test_signals_to_the_whole_group_end_no_watch(three: _Three) -> None:
    time.sleep(1)  # until it has begun
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        three.watch.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        three.watch.wait(0.5)


@pytest.mark.parametrize("server", ["gone", "there"])
def test_a_front_end_whose_server_was_gone_before_it_looked_ends_at_once(server: str) -> None:
    """Its parent is another process by then; the stub's command line names the server."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    pid = str(ended.pid if server == "gone" else os.getpid())
    code = "from paged_backend.frontend.server_death import end_with_server; end_with_server(); print('lives')"
    stub = subprocess.run(
        ["triton_python_backend_stub", "-c", code, "1048576", "1048576", pid],
        executable=sys.executable,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (stub.returncode, stub.stdout) == ((1, "") if server == "gone" else (0, "lives\n")), stub.stderr


@pytest.mark.parametrize("name", ["triton_python_backend_stub", "python"])
def test_a_front_end_that_could_not_begin_does_not_linger(name: str, tmp_path: Path) -> None:
    """Its interpreter waits for a thread for ever; whoever is no stub goes on waiting."""
    (tmp_path / name).symlink_to(sys.executable)
    lingers = "import threading; threading.Thread(target=threading.Event().wait, name='idle').start()"
    script = f"from paged_backend.frontend.server_death import leave_soon; leave_soon(0.5); {lingers}"
    command = [str(tmp_path / name), "-c", script]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as front_end:
        try:
            said = front_end.communicate(timeout=20 if "stub" in name else 5)[1]
        except subprocess.TimeoutExpired:
            front_end.kill()
            assert name == "python"
        else:
            assert name != "python"
            assert front_end.returncode == 1
            assert "threading.py" in said
