"""Starts engine processes: the first at once, the others from a *standby*, a process that has done already what an
engine does before it needs the device.

Importing torch and transformers takes seconds, most of a small model's restart. So while an engine serves, another
process has its options, has imported everything, and waits for a word on its stdin. It has no sockets, no weights and
no device memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from paged_backend.config import EngineConfig
from paged_backend.engine_client.inherited_engine import InheritedEngine
from paged_backend.errors import EngineError
from paged_backend.messages import STANDBY

# an engine has been ready for so long: what begins, and what dies at once, has the processors to itself
STANDBY_AFTER_SECONDS = 10.0
_EXIT_SECONDS = 10.0

log = logging.getLogger("paged")


def engine_command() -> list[str]:
    """How the engine process is started; the folder of its sockets is appended."""
    return python_command("paged_backend.engine.process")


def python_command(module: str) -> list[str]:
    """How a module is run as a process of its own.

    Raises:
        EngineError: there is no interpreter.
    """
    # the server's working directory is no place to import from
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []
    return [python_executable(), *safe_path, "-m", module]


def python_executable() -> str:
    """The interpreter of this environment. Within Triton Server's stub, sys.executable need not be one.

    Raises:
        EngineError: there is none.
    """
    python = sys.executable if sys.executable and Path(sys.executable).is_file() else shutil.which("python3")
    if not python:
        raise EngineError("no Python interpreter found to start processes with: put python3 on PATH")
    return python


class EngineStarter:
    """Owns the standby. For one thread at a time, which must live until what it starts has begun to load: a standby
    dies with the thread that started it.
    """

    def __init__(self, config: EngineConfig, command: Sequence[str] | None) -> None:
        """command: how to start the engine, for tests; the folder of its sockets is appended."""
        self._config = config
        self._command = command
        self._standby: subprocess.Popen[bytes] | None = None
        self._due: float | None = None  # when a standby is to be started; None: there is one, or none is wanted

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        """An engine process for `folder`, which is the one that the standby was told.

        Raises:
            EngineError: it cannot be started.
        """
        standby, self._standby, self._due = self._standby, None, None
        if standby is not None:
            if standby.poll() is None and _say(standby, b"start\n"):
                return standby
            _end(standby)
        return self._spawn(folder)

    def note_ready(self) -> None:
        """The engine serves."""
        if self._config.standby_engine:
            self._due = time.monotonic() + STANDBY_AFTER_SECONDS

    def stand_by(self, folder: Path) -> None:
        """Starts the standby of an engine that would have `folder`, once its time has come. To be called often."""
        if self._standby is not None and self._standby.poll() is not None:
            _end(self._standby)  # what killed it may have been a want of memory: not at once again
            self._standby = None
            self.note_ready()
        if self._due is None or time.monotonic() < self._due:
            return
        self._due = None
        try:
            self._standby = self._spawn(folder, STANDBY)
        except EngineError as error:
            log.warning("no standby: %s", error)

    def close(self) -> None:
        """Ends the standby."""
        self._due = None
        if self._standby is not None:
            _end(self._standby)
            self._standby = None

    def _spawn(self, folder: Path, *flags: str) -> subprocess.Popen[bytes]:
        command = [*(self._command or engine_command()), str(folder), *flags]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, umask=int(os.environ.get("PAGED_UMASK", "-1"), 8)
            )
        except OSError as error:
            raise EngineError(f"the engine process cannot be started: {os.strerror(error.errno or 0)}") from None
        # should it be dead already, whoever waits for Ready finds out
        _say(process, self._config.model_dump_json().encode() + b"\n")
        return process


def _say(process: subprocess.Popen[bytes], line: bytes) -> bool:
    """stdin then stays open: its end tells the process that we are gone. False: it is gone itself."""
    assert process.stdin is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    wait_for_exit(process)


def wait_for_exit(engine: subprocess.Popen[bytes] | InheritedEngine) -> None:
    """At most 10 s; then it is killed."""
    started = time.monotonic()
    try:
        engine.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        log.error("error: the engine did not stop within %.0f s: killed", time.monotonic() - started)
        engine.kill()
        engine.wait()
    if engine.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            engine.stdin.close()
