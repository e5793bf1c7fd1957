"""The processes that work on grammars, as the engine sees them: a nursery (nursery.py) that is started when first
wanted, and its children.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import msgspec

from paged_backend.grammar import nursery
from paged_backend.grammar.compiler_process import Verdict, VocabularyPlace, too_large
from paged_backend.grammar.follower_process import Followed, Frames, ToFollower, decode_followed, framed
from paged_backend.grammar.options import Grammar
from paged_backend.grammar.vocabulary import GrammarError

COMPILE_SECONDS = 20.0  # of a processor's time, for one grammar
# so many times that on the clock: a busy machine, where everything else goes before it, is not the grammar's fault
_CLOCK_TIMES = 6
_LOOK_SECONDS = 0.02  # how often somebody looks at a worker's time
_START_SECONDS = 120.0  # for the vocabulary, and for importing the library
_FORK_SECONDS = 30.0
_EXIT_SECONDS = 5.0  # from the end of a connection to that of the process, which frees its memory first
# of what processes were killed at: by an operator, or by the kernel for want of memory, which the grammar may have used
# up
_TRIES = 3
_EXIT_CODE = 49  # of the fields of /proc/PID/stat behind the name: the 52nd of all, a wait status; see proc(5)
_CPUCLOCK_SCHED = 2  # linux/include/linux/posix-timers.h: the clock of another process's processor time


log = logging.getLogger("paged")


class NurseryLostError(OSError):
    """The nursery was killed, or does not answer; another one may."""


class Worker:
    """A child of the nursery and the connection to it."""

    def __init__(self, workers: Workers, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self.connection = connection
        self._workers = workers

    def cpu_seconds(self) -> float:
        """Of a processor's time, that it took so far."""
        return time.clock_gettime((~self.pid << 3) | _CPUCLOCK_SCHED)

    def was_killed(self) -> bool:
        """By SIGKILL, which no fault of its own and no limit sends it; True also if it is gone without a trace, as with
        a nursery that was killed.

        To be asked when its connection has ended, before `kill`.
        """
        end = time.monotonic() + _EXIT_SECONDS
        while time.monotonic() < end:
            try:
                fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                return True
            if fields[0] in "ZX":
                return os.WTERMSIG(int(fields[_EXIT_CODE])) == signal.SIGKILL
            time.sleep(_LOOK_SECONDS / 10)
        return False

    def kill(self) -> None:
        """Whatever it is at."""
        self.connection.close()
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # its number is not given away before `reap`
        self._workers.reap(self.pid)


