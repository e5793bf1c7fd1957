"""An engine process that another front end has started. The kernel tells only a parent how its child ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from typing import IO

from paged_backend.process_id import ProcessId

_POLL_SECONDS = 0.02


class InheritedEngine:
    """As much of subprocess.Popen as an owner asks for."""

    stdin: IO[bytes] | None = None
    returncode: int | None = None  # nobody tells us

    def __init__(self, process: ProcessId) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """None while it runs."""
        return None if self._process.alive else 0

    def kill(self) -> None:
        """No effect if it is gone."""
        try:
            process = os.pidfd_open(self._process.pid)
        except OSError:
            return
        try:
            if self._process.alive:  # asked while we hold it: its number cannot become another's
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)

    def wait(self, timeout: float | None = None) -> int:
        """
        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._process.alive:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("engine", timeout or 0.0)
            time.sleep(_POLL_SECONDS)
        return 0
