"""What /proc tells of processes: parents, ages, owners, and the ports that a tritonserver was told."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_USUAL_PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
_LONGEST_LINEAGE = 64


@dataclass(frozen=True)
class ServerProcess:
    """A tritonserver. A port is None where it was told not to listen."""

    pid: int
    http_port: int | None
    grpc_port: int | None
    metrics_port: int | None

    @property
    def ports(self) -> tuple[int | None, int | None, int | None]:
        return self.http_port, self.grpc_port, self.metrics_port


def words_of(pid: int) -> list[str]:
    """A process's command line; empty if there is no such process."""
    try:
        return [os.fsdecode(word) for word in (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")]
    except OSError:
        return []


def name_of(pid: int) -> str:
    try:
        return (PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return ""


def lineage(pid: int) -> Iterator[int]:
    """The process itself, its parent, and so on."""
    current: int | None = pid
    for _ in range(_LONGEST_LINEAGE):
        if not current:
            return
        yield current
        current = _parent_of(current)


def age_seconds(pid: int) -> float | None:
    """Since the process started; None if there is none."""
    try:
        ticks = int(_fields_of(pid)[19])
        return float((PROC / "uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None


def owner_of(pid: int) -> str:
    try:
        uid = (PROC / str(pid)).stat().st_uid
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
    except OSError:
        return "nobody any more"


def server_above(pid: int) -> ServerProcess | None:
    """The tritonserver that the process runs under."""
    for ancestor in lineage(pid):
        words = words_of(ancestor)
        if words and Path(words[0]).name == "tritonserver":
            return server_of(ancestor, words[1:])
    return None


def server_of(pid: int, arguments: list[str]) -> ServerProcess:
    """Ports as tritonserver reads them: `--http-port=8000` or two words; the last counts."""
    given = dict(re.findall(r"^--([\w-]+)[=\n]([^-\n].*)$", "\n".join(arguments), re.MULTILINE))

    def port(service: str) -> int | None:
        if given.get(f"allow-{service}", "true").lower() in ("false", "0"):
            return None
        text = given.get(f"{service}-port", "")
        return int(text) if text.isdigit() else _USUAL_PORTS[service]

    return ServerProcess(pid, port("http"), port("grpc"), port("metrics"))


def _parent_of(pid: int) -> int | None:
    try:
        return int(_fields_of(pid)[1]) or None
    except (OSError, IndexError, ValueError):
        return None


def _fields_of(pid: int) -> list[str]:
    """Of /proc/PID/stat, from the state on."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
