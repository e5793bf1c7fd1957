"""Which front end starts the engine: those of one model initialise in parallel, in any order, and must end up with one engine.

A private folder per model holds a state file; whoever holds its lock reads it and takes a seat. Front ends come in *generations*: a reload
starts a new one while the old one still drains, and an engine that failed to load leaves nothing behind for the next attempt.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from paged_backend.errors import EngineError

_LONGEST_ADDRESS = 100  # bytes of an ipc address; sockaddr_un ends at 107


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


class Incarnation(msgspec.Struct, frozen=True):
    """An engine process. When it dies, the next one takes its place, in a folder of its own."""

    number: int
    engine: ProcessId


class _Generation(msgspec.Struct):
    """The front ends of one engine."""

    owner: ProcessId
    engine: ProcessId
    incarnation: int = 0
    arrivals: int = 1
    departures: int = 0
    over: bool = False  # the load failed, the engine died or the owner left: nobody may join
    reason: str = ""  # why the load failed

    def may_join(self, num_front_ends: int) -> bool:
        return not self.over and self.arrivals < num_front_ends and self.owner.alive and self.engine.alive


class _State(msgspec.Struct):
    """The state file. A generation is in it until its last front end has left."""

    newest: int = 0
    generations: dict[int, _Generation] = {}


@dataclass(frozen=True)
class Seat:
    """A front end's place: its number among those of one engine, and where their sockets are."""

    folder: Path  # private to the user
    generation: int
    front_end: int
    first: Incarnation
    owner: bool  # this front end started the engine, and ends it

    def folder_of(self, incarnation: Incarnation) -> Path:
        """Holds engine.sock and one socket per front end."""
        return self.folder / str(incarnation.number)

    def folder_after(self, incarnation: Incarnation) -> Path:
        """Of the engine that takes its place."""
        return self.folder / str(incarnation.number + 1)


class Election:
    """The front ends of one model in one server. `key` names both."""

    def __init__(self, key: str, num_front_ends: int) -> None:
        self._folder = _temporary_folder() / f"paged-{os.getuid()}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        self._num_front_ends = num_front_ends

    def take_seat(self, start_engine: Callable[[Path], int]) -> Seat:
        """Joins the newest generation if it has a seat left, else opens the next and starts its engine.

        start_engine: given a folder of its own, starts the engine there and returns its process number. Called under the lock, so it must
        not wait for the engine to load.

        Raises:
            EngineError: the folder for the sockets is not ours alone, or the engine cannot be started.
        """
        with self._locked() as state:
            generation = state.generations.get(state.newest)
            if generation is not None and generation.may_join(self._num_front_ends):
                generation.arrivals += 1
                owner = False
            else:
                state.newest += 1
                generation = state.generations[state.newest] = self._open_generation(state.newest, start_engine)
                owner = True
            first = Incarnation(generation.incarnation, generation.engine)
            return Seat(self._folder / str(state.newest), state.newest, generation.arrivals - 1, first, owner)

    def _open_generation(self, number: int, start_engine: Callable[[Path], int]) -> _Generation:
        _sweep(self._folder)
        folder = self._folder / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        try:
            engine = _start(folder, 0, start_engine)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        owner = ProcessId.of(os.getpid())
        assert owner is not None
        return _Generation(owner, engine)

    def restart(self, seat: Seat, start_engine: Callable[[Path], int]) -> Incarnation:
        """The owner starts the next engine, in a new folder. The dead one's stays, for front ends that look later who was there; the one before that goes.

        Raises:
            EngineError: the engine cannot be started.
        """
        with self._locked() as state:
            generation = state.generations.get(seat.generation)
            if generation is None:
                raise EngineError(f"'{self._folder}' was removed while its engine ran")
            shutil.rmtree(seat.folder / str(generation.incarnation - 1), ignore_errors=True)
            generation.incarnation += 1
            generation.engine = _start(seat.folder, generation.incarnation, start_engine)
            return Incarnation(generation.incarnation, generation.engine)

    def current(self, seat: Seat) -> Incarnation | None:
        """The engine that the seat's generation has now; None if it will have none any more."""
        with self._locked() as state:
            generation = state.generations.get(seat.generation)
            if generation is None or generation.over or not generation.owner.alive:
                return None
            return Incarnation(generation.incarnation, generation.engine)

    def end(self, seat: Seat, reason: str = "") -> str | None:
        """Nobody joins the seat's generation from now on. The reason it was ended for before, or None if it was not."""
        with self._locked() as state:
            generation = state.generations.get(seat.generation)
            if generation is None:
                return None
            if generation.over:
                return generation.reason
            generation.over = True
            generation.reason = reason
        return None

    def leave(self, seat: Seat) -> None:
        """Gives the seat up; the last one removes the generation's sockets. To be called once."""
        with self._locked() as state:
            generation = state.generations.get(seat.generation)
            if generation is None:
                return
            generation.departures += 1
            if generation.departures == generation.arrivals and generation.over:
                del state.generations[seat.generation]
                shutil.rmtree(seat.folder, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[_State]:
        """The state, written back at the end, and its folder removed when nobody is left in it.

        Raises:
            EngineError: the folder cannot be used: no space, no descriptors, no rights.
        """
        try:
            with self._held() as state:
                yield state
        except OSError as error:
            raise EngineError(f"'{self._folder}' cannot be used: {error.strerror or error}") from error

    @contextmanager
    def _held(self) -> Iterator[_State]:
        with self._opened() as file:
            file.seek(0)
            text = file.read()
            state = msgspec.json.decode(text, type=_State) if text else _State()
            try:
                yield state
            finally:
                written = msgspec.json.encode(state)
                if written != text:
                    file.truncate(0)
                    file.write(written)
                    file.flush()
                if not state.generations:
                    shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        """The state file, locked. Opened again if it was removed while we waited for the lock."""
        while True:
            _make_private(self._folder)
            try:
                file = (self._folder / "state.json").open("a+b")
            except FileNotFoundError:
                continue
            with file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_nlink:
                    yield file
                    return


def _start(folder: Path, incarnation: int, start_engine: Callable[[Path], int]) -> ProcessId:
    own = folder / str(incarnation)
    own.mkdir(mode=0o700)
    pid = start_engine(own)
    return ProcessId.of(pid) or ProcessId(pid, -1)  # an engine that died at once is noticed like one that dies later


def _sweep(mine: Path) -> None:
    """Removes what killed servers of this user left behind."""
    for folder in mine.parent.glob(f"paged-{os.getuid()}-*"):
        if folder == mine:
            continue
        try:
            _make_private(folder)
            with (folder / "state.json").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                state = msgspec.json.decode(file.read(), type=_State)
                if not any(generation.owner.alive or generation.engine.alive for generation in state.generations.values()):
                    shutil.rmtree(folder, ignore_errors=True)
        except (OSError, msgspec.DecodeError, EngineError):
            continue  # somebody is just writing it, or it is none of ours


def _temporary_folder() -> Path:
    """The system's, unless its name is too long for a socket's address."""
    folder = Path(tempfile.gettempdir())
    longest = folder / f"paged-{os.getuid()}-{'0' * 12}" / "9999" / "9999" / "front_end_9999.sock"
    return folder if len(str(longest)) + len("ipc://") <= _LONGEST_ADDRESS else Path("/tmp")


def _make_private(folder: Path) -> None:
    """Others on the machine must not plant a socket where we expect the engine's."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise EngineError(f"'{folder}' is not a private folder of this user: remove it")
