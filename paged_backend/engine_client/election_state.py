"""What the front ends of a model know in common, in a file that whoever holds its folder's lock may read and replace.
Its loss is survived: election.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from paged_backend.errors import EngineError
from paged_backend.process_id import ProcessId

_NAME = "state.json"

log = logging.getLogger("paged")


class Generation(msgspec.Struct):
    """The front ends of one engine, and the engine."""

    owner: int  # the front end that restarts and ends it
    engine: ProcessId
    members: dict[int, ProcessId]  # front ends that have a seat, by number
    incarnation: int = 0
    arrivals: int = 1
    over: bool = False  # the load failed, the engine died for good or the owner left: nobody may join
    reason: str = ""  # why the load failed
    loss_said: bool = False  # a front end says that no replica has an engine any more
    # time.monotonic() of the newest ones, whoever owned the engine then; one clock for all processes of a machine
    restarts: tuple[float, ...] = ()

    def may_join(self, num_front_ends: int) -> bool:
        owner = self.members.get(self.owner)
        return (
            not self.over and self.arrivals < num_front_ends and owner is not None and owner.alive and self.engine.alive
        )

    @property
    def alive(self) -> bool:
        return self.engine.alive or any(member.alive for member in self.members.values())


class State(msgspec.Struct):
    """A generation is in it until its last front end has left."""

    newest: int = 0
    generations: dict[int, Generation] = {}


class StateFile:
    """Owns `state.json` and the lock, which is the folder's own: the file itself is replaced, never written into, so
    that nobody finds half of it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def locked(self) -> Iterator[State]:
        """The state, written back at the end, and its folder removed when nobody is left in it. A state that is lost or
        spoilt is an empty one.

        Raises:
            EngineError: the folder cannot be used: no space, no descriptors, no rights.
        """
        try:
            with self._opened():
                state = self._read()
                before = msgspec.json.encode(state)
                try:
                    yield state
                finally:
                    self._write(state, before)
        except OSError as error:
            raise EngineError(f"'{self._folder}' cannot be used: {error.strerror or error}") from error

    def abandoned(self) -> bool:
        """Nobody in it is alive. False if somebody is just writing, or if nobody knows.

        Raises:
            OSError, EngineError, msgspec.DecodeError: it is none of ours.
        """
        make_private(self._folder)
        lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = msgspec.json.decode((self._folder / _NAME).read_bytes(), type=State)
            return not any(generation.alive for generation in state.generations.values())
        finally:
            os.close(lock)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """The folder, locked. Made again if it was removed while we waited for the lock."""
        while True:
            make_private(self._folder)
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if os.path.samestat(os.fstat(lock), os.stat(self._folder)):
                        yield
                        return
                finally:
                    os.close(lock)

    def _read(self) -> State:
        try:
            return msgspec.json.decode((self._folder / _NAME).read_bytes(), type=State)
        except FileNotFoundError:
            return State()
        except msgspec.DecodeError as error:
            log.warning("'%s' is spoilt (%s): front ends write it again", self._folder / _NAME, error)
            return State()

    def _write(self, state: State, before: bytes) -> None:
        if not state.generations:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        text = msgspec.json.encode(state)
        if text != before or not (self._folder / _NAME).exists():
            new = self._folder / f"{_NAME}.new"
            new.write_bytes(text)
            new.replace(self._folder / _NAME)


def make_private(folder: Path) -> None:
    """Others on the machine must not plant a socket where we expect the engine's.

    Raises:
        EngineError: it belongs to somebody else, or others may enter it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise EngineError(f"'{folder}' is not a private folder of this user: remove it")
