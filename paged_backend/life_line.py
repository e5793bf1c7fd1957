"""What an engine lives by: a FIFO in its folder that every front end of it holds open. It outlives any of them, and not
the last.

When the last holder has gone, however it went, the kernel sends SIGKILL to the engine (F_SETSIG, see fcntl(2)): it need
not be able to notice by itself, so one that hangs or is stopped keeps no memory either. Nobody ever writes into the
FIFO.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from pathlib import Path

from paged_backend.errors import EngineError

_NAME = "life_line"
_RANKS = "ranks.lock"
_POLL_SECONDS = 0.02
_F_SETSIG = 10  # fcntl.h; Python's fcntl has no name for it


def create_life_line(folder: Path) -> None:
    """Before the engine of that folder is started.

    Raises:
        EngineError: there can be none.
    """
    try:
        os.mkfifo(folder / _NAME, 0o600)
    except OSError as error:
        raise EngineError(f"'{folder / _NAME}' cannot be made: {error.strerror}") from None


def hold_life_line(folder: Path) -> int:
    """A descriptor; the engine of that folder lives as long as somebody has one.

    Raises:
        EngineError: there is no such engine.
    """
    try:
        return os.open(folder / _NAME, os.O_RDWR | os.O_CLOEXEC)  # for reading, too: opening waits for nobody then
    except OSError as error:
        raise EngineError(f"no engine can be held in '{folder}': {error.strerror}") from None


def live_by(folder: Path) -> None:
    """Ties this process's life to its holders'. Whoever started it holds the line already.

    Raises:
        EngineError: there is no line.
    """
    try:
        line = os.open(folder / _NAME, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise EngineError(f"no line to live by in '{folder}': {error.strerror}") from None
    _be_killed_at_the_end_of(line)
    os.set_blocking(line, True)
    threading.Thread(target=_wait_for_the_end_of, args=(line,), name="life-line", daemon=True).start()


def _be_killed_at_the_end_of(line: int) -> None:
    fcntl.fcntl(line, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(line, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(line, fcntl.F_SETFL, fcntl.fcntl(line, fcntl.F_GETFL) | os.O_ASYNC)


def _wait_for_the_end_of(line: int) -> None:
    """Where the kernel is not Linux itself and sends no such signal."""
    os.read(line, 1)
    os._exit(0)


def note_rank(folder: Path) -> None:
    """For the rest of this process's life it is a rank of that folder's engine: `wait_for_ranks` waits for its end.

    Raises:
        EngineError: the folder has gone.
    """
    try:
        lock = os.open(folder / _RANKS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EngineError(f"no rank can be of the engine in '{folder}': {error.strerror}") from None
    fcntl.flock(lock, fcntl.LOCK_SH)  # the kernel lets go of it when the process has ended, however it ends


def wait_for_ranks(folder: Path, seconds: float) -> bool:
    """Waits until the ranks of that folder's engine, which has ended, have ended too: the next engine must find their
    GPUs' memory free. False: too long.
    """
    try:
        lock = os.open(folder / _RANKS, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # it had no other ranks
        return True
    end = time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError:
                if time.monotonic() > end:
                    return False
                time.sleep(_POLL_SECONDS)
    finally:
        os.close(lock)