class Workers:
    """Starts the nursery, and has it make children. May be used by several threads."""

    def __init__(self, place: VocabularyPlace) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._nursery: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._dead: deque[int] = deque()

    def make(self, kind: bytes) -> Worker:
        """A new child, COMPILE or FOLLOW.

        Raises:
            GrammarError: there is no vocabulary, or no library.
            OSError: no process can be started.
        """
        with self._lock:
            for last_try in (False, False, True):
                ours, theirs = socket.socketpair()
                try:
                    with theirs:
                        return Worker(self, self._fork(kind, theirs), ours)
                except BaseException as error:
                    ours.close()
                    if last_try or not isinstance(error, NurseryLostError):
                        raise
        raise AssertionError

    def _fork(self, kind: bytes, theirs: socket.socket) -> int:
        """
        Raises:
            NurseryLostError: it was killed, or does not answer; another one may.
            GrammarError, OSError: see `make`.
        """
        control = self._started()
        try:
            while self._dead:
                control.send(str(self._dead.popleft()).encode())
            socket.send_fds(control, [kind], [theirs.fileno()])
            pid = int(control.recv(64) or b"0")
        except OSError:
            pid = 0
        if not pid:
            self._end()
            raise NurseryLostError("the process that works on grammars does not answer")
        return pid

    def reap(self, pid: int) -> None:
        """Its number may be given away, once somebody wants another child. Never waits."""
        self._dead.append(pid)

    def close(self) -> None:
        """Ends all of them."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._nursery is not None and self._control is not None:
            self._control.close()
            self._nursery.kill()
            self._nursery.wait()
        self._nursery = self._control = None

    def _exit_code(self) -> int | None:
        """Of a nursery that has hung up; None: it does not end even so."""
        assert self._nursery is not None
        with suppress(subprocess.TimeoutExpired):
            return self._nursery.wait(_EXIT_SECONDS)
        return None

    def _started(self) -> socket.socket:
        if self._nursery is not None and self._nursery.poll() is not None:
            self._end()
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # the server's working directory is no place to import from
        safe_path = ["-P"] if sys.version_info >= (3, 11) else []
        command = [
            sys.executable,
            *safe_path,
            "-m",
            "paged_backend.grammar.nursery",
            msgspec.json.encode(self._place).decode(),
        ]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with theirs:
            self._nursery = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=environment)
        self._control = ours
        ours.settimeout(_START_SECONDS)
        try:
            ready = msgspec.msgpack.decode(ours.recv(2**16), type=Verdict)
        except (OSError, msgspec.DecodeError) as error:
            killed = not isinstance(error, TimeoutError) and self._exit_code() == -signal.SIGKILL
            self._end()
            raise (NurseryLostError if killed else OSError)(
                "the process that works on grammars did not start"
            ) from None
        if ready.refusal:
            self._end()
            raise GrammarError(ready.refusal, ready.kind)
        ours.settimeout(_FORK_SECONDS)
        return ours


class GrammarCompiler:
    """Compiles in a child that is kept until a grammar is too much for it. Used by one thread."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._worker: Worker | None = None

    def compile(self, grammar: Grammar, seconds: float = COMPILE_SECONDS) -> Verdict | None:
        """Waits for the verdict; None: there is none after `seconds` of a processor's time. That a child dies of a
        grammar is a verdict, too.

        A child that was killed is not: another one tries the grammar again.

        Raises:
            OSError: all of them were killed.
            GrammarError, OSError: see Workers.make.
        """
        for _ in range(_TRIES):
            if self._worker is not None and _hung_up(self._worker.connection):
                self.close()  # it died while it had nothing to do with this grammar
            worker = self._worker = self._worker or self._workers.make(nursery.COMPILE)
            try:
                worker.connection.settimeout(_CLOCK_TIMES * seconds)
                worker.connection.sendall(framed(grammar))
                return _receive(worker, seconds)
            except TimeoutError:
                self.close()
                return None
            except (EOFError, OSError):
                killed = worker.was_killed()
                self.close()
            if not killed:
                return Verdict(refusal=too_large())
            log.warning("the process that compiled a grammar was killed; another one takes its place")
        raise OSError(f"{_TRIES} processes were killed while they compiled a grammar")

    def close(self) -> None:
        """Ends the child, whatever it is at."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()


def _hung_up(connection: socket.socket) -> bool:
    ready = select.poll()  # select knows no descriptor above 1023
    ready.register(connection, select.POLLIN)
    return bool(ready.poll(0))


def _receive(worker: Worker, seconds: float) -> Verdict:
    """
    Raises:
        TimeoutError: it has not come after `seconds` of the worker's time.
        EOFError, OSError: the worker is gone.
    """
    frames, end, end_cpu = Frames(), time.monotonic() + _CLOCK_TIMES * seconds, worker.cpu_seconds() + seconds
    worker.connection.settimeout(_LOOK_SECONDS)
    while True:
        try:
            part = worker.connection.recv(2**20)
        except TimeoutError:
            if time.monotonic() > end or worker.cpu_seconds() > end_cpu:
                raise
            continue
        if not part:
            raise EOFError
        for frame in frames.feed(part):
            return msgspec.msgpack.decode(frame, type=Verdict)


class FollowerLink:
    """The way to the child that follows grammars. Nothing here waits, but `wait`, as long as it is told."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._connection = worker.connection
        self._connection.setblocking(False)
        self._unsent = bytearray()
        self._frames = Frames()
        self._received = memoryview(bytearray(2**18))
        self._ready = select.poll()
        self._ready.register(self._connection, select.POLLIN)

    def send(self, message: ToFollower) -> None:
        """Goes out with the next `flush`."""
        self._unsent += framed(message)

    def flush(self) -> None:
        """
        Raises:
            EOFError: the child is gone.
        """
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            raise EOFError from None

    def replies(self) -> list[Followed]:
        """Those that have come.

        Raises:
            EOFError: the child is gone.
        """
        found: list[Followed] = []
        try:
            while num_bytes := self._connection.recv_into(self._received):
                found += map(decode_followed, self._frames.feed(self._received[:num_bytes]))
        except BlockingIOError:
            return found
        except OSError:
            pass
        if found:
            return found
        raise EOFError

    def wait(self, seconds: float) -> None:
        """For a reply."""
        self._ready.poll(seconds * 1000)

    def cpu_seconds(self) -> float:
        return self._worker.cpu_seconds()

    def close(self) -> None:
        self._worker.kill()
