"""Finds the engines that run on this machine, whoever started their server, and listens to what they publish."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import zmq

from paged_backend.engine.snapshot import WATCH_SOCKET, Snapshot, decode
from paged_backend.messages import ENGINE_NAME, MODEL_NAME, REPLICA, STANDBY
from paged_client.top.processes import PROC, age_seconds, lineage, name_of, owner_of, server_above, words_of

_MODULE = "paged_backend.engine.process"
_LONGEST_ADDRESS = 107  # bytes, of a unix socket
_LOOK_AGAIN_SECONDS = 1.0


class NoEngineError(Exception):
    """There is no engine to watch, or more than one; the text is for the user."""


@dataclass(frozen=True)
class RunningEngine:
    """An engine process. Its run folder, with the sockets, and the model's name are in its command line."""

    pid: int
    folder: Path  # as seen from here: that of a container is found under /proc/PID/root
    model_name: str = ""  # as clients call it
    replica: int | None = None  # of several of one model

    @property
    def alive(self) -> bool:
        return _engine_of(self.pid) is not None

    def belongs_to(self, pid: int) -> bool:
        """`pid` is this engine or one of its ancestors: its front end, its tritonserver."""
        return pid in lineage(self.pid)


@dataclass(frozen=True)
class Choice:
    """Which engine is wanted. None: any."""

    pid: int | None = None  # of the engine or its tritonserver
    port: int | None = None  # any of its server's
    model_name: str | None = None
    replica: int | None = None

    def fits(self, engine: RunningEngine) -> bool:
        if self.pid is not None and not engine.belongs_to(self.pid):
            return False
        if self.model_name is not None and engine.model_name != self.model_name:
            return False
        if self.replica is not None and engine.replica != self.replica:
            return False
        if self.port is None:
            return True
        server = server_above(engine.pid)
        return server is not None and self.port in server.ports

    def __str__(self) -> str:
        wanted = (
            ("process", self.pid),
            ("the server at port", self.port),
            ("model", self.model_name),
            ("replica", self.replica),
        )
        return " and ".join(f"{what} {value}" for what, value in wanted if value is not None)


