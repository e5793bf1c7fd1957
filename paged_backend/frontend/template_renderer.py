"""The process that renders chat templates (template_process.py), as a front end sees it: started when first wanted,
killed when too slow.
"""

from __future__ import annotations

import os
import select
import subprocess
import threading
import time
from contextlib import suppress
from typing import IO

import msgspec

from paged_backend.engine_client.starter import python_command
from paged_backend.errors import EngineError, ErrorKind, RequestError
from paged_backend.frontend.template_process import Rendered, Rendering, send

RENDER_SECONDS = 10.0  # for one conversation, on the clock: a long one takes milliseconds
_TRIES = 2  # processes may be killed for other reasons than the template
_START_SECONDS = 120.0  # for importing transformers


class TemplateRenderer:
    """Thread-safe; renders one conversation at a time. Invariant: a process that is kept has answered everything it was
    asked.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._closed = False

    def warm(self) -> None:
        """Starts the process, so that the first caller does not wait for it."""
        with suppress(RequestError), self._lock:
            self._started()

    def render(self, rendering: Rendering) -> Rendered:
        """Waits for the text; a process that takes too long, or dies over and over, is an error of the template's.

        Raises:
            RequestError: no process can be started, or `close` was called.
        """
        with self._lock:
            for _ in range(_TRIES):
                process = self._started()
                try:
                    send(_pipe(process.stdin), rendering)
                    return _receive(process, RENDER_SECONDS)
                except TimeoutError:
                    self._end(process)
                    return Rendered(error=f"it takes more than {RENDER_SECONDS:g} s")
                except (EOFError, BrokenPipeError):
                    # somebody killed it; or the template did, asking for memory in a way that Python does not survive
                    self._end(process)
            return Rendered(error="the process that rendered it died")

    def close(self) -> None:
        """Ends the process, whatever it is at: a rendering that is under way fails."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            if self._process is not None:
                self._end(self._process)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise RequestError("the model is being unloaded", ErrorKind.OVERLOADED)
        if self._process is not None and self._process.poll() is not None:
            self._end(self._process)  # it died while it had nothing to do
        if self._process is None:
            try:
                command = python_command("paged_backend.frontend.template_process")
                environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
                )
                _receive(self._process, _START_SECONDS)
            except (OSError, EOFError, EngineError):  # a TimeoutError is an OSError
                if self._process is not None:
                    self._end(self._process)
                raise RequestError(
                    "messages: the process that renders chat templates did not start", ErrorKind.INTERNAL
                ) from None
        return self._process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stdin):
            with suppress(OSError):  # of what was never read
                _pipe(stream).close()


def _receive(process: subprocess.Popen[bytes], seconds: float) -> Rendered:
    end = time.monotonic() + seconds
    size = int.from_bytes(_read(process, 4, end), "little")
    return msgspec.json.decode(_read(process, size, end), type=Rendered)


def _read(process: subprocess.Popen[bytes], size: int, end: float) -> bytes:
    """Exactly `size` bytes of its output.

    Raises:
        TimeoutError: they have not come at `end`.
        EOFError: the process is gone.
    """
    descriptor = _pipe(process.stdout).fileno()
    ready = select.poll()  # select knows no descriptor above 1023
    ready.register(descriptor, select.POLLIN)
    parts = bytearray()
    while len(parts) < size:
        if not ready.poll(max(0.0, end - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(descriptor, size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
