"""A server that a command starts for itself, and that ends with it."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer
from rich.console import Console
from rich.status import Status

from paged_backend.errors import EngineError
from paged_backend.log_lines import without_stamp
from paged_backend.server.launch import Server, ServerSettings, StoppedEarlyError

_HURRIED_EXIT = 130
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def running(settings: ServerSettings) -> Iterator[Server]:
    """A started server that SIGINT, SIGTERM and SIGHUP end: the first drains, a second hurries."""
    narrator = _Narrator()
    server = Server(settings, narrator.show)

    def on_signal(number: int, frame: FrameType | None) -> None:
        if server.stopping:
            server.kill()
        else:
            server.terminate()

    # nohup
    wanted = [
        number for number in _STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, on_signal) for number in wanted}
    try:
        with narrator.waiting():
            server.start()
        yield server
        if not server.stopping and server.wait(0) is not None:
            raise server.failure()
        narrator.show("paged: stopping: waiting for requests in flight (Ctrl-C again to hurry)")
        exit_code = server.stop()
        if exit_code == -signal.SIGKILL:
            raise typer.Exit(_HURRIED_EXIT)
        if exit_code != 0:
            # of whatever kind: it was told to stop, and is not to be started again
            raise EngineError(str(server.failure()))
        narrator.show("paged: stopped")
    except StoppedEarlyError:
        narrator.show("paged: stopped")
        raise typer.Exit() from None
    finally:
        server.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


class _Narrator:
    """Shows log lines on stderr; on a terminal, progress ("… 45 % …") replaces itself until the server is ready."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._status: Status | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        if not self._console.is_terminal:
            yield
            return
        with self._console.status("starting tritonserver", spinner="dots") as self._status:
            yield
        self._status = None

    def show(self, line: str) -> None:
        """On a terminal without the time and the model's name, which say nothing to those who watch the lines
        appear.
        """
        line = without_stamp(line) if self._console.is_terminal else line
        if self._status is not None and re.search(r"\d ?%", line) and line.startswith("paged: "):
            self._status.update(line.removeprefix("paged: "))
        else:
            self._console.print(line, markup=False, soft_wrap=True)
