"""Finds the engines that run on this machine, whoever started their server, and listens to what they publish."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from paged_backend.messages import ENGINE_NAME, MODEL_NAME, STANDBY
from paged_backend.snapshot import WATCH_SOCKET, Snapshot, decode

_PROC = Path("/proc")
_MODULE = "paged_backend.engine_process"
_LONGEST_ADDRESS = 107  # bytes, of a unix socket
_LOOK_AGAIN_SECONDS = 1.0


class NoEngineError(Exception):
    """There is no engine to watch, or more than one; the sentence is for the user."""


@dataclass(frozen=True)
class RunningEngine:
    """An engine process. Its run folder, with the sockets, is in its command line."""

    pid: int
    folder: Path  # as seen from here: that of a container is found under /proc/PID/root

    @property
    def alive(self) -> bool:
        return _folder_of(self.pid) is not None

    def belongs_to(self, pid: int) -> bool:
        """`pid` is this engine or one of its ancestors: its front end, its tritonserver."""
        ancestor: int | None = self.pid
        while ancestor and ancestor != pid:
            ancestor = _parent_of(ancestor)
        return ancestor == pid


def find_engines() -> list[RunningEngine]:
    """Those of every user; oldest first."""
    found = []
    for place in _PROC.iterdir():
        if place.name.isdigit() and (folder := _folder_of(int(place.name))) is not None:
            found.append(RunningEngine(int(place.name), folder))
    return sorted(found, key=lambda engine: engine.pid)


def choose_engine(pid: int | None) -> RunningEngine:
    """The only engine, or the only one that belongs to `pid`.

    Raises:
        NoEngineError: there is none, there are several, or it is somebody else's.
    """
    engines = [engine for engine in find_engines() if pid is None or engine.belongs_to(pid)]
    if not engines:
        raise NoEngineError("no engine runs on this machine: start one with paged serve" if pid is None else f"process {pid} has no engine")
    if len(engines) > 1:
        listing = ", ".join(str(engine.pid) for engine in engines)
        raise NoEngineError(f"{len(engines)} engines run on this machine: choose one with --pid ({listing})")
    (engine,) = engines
    try:
        os.stat(engine.folder / WATCH_SOCKET)
    except PermissionError:
        raise NoEngineError(f"the engine runs as user {_owner_of(engine.pid)}: run paged top as that user, or as root") from None
    except OSError:
        raise NoEngineError("the engine is still loading its model, or is too old to be watched: try again") from None
    return engine


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
    """What is known at one moment: `snapshot` is None when the engine has been silent for a second, `engine` None when it is gone."""

    engine: RunningEngine | None
    snapshot: Snapshot | None
    trouble: str = ""


def follow(pid: int | None) -> Generator[View, None, None]:
    """Snapshots for ever, of another engine when the first is gone. To be closed, which ends the subscription."""
    watcher: Watcher | None = None
    try:
        while True:
            try:
                watcher = watcher or Watcher(choose_engine(pid))
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


def _folder_of(pid: int) -> Path | None:
    """An engine's run folder; None if the process is no engine."""
    try:
        arguments = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    words = [os.fsdecode(argument) for argument in arguments]
    if _MODULE not in words[:-1] or (STANDBY in words and _name_of(pid) != ENGINE_NAME):
        return None
    folder = Path(next(word for word in words[words.index(_MODULE) + 1 :] if not word.startswith(MODEL_NAME)))
    if not folder.is_absolute():
        return None
    root = _PROC / str(pid) / "root"
    try:
        elsewhere = not os.path.samefile(root, "/")
    except OSError:  # somebody else's
        elsewhere = False
    seen_from_here = root / folder.relative_to("/") if elsewhere else folder
    return seen_from_here if len(os.fsencode(seen_from_here / WATCH_SOCKET)) <= _LONGEST_ADDRESS else folder


def _name_of(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return ""


def _parent_of(pid: int) -> int | None:
    try:
        return int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1]) or None
    except OSError:
        return None


def _owner_of(pid: int) -> str:
    try:
        uid = (_PROC / str(pid)).stat().st_uid
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
    except OSError:
        return "nobody any more"
