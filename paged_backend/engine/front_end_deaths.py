"""Front ends that died without a goodbye, as the engine hears of it: a thread looks at their processes twice a
second.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from paged_backend.process_id import ProcessId

_POLL_SECONDS = 0.5


class FrontEndDeaths:
    """Looks from the moment it is made until the process ends."""

    def __init__(self) -> None:
        self._processes: dict[int, ProcessId] = {}
        self._noticed: deque[tuple[int, ProcessId]] = deque()
        threading.Thread(target=self._look, name="front-end-deaths", daemon=True).start()

    def watch(self, front_end: int, process: ProcessId) -> None:
        self._processes[front_end] = process

    def forget(self, front_end: int) -> None:
        """It said goodbye."""
        self._processes.pop(front_end, None)

    def next_one(self) -> tuple[int, ProcessId] | None:
        """Each is told once. None: no other was noticed so far; costs nothing to ask."""
        return self._noticed.popleft() if self._noticed else None

    def _look(self) -> None:
        while True:
            time.sleep(_POLL_SECONDS)
            for front_end, process in list(self._processes.items()):
                if not process.alive and self._processes.pop(front_end, None) is not None:
                    self._noticed.append((front_end, process))
