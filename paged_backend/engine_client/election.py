"""Which front end owns the engine: those of one model initialise in parallel, in any order, and must end up with one
engine and one that looks after it.

A private folder per model holds a state file; whoever holds its lock reads it and takes a seat. The first starts the
engine and owns it. When an owner dies, the living front end of the lowest number inherits the engine, which goes on.
Front ends come in *generations*: a reload starts a new one while the old one still drains, and an engine that failed to
load leaves nothing behind for the next attempt.

Each front end keeps what it saw last. If the file is lost, to a cleaner of temporary files or a full disk, the next one
that looks writes it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from paged_backend.engine_client.election_state import Generation, State, StateFile
from paged_backend.errors import EngineError
from paged_backend.process_id import ProcessId

_MAX_REMEMBERED_RESTARTS = 1000
_LONGEST_ADDRESS = 100  # bytes of an ipc address; sockaddr_un ends at 107


class Incarnation(msgspec.Struct, frozen=True):
    """An engine process. When it dies, the next one takes its place, in a folder of its own."""

    number: int
    engine: ProcessId


@dataclass(frozen=True)
class Seat:
    """A front end's place: its number among those of one engine, and where their sockets are."""

    folder: Path  # private to the user
    generation: int
    front_end: int
    first: Incarnation

    def folder_of(self, incarnation: Incarnation) -> Path:
        """Holds engine.sock and one socket per front end."""
        return self.folder / str(incarnation.number)

    def folder_after(self, incarnation: Incarnation) -> Path:
        """Of the engine that takes its place."""
        return self.folder / str(incarnation.number + 1)


@dataclass(frozen=True)
class Outlook:
    """How things stand in a seat's generation."""

    incarnation: Incarnation
    owner: int  # the front end that restarts and ends the engine
    owner_process: ProcessId
    restarts: tuple[float, ...]  # time.monotonic() of each, the newest at the end


