"""The processes that compile grammars (compiler_process.py), one for each of the engine's threads, started when first wanted, killed when too slow."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from typing import IO

import msgspec

from paged_backend.grammar.compiler_process import Verdict, VocabularyPlace, send, too_large
from paged_backend.grammar.options import Grammar

COMPILE_SECONDS = 20.0  # for one grammar, on the clock
_START_SECONDS = 120.0  # for the vocabulary, and for importing the library


class GrammarCompiler:
    """Used by one thread. Invariant: a process that is kept has answered everything it was asked."""

    def __init__(self, place: VocabularyPlace) -> None:
        self._place = place
        self._process: subprocess.Popen[bytes] | None = None

    def compile(self, grammar: Grammar) -> Verdict:
        """Waits for the verdict; a process that dies or takes too long is one, too.

        Raises:
            OSError: no process can be started.
        """
        if self._process is not None and self._process.poll() is not None:
            self.close()  # it died while it had nothing to do with this grammar
        try:
            process = self._process or self._start()
            send(_pipe(process.stdin), grammar)
            return self._receive(process, COMPILE_SECONDS)
        except TimeoutError:
            self.close()
            return Verdict(refusal=f"it takes more than {COMPILE_SECONDS:g} s to compile")
        except (EOFError, BrokenPipeError):
            self.close()
            return Verdict(refusal=too_large())

    def close(self) -> None:
        """Ends the process, whatever it is at."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stdin):
                with suppress(OSError):  # of what was never read
                    _pipe(stream).close()

    def _start(self) -> subprocess.Popen[bytes]:
        safe_path = ["-P"] if sys.version_info >= (3, 11) else []  # the server's working directory is no place to import from
        command = [sys.executable, *safe_path, "-m", "paged_backend.grammar.compiler_process", msgspec.json.encode(self._place).decode()]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        try:
            self._receive(self._process, _START_SECONDS)
        except (TimeoutError, EOFError):
            self.close()
            raise OSError("the process that compiles grammars did not start") from None
        return self._process

    def _receive(self, process: subprocess.Popen[bytes], seconds: float) -> Verdict:
        end = time.monotonic() + seconds
        size = int.from_bytes(_read(process, 4, end), "little")
        return msgspec.msgpack.decode(_read(process, size, end), type=Verdict)


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
