"""What tritonserver and the processes under it write: which lines are for the operator, and what a failure means in one
sentence.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import deque

from paged_backend.log_lines import without_stamp

_OURS = "paged: "
_ERROR = "paged: error: "
_HEAD_LINES = 100
_TAIL_LINES = 200
_BUSY = re.compile(r"Socket '(?P<host>[^']*):(?P<port>\d+)' already in use")
_NOT_LOADED = re.compile(r"failed to load '[^']*' version \d+: \w+(?: \w+)*: (?P<why>.*?)(?:\\n.*)?\"?$")
_CREATING = re.compile(r"^error: creating server: (?P<why>.*)")
_OPTION = re.compile(r"unrecognized option '(?P<option>[^']*)'")
_DRAIN = re.compile(r"Exit timeout expired")
CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)  # that a process brings upon itself
_RECENT_SECONDS = 20.0  # an error that came so shortly before the end is why; the server takes some seconds to leave
_SERVICE = re.compile(r"failed to start (?P<what>\w+) service: (?P<why>.*?)\"?$")


class ServerLog:
    """Reads tritonserver's output line by line. Thread-safe; keeps the first and last lines, and an error of ours: the
    first of the start, later the last.
    """

    def __init__(self, show_all: bool) -> None:
        self._show_all = show_all
        self._lock = threading.Lock()
        self._head: list[str] = []
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._error: str | None = None
        self._error_time = 0.0
        self._serving = False

    def note_ready(self) -> None:
        """Errors are no reason for a failed start from now on: they are shown as they come."""
        with self._lock:
            self._serving = True
            self._error = None

    def add(self, line: str) -> bool:
        """Keeps `line`; True if the operator should see it now. Errors of ours during the start are left to `failure`,
        which tells them once.
        """
        reported = without_stamp(line)
        with self._lock:
            if len(self._head) < _HEAD_LINES:
                self._head.append(line)
            else:
                self._tail.append(line)
            if reported.startswith(_ERROR) and (self._serving or self._error is None):
                self._error = reported.removeprefix(_ERROR).strip()
                self._error_time = time.monotonic()
        return self._show_all or (reported.startswith(_OURS) and (self._serving or not reported.startswith(_ERROR)))

    def lines(self) -> list[str]:
        """The first lines and the last ones, oldest first."""
        with self._lock:
            return [*self._head, *self._tail]

    def listens(self) -> bool:
        """tritonserver said that its HTTP service is up."""
        return any("Started HTTPService" in line for line in self.lines())

    def busy_port(self) -> int | None:
        """The port that tritonserver could not listen on, if that is why it ended."""
        return next((int(found["port"]) for line in self.lines() if (found := _BUSY.search(line))), None)

    def failure(self, exit_code: int) -> str:
        """One sentence on why tritonserver ended with `exit_code` (negative: minus the signal), best source first."""
        how = (
            f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
        )
        return self._reason() or f"tritonserver {how}; --log-verbose shows its log"

    def crashed(self, exit_code: int) -> bool:
        """tritonserver ended by a fault of its own, and nobody said why: 2.51.0 does so, rarely, when its stubs start
        on an overloaded machine.
        """
        return -exit_code in CRASHES and self._reason() is None

    def _reason(self) -> str | None:
        """What somebody said about the end, the best source first."""
        if self._error is not None and not (self._serving and time.monotonic() > self._error_time + _RECENT_SECONDS):
            return self._error
        lines = self.lines()
        for pattern, sentence in (
            (_BUSY, "port {port} on {host} is already in use"),
            (_NOT_LOADED, "the model could not be loaded: {why}"),
            (_SERVICE, "tritonserver could not start its {what} service: {why}"),
            (_DRAIN, "requests were still running after the drain time and were cut off"),
            (_OPTION, "tritonserver has no option {option}"),
            (_CREATING, "tritonserver could not start: {why}"),
        ):
            for line in lines:
                if found := pattern.search(line):
                    return sentence.format(**found.groupdict())
        return None
