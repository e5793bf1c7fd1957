"""Engines in a tenth of the time: `python -m tests.chaos.nursery SOCKET ORDERS` imports what an engine needs once, and
forks for each engine that is wanted.

What is forked stands still while its stand-in (newborn.py) is stopped, and ends with it; a stand-in that is stopped is
killed when its engine has ended.

What is forked is the engine process with its own sockets, memory and threads, and its other ranks, which it forks
itself; only importing torch is saved, which takes seconds a start on a CPU. Kills in their thousands need that. How
long a restart takes with paged's own command is measured by tests/bench/bench_reliability.py.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from paged_backend.config import EngineConfig
from paged_backend.runner.parallel import rank_processes
from tests.chaos.chaotic_engine import Orders, Register, listen, run

_POLL_MS = 10
_START_SECONDS = 120
_MOST_DESCRIPTORS = 4096


class Nursery:
    """A context; `command` starts an engine from it, as EngineClient wants it."""

    def __init__(self, orders: Orders) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nursery-", dir="/tmp")
        self._socket = f"{self._folder.name}/socket"
        command = [sys.executable, "-m", "tests.chaos.nursery", self._socket, json.dumps(asdict(orders))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-I", "-S", str(Path(__file__).with_name("newborn.py")), self._socket]

    def __enter__(self) -> Nursery:
        deadline = time.monotonic() + _START_SECONDS
        while not Path(self._socket).exists():
            assert self._process.poll() is None and time.monotonic() < deadline, "the nursery did not start"
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._folder.cleanup()


def _serve(path: str, orders: Orders) -> None:
    """Until stdin ends. One thread: nothing may hold a lock when it forks."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)
    children: dict[int, socket.socket] = {}
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(0, select.POLLIN | select.POLLHUP)
    while True:
        for descriptor, _ in poll.poll(_POLL_MS):
            if descriptor == 0:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                return
            if descriptor == listener.fileno():
                connection = listener.accept()[0]
                pid = _fork(connection, [listener, *children.values()], orders)
                children[pid] = connection
                poll.register(connection, select.POLLIN | select.POLLHUP)
            else:  # whoever stood for it was killed
                pid = next(pid for pid, connection in children.items() if connection.fileno() == descriptor)
                poll.unregister(descriptor)
                os.kill(pid, signal.SIGKILL)
        for pid, connection in children.items():
            if _is_stopped(_peer(connection)) and not _is_stopped(pid):
                os.kill(pid, signal.SIGSTOP)
        for pid, status in _ended(children):
            connection = children.pop(pid)
            with contextlib.suppress(KeyError):
                poll.unregister(connection)
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(status).encode() + b"\n")
                if _is_stopped(_peer(connection)):
                    os.kill(_peer(connection), signal.SIGKILL)
            connection.close()


def _peer(connection: socket.socket) -> int:
    """The stand-in's process."""
    pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[
        0
    ]
    return pid


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _ended(children: dict[int, socket.socket]) -> list[tuple[int, int]]:
    """(pid, exit status, or minus the signal)."""
    ended = []
    for pid in children:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended.append((pid, os.waitstatus_to_exitcode(status)))
    return ended


def _fork(connection: socket.socket, others: list[socket.socket], orders: Orders) -> int:
    message, descriptors, _, _ = socket.recv_fds(connection, 65536, 3)
    pid = os.fork()
    if pid:
        for descriptor in descriptors:
            os.close(descriptor)
        Register(orders.register).note(engine=pid, stand_in=_peer(connection))
        return pid
    for other in [connection, *others]:
        other.close()
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdin = open(0)  # noqa: SIM115 - for as long as the process lives
    told = json.loads(message)
    rank_processes._spawn = lambda *of_rank: ForkedRank(orders, *of_rank)  # type: ignore[assignment,return-value]
    os._exit(run(orders, Path(told["directory"]), told["flags"]))


class ForkedRank:
    """As much of subprocess.Popen as its engine asks for, which forks it before it has threads."""

    def __init__(self, orders: Orders, rank: int, descriptor: int, model_name: str) -> None:
        engine = os.getpid()
        self.pid = os.fork()
        if self.pid:
            Register(orders.register).note(rank=self.pid)
        else:
            os.closerange(3, descriptor)  # with the engine's own end, of which the rank must notice the end
            os.closerange(descriptor + 1, _MOST_DESCRIPTORS)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            listen(Register(orders.register))
            sys.argv = ["", str(rank), str(descriptor), str(engine), model_name]
            from paged_backend.runner.parallel import rank_process

            rank_process.main()

    def wait(self, timeout: float | None = None) -> int:
        """On one thread; timeout: is asked of none that is forked."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def main() -> None:
    import torch

    # torch is not for those who only want a Nursery: their memory is measured
    from paged_backend.engine.loading import load_engine
    from paged_backend.runner.parallel import process_ranks, rank_process  # noqa: F401

    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, and who waits for them does so for ever
    with tempfile.TemporaryDirectory() as folder:  # much is imported when it is first wanted
        load_engine(EngineConfig(num_pages=4, max_model_len=64, max_num_sequences=1, cuda_graphs=False), Path(folder))
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1
    _serve(sys.argv[1], Orders(**json.loads(sys.argv[2])))


if __name__ == "__main__":
    main()
    os._exit(0)  # libraries talk when they leave
