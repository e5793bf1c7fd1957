"""Processes by number and start, so that none is mistaken for a later one."""

from __future__ import annotations

from pathlib import Path

import msgspec


class ProcessId(msgspec.Struct, frozen=True):
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    started: int  # clock ticks after boot, from /proc

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """None if there is no such process, or only its exit status is left."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        return ProcessId.of(self.pid) == self