class Election:
    """The front ends of one model in one server. `key` names both."""

    def __init__(self, key: str, num_front_ends: int) -> None:
        self._folder = _temporary_folder() / f"paged-{os.getuid()}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        self._file = StateFile(self._folder)
        self._num_front_ends = num_front_ends
        self._seen: Generation | None = None  # as it was when we looked last

    def take_seat(self, start_engine: Callable[[Path], int]) -> Seat:
        """Joins the newest generation if it has a seat left, else opens the next and starts its engine.

        start_engine: given a folder of its own, starts the engine there and returns its process number. Called under
        the lock, so it must not wait for the engine to load.

        Raises:
            EngineError: the folder for the sockets is not ours alone, or the engine cannot be started.
        """
        with self._file.locked() as state:
            generation = state.generations.get(state.newest)
            if generation is not None and generation.may_join(self._num_front_ends):
                generation.members[generation.arrivals] = _ourselves()
                generation.arrivals += 1
            else:
                state.newest += 1
                generation = state.generations[state.newest] = self._open_generation(state.newest, start_engine)
            self._seen = generation
            first = Incarnation(generation.incarnation, generation.engine)
            return Seat(self._folder / str(state.newest), state.newest, generation.arrivals - 1, first)

    def _open_generation(self, number: int, start_engine: Callable[[Path], int]) -> Generation:
        _sweep(self._folder)
        folder = self._folder / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            engine = _start(folder, 0, start_engine)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Generation(0, engine, {0: _ourselves()})

    def restart(self, seat: Seat, start_engine: Callable[[Path], int]) -> Incarnation:
        """The owner starts the next engine, in a new folder. The dead one's stays, for front ends that look later who
        was there; the one before that goes.

        Raises:
            EngineError: the engine cannot be started.
        """
        with self._file.locked() as state:
            generation = self._of(state, seat)
            shutil.rmtree(seat.folder / str(generation.incarnation - 1), ignore_errors=True)
            generation.incarnation += 1
            generation.restarts = (*generation.restarts, time.monotonic())[-_MAX_REMEMBERED_RESTARTS:]
            generation.engine = _start(seat.folder, generation.incarnation, start_engine)
            return Incarnation(generation.incarnation, generation.engine)

    def look(self, seat: Seat) -> Outlook | None:
        """How things stand; None if there will be no engine any more. If the owner died, somebody who lives is told as
        owner.

        Raises:
            EngineError: the folder cannot be used.
        """
        with self._file.locked() as state:
            generation = self._of(state, seat)
            if generation.over:
                return None
            generation.members = {number: member for number, member in generation.members.items() if member.alive}
            if generation.owner not in generation.members:
                generation.owner = min(generation.members)  # the one that the engine tells its numbers to
            newest = Incarnation(generation.incarnation, generation.engine)
            return Outlook(newest, generation.owner, generation.members[generation.owner], generation.restarts)

    def keep_fresh(self, seat: Seat) -> None:
        """Cleaners of temporary files take what is old."""
        with contextlib.suppress(EngineError):
            self.look(seat)
        for path in (self._folder, *self._folder.glob("*"), *seat.folder.rglob("*")):
            with contextlib.suppress(OSError):
                os.utime(path)

    def end(self, seat: Seat, reason: str = "") -> str | None:
        """Nobody joins the seat's generation from now on. The reason it was ended for before, or None if it was not."""
        with self._file.locked() as state:
            generation = self._of(state, seat)
            if generation.over:
                return generation.reason
            generation.over = True
            generation.reason = reason
        return None

    def tells_loss(self, seat: Seat) -> bool:
        """True for the first front end that asks.

        Raises:
            EngineError: the folder cannot be used.
        """
        with self._file.locked() as state:
            generation = self._of(state, seat)
            first, generation.loss_said = not generation.loss_said, True
        return first

    def leave(self, seat: Seat) -> None:
        """Gives the seat up; the last one removes the generation's sockets. To be called once."""
        with self._file.locked() as state:
            generation = state.generations.get(seat.generation)
            if generation is None:
                return
            generation.members.pop(seat.front_end, None)
            if not any(member.alive for member in generation.members.values()):
                del state.generations[seat.generation]
                shutil.rmtree(seat.folder, ignore_errors=True)

    def _of(self, state: State, seat: Seat) -> Generation:
        """The seat's generation, as it was seen last if the file has lost it."""
        assert self._seen is not None
        seen = self._seen
        generation = self._seen = state.generations.setdefault(seat.generation, seen)
        if seen.incarnation > generation.incarnation:  # written again by a front end that knew less
            generation.incarnation, generation.engine, generation.restarts = (
                seen.incarnation,
                seen.engine,
                seen.restarts,
            )
        generation.members[seat.front_end] = _ourselves()
        state.newest = max(state.newest, seat.generation)
        return generation


def _ourselves() -> ProcessId:
    process = ProcessId.of(os.getpid())
    assert process is not None
    return process


def _start(folder: Path, incarnation: int, start_engine: Callable[[Path], int]) -> ProcessId:
    """folder: the generation's, made again if it was swept."""
    folder.mkdir(mode=0o700, exist_ok=True)
    own = folder / str(incarnation)
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(mode=0o700)
    pid = start_engine(own)
    return ProcessId.of(pid) or ProcessId(pid, -1)  # an engine that died at once is noticed like one that dies later


def _sweep(mine: Path) -> None:
    """Removes what killed servers of this user left behind."""
    for folder in mine.parent.glob(f"paged-{os.getuid()}-*"):
        if folder == mine:
            continue
        try:
            if StateFile(folder).abandoned():
                shutil.rmtree(folder, ignore_errors=True)
        except (OSError, msgspec.DecodeError, EngineError):
            continue  # somebody is just writing it, or it is none of ours


def _temporary_folder() -> Path:
    """The system's, unless its name is too long for a socket's address."""
    folder = Path(tempfile.gettempdir())
    longest = folder / f"paged-{os.getuid()}-{'0' * 12}" / "9999" / "9999" / "front_end_9999.sock"
    return folder if len(str(longest)) + len("ipc://") <= _LONGEST_ADDRESS else Path("/tmp")
