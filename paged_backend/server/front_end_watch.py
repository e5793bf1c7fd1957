"""Notices front ends that died under a tritonserver that goes on. Triton Server 2.51.0 does not: it says that the model
is ready, and fails what it gives to the dead one; and it starts none in its place.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

from paged_backend.process_id import ProcessId

_STUB = b"triton_python_backend_stub"
_POLL_SECONDS = 0.5
_REQUESTS = re.compile(r"^paged_requests\{[^}]*\} (\S+)$", re.MULTILINE)


class FrontEndWatch:
    """Looks on a thread of its own, from the moment that all are there until one has died."""

    def __init__(
        self, server: int, model: Path, is_ready: Callable[[], bool], on_death: Callable[[list[int], int], None]
    ) -> None:
        """server: tritonserver's process. model: the folder in its front ends' command lines. is_ready: the server says
        that the model is: unloading ends front ends, too. on_death: called once, with the processes of the dead and how
        many live.
        """
        self._server, self._model, self._is_ready, self._on_death = server, str(model).encode(), is_ready, on_death
        self._known = self.living()
        self._stopping = threading.Event()
        threading.Thread(target=self._run, name="front-ends", daemon=True).start()

    def living(self) -> list[ProcessId]:
        return front_ends_of(self._server, self._model)

    def close(self) -> None:
        """Returns at once."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(_POLL_SECONDS):
            dead = [front_end.pid for front_end in self._known if not front_end.alive]
            # a server that begins to stop, or to unload, has said so by then
            if not dead or self._stopping.wait(_POLL_SECONDS):
                continue
            living = self.living()
            if len(living) >= len(self._known):
                self._known = living  # the model was loaded anew
            elif self._is_ready():
                self._on_death(dead, len(living))
                return


def front_ends_of(server: int, model: bytes) -> list[ProcessId]:
    """The stub processes of tritonserver process `server` whose command lines name `model`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _is_front_end(folder, server, model):
            process = ProcessId.of(int(folder.name))
            if process is not None:
                found.append(process)
    return found


def _is_front_end(folder: Path, server: int, model: bytes) -> bool:
    try:
        parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        command = (folder / "cmdline").read_bytes() if parent == server else b""
    except (OSError, IndexError, ValueError):
        return False  # it has just gone
    return _STUB in command.split(b"\0")[0] and model in command


def num_requests(page: str) -> float | None:
    """How many run or wait, in what /metrics says; None if it does not."""
    numbers = [float(number) for number in _REQUESTS.findall(page)]
    return sum(numbers) if numbers else None