def port_of(url: str) -> int:
    """The port of a server on this machine: "localhost:8001", "http://localhost:8000" or "8000".

    Raises:
        NoEngineError: it names no port, or another machine.
    """
    try:
        parts = urlsplit(url if "//" in url else f"//{url}" if not url.isdigit() else f"//localhost:{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise NoEngineError(f"--url {url}: expected HOST:PORT, any of the server's ports, such as localhost:8000")
    if not _is_here(host):
        raise NoEngineError(f"--url {url}: {host} is not this machine; run paged top where the server runs")
    return port


def _is_here(host: str) -> bool:
    """Whether a socket of this machine could have that address."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, _, _, address in found:
        with socket.socket(family, kind) as probe:
            try:
                probe.bind(address)
                return True
            except OSError:
                continue
    return False


def find_engines() -> list[RunningEngine]:
    """Those of every user; oldest first."""
    found = (_engine_of(int(place.name)) for place in PROC.iterdir() if place.name.isdigit())
    return sorted((engine for engine in found if engine is not None), key=lambda engine: engine.pid)


def choices_of_each(choice: Choice) -> list[Choice]:
    """Of a model with replicas a choice for each of them, if they are all that fits; else the choice itself."""
    engines = [engine for engine in find_engines() if choice.fits(engine)]
    servers = {None if server is None else server.pid for server in (server_above(engine.pid) for engine in engines)}
    numbers = {engine.replica for engine in engines if engine.replica is not None}
    if len(numbers) < 2 or len(numbers) < len(engines) or len(servers | {engine.model_name for engine in engines}) > 2:
        return [choice]
    return [replace(choice, replica=number) for number in sorted(numbers)]


def choose_engine(choice: Choice, last: RunningEngine | None = None) -> RunningEngine:
    """The only engine that fits. last: of several, the one that took this one's place, if there is one.

    Raises:
        NoEngineError: there is none, there are several, or it is somebody else's.
    """
    engines = [engine for engine in find_engines() if choice.fits(engine)]
    if len(engines) > 1 and last is not None:
        engines = [engine for engine in engines if engine.folder.parent.parent == last.folder.parent.parent] or engines
    if not engines:
        raise NoEngineError(
            "no engine runs on this machine: start one with paged serve"
            if choice == Choice()
            else f"{choice} has no engine here"
        )
    if len(engines) > 1:
        raise NoEngineError(
            f"{len(engines)} engines run on this machine: choose one with --model, --url, --replica or --pid\n"
            f"{listing(engines)}"
        )
    (engine,) = engines
    try:
        os.stat(engine.folder / WATCH_SOCKET)
    except PermissionError:
        raise NoEngineError(
            f"the engine runs as user {owner_of(engine.pid)}: run paged top as that user, or as root"
        ) from None
    except OSError:
        raise NoEngineError("the engine is still loading its model, or is too old to be watched: try again") from None
    return engine


def listing(engines: Sequence[RunningEngine]) -> str:
    """A table: model, ports of the server, age, process id, user."""
    rows = [("model", "replica", "HTTP", "gRPC", "metrics", "age", "pid", "user")]
    for engine in engines:
        server = server_above(engine.pid)
        ports = ["?"] * 3 if server is None else ["–" if port is None else str(port) for port in server.ports]
        rows.append(
            (
                engine.model_name or "?",
                "–" if engine.replica is None else str(engine.replica),
                *ports,
                spell_age(age_seconds(engine.pid)),
                str(engine.pid),
                owner_of(engine.pid),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def spell_age(seconds: float | None) -> str:
    """75 -> "1 min"."""
    if seconds is None:
        return "–"
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"


class Watcher:
    """A subscription to one engine: it publishes only while there is one. For one thread."""

    def __init__(self, engine: RunningEngine) -> None:
        self.engine = engine
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 4)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.subscribe(b"")
        self._socket.connect(f"ipc://{engine.folder / WATCH_SOCKET}")

    def next(self, seconds: float) -> Snapshot | None:
        """The newest snapshot; None if there was none for `seconds`."""
        newest = None
        while self._socket.poll(int(seconds * 1000) if newest is None else 0):
            newest = self._socket.recv()
        return None if newest is None else decode(newest)

    def close(self) -> None:
        self._socket.close()


@dataclass(frozen=True)
class View:
    """What is known at one moment: `snapshot` is None when the engine has been silent for a second, `engine` None when
    it is gone.
    """

    engine: RunningEngine | None
    snapshot: Snapshot | None
    trouble: str = ""


def follow(choice: Choice) -> Generator[View, None, None]:
    """Snapshots for ever, of another engine when the first is gone. To be closed, which ends the subscription."""
    watcher: Watcher | None = None
    last: RunningEngine | None = None
    try:
        while True:
            try:
                watcher = watcher or Watcher(choose_engine(choice, last))
                last = watcher.engine
                snapshot = watcher.next(_LOOK_AGAIN_SECONDS)
            except NoEngineError as error:
                time.sleep(_LOOK_AGAIN_SECONDS)
                yield View(None, None, str(error))
                continue
            except msgspec.DecodeError:
                yield View(watcher.engine if watcher else None, None, "the engine is of another version of paged")
                continue
            if snapshot is None and not watcher.engine.alive:
                watcher.close()
                watcher = None
                yield View(None, None, "the engine is gone")
            else:
                yield View(watcher.engine, snapshot)
    finally:
        if watcher is not None:
            watcher.close()


def _engine_of(pid: int) -> RunningEngine | None:
    """None if the process is no engine."""
    words = words_of(pid)
    if _MODULE not in words[:-1] or (STANDBY in words and name_of(pid) != ENGINE_NAME):
        return None
    own = words[words.index(_MODULE) + 1 :]
    names = [word.removeprefix(MODEL_NAME) for word in own if word.startswith(MODEL_NAME)]
    replicas = [word.removeprefix(REPLICA) for word in own if word.startswith(REPLICA)]
    folder = Path(next((word for word in own if not word.startswith("--")), ""))
    if not folder.is_absolute():
        return None
    number = int(replicas[0]) if replicas and replicas[0].isdecimal() else None
    return RunningEngine(pid, _seen_from_here(pid, folder), names[0] if names else "", number)


def _seen_from_here(pid: int, folder: Path) -> Path:
    root = PROC / str(pid) / "root"
    try:
        elsewhere = not os.path.samefile(root, "/")
    except OSError:  # somebody else's
        elsewhere = False
    seen_from_here = root / folder.relative_to("/") if elsewhere else folder
    return seen_from_here if len(os.fsencode(seen_from_here / WATCH_SOCKET)) <= _LONGEST_ADDRESS else folder
