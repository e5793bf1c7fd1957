"""What a start leaves for later: graphs of steps that are captured while the engine serves.

A capture computes nothing on the device, but its hundreds of launches take the host some tens of milliseconds, in which
it launches no step. One graph is captured at a time: that bounds how long a stream waits for its next token. While
sequences run, at least four times as long is spent on their steps before the next one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from paged_backend.runner.cuda_graphs import StepGraphs

_SHARE_WHILE_BUSY = 0.2  # of the time

log = logging.getLogger("paged")


class LaterCaptures:
    """Captures what `graphs` has left, one graph a call, and says so when that was the last."""

    def __init__(
        self, graphs: StepGraphs, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._graphs, self._tell, self._clock = graphs, tell, clock
        self._num_shapes = graphs.num_waiting
        self._begun = clock()
        self._next = 0.0  # no capture before, while sequences run
        self._num_graphs = 0
        self._seconds = self._longest = 0.0
        self.done = False

    @torch.inference_mode()
    def advance(self, busy: bool) -> bool:
        """Captures one graph; False if there was none to capture, or not now. busy: sequences run."""
        started = self._clock()
        if self.done or (busy and started < self._next):
            return False
        try:
            captured = self._graphs.capture_next()
        except RuntimeError as error:  # torch's words or the driver's; what is captured already goes on working
            self._give_up(error)
            return False
        if not captured:
            self._finish()
            return False
        ended = self._clock()
        taken = ended - started
        self._num_graphs += 1
        self._seconds += taken
        self._longest = max(self._longest, taken)
        self._next = ended + taken * (1 / _SHARE_WHILE_BUSY - 1)
        return True

    def _finish(self) -> None:
        self.done = True
        self._tell(
            f"all shapes of steps captured: {self._num_shapes} while serving, {self._num_graphs} graphs in "
            f"{self._seconds:.1f} s, {self._clock() - self._begun:.1f} s after the start, "
            f"none longer than {1000 * self._longest:.0f} ms"
        )

    def _give_up(self, error: RuntimeError) -> None:
        self.done = True
        num_left = self._graphs.num_waiting + 1
        self._graphs.give_up()
        log.warning(
            "warning: %d shapes of steps are not captured (%s): they run in larger shapes or kernel by kernel, slower",
            num_left,
            (str(error).splitlines() or [type(error).__name__])[0],
            exc_info=None if "out of memory" in str(error).lower() else error,
        )
