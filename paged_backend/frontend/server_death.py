"""A front end lives no longer than its server: Triton Server's stub outlives one that was killed, by minutes or for
ever, and with it its engine, which holds the GPU's memory.

A thread looks whether the server is still there. It cannot look while a call into the stub waits for the dead server
with the interpreter's lock held, so a process of its own does, too (server_death_process.py), and kills the front end.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import subprocess
import threading
import time
from pathlib import Path

from paged_backend.engine_client.starter import python_executable
from paged_backend.errors import EngineError
from paged_backend.frontend import server_death_process
from paged_backend.frontend.shared_memory import shared_files, unlink
from paged_backend.process_id import ProcessId

_POLL_SECONDS = 0.5
_LAST_SECONDS = 15.0
_SERVER_ARGUMENT = 5  # of the stub's command line: the server's process

log = logging.getLogger("paged")


def end_with_server() -> None:
    """Ties this process's life to that of the server, its parent; returns at once. Ends the process if it is gone."""
    server = os.getppid()
    try:
        _watch_from_outside(server)
    except (OSError, EngineError) as error:  # a kernel without pidfd_open(2), or no more processes
        log.warning("no process watches the server: %s; a front end may outlive one that is killed", error)
    if os.getppid() != server or _named_server_is_gone():
        _leave()
    threading.Thread(target=_watch, args=(server,), name="server", daemon=True).start()


def leave_soon(seconds: float = _LAST_SECONDS) -> None:
    """Ends a front end that could not begin, if it has not ended by itself after so many seconds, and prints where its
    threads are: Triton Server waits for its end before it says why the model cannot be loaded. Needs no interpreter's
    lock. Does nothing in a process that is no stub.
    """
    if _is_stub(_command_line()):
        faulthandler.dump_traceback_later(seconds, exit=True)


def _watch(server: int) -> None:
    while os.getppid() == server:
        time.sleep(_POLL_SECONDS)
    _leave()


def _leave() -> None:
    unlink(shared_files())
    os._exit(1)


def _watch_from_outside(server: int) -> None:
    """
    Raises:
        OSError, EngineError: there can be no such process.
    """
    processes = [os.pidfd_open(server), os.pidfd_open(os.getpid())]
    try:
        script = [python_executable(), "-I", "-S", server_death_process.__file__]
        arguments = [str(number) for number in processes] + [str(file) for file in shared_files()]
        subprocess.Popen([*script, *arguments], stdin=subprocess.DEVNULL, pass_fds=processes)
    finally:
        for process in processes:
            os.close(process)


def _named_server_is_gone() -> bool:
    """It was killed before this process came to look who its parent is."""
    words = _command_line()
    named = words[_SERVER_ARGUMENT] if len(words) > _SERVER_ARGUMENT else ""
    return _is_stub(words) and named.isdigit() and ProcessId.of(int(named)) is None


def _command_line() -> list[str]:
    return Path("/proc/self/cmdline").read_text(errors="replace").split("\0")


def _is_stub(words: list[str]) -> bool:
    return "stub" in Path(words[0]).name
