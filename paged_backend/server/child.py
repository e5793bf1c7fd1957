"""tritonserver, or a gateway before it, as a child process that cannot outlive us."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from paged_backend.errors import EngineError

_LAST_LINES_SECONDS = 5.0
# Runs as a process of its own that becomes the server: the kernel ends it when the thread that started it is gone.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
# what the server shares with its front ends in /dev/shm is nobody else's; engines go back to the umask of before
os.environ["PAGED_UMASK"] = f"{os.umask(0o077):o}"
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerChild:
    """A server as a process in a session of its own, and the thread that reads what it writes.

    The thread starts the process, because the kernel's parent-death signal follows the thread.
    """

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        on_line: Callable[[str], None],
        inherited: int | None = None,
    ) -> None:
        """on_line: called with each line that it writes. inherited: a file descriptor that it gets as it is."""
        self._command = command
        self._environment = environment
        self._on_line = on_line
        self._inherited = inherited
        self._started = threading.Event()
        self._ended = threading.Event()
        self._error: OSError | None = None
        self._exit_code: int | None = None
        self._group_lock = threading.RLock()  # also taken in signal handlers
        self._process: subprocess.Popen[bytes] | None = None
        threading.Thread(target=self._run, name="paged-server", daemon=True).start()
        self._started.wait()
        if self._error is not None:
            raise EngineError(f"{Path(command[0]).name} could not be started: {self._error.strerror}")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _run(self) -> None:
        starter = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *self._command]
        try:
            self._process = subprocess.Popen(
                starter,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=() if self._inherited is None else (self._inherited,),
            )
        except OSError as error:
            self._error = error
            return
        finally:
            self._started.set()
        reader = threading.Thread(target=self._read, name="paged-server-log", daemon=True)
        reader.start()
        # Leaves the zombie, so that its process group keeps its number until the stragglers are ended.
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self.kill_all()
        reader.join(_LAST_LINES_SECONDS)
        with self._group_lock:
            self._exit_code = self._process.wait()
        self._ended.set()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._on_line(line.decode(errors="replace").rstrip("\r\n"))

    def wait(self, seconds: float | None = None) -> int | None:
        self._ended.wait(seconds)
        return self._exit_code

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        with self._group_lock:
            if self._exit_code is None:
                os.kill(self._process.pid, number)

    def kill_all(self) -> None:
        assert self._process is not None
        with self._group_lock, contextlib.suppress(ProcessLookupError):
            if self._exit_code is None:
                os.killpg(self._process.pid, signal.SIGKILL)
