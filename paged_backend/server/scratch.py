"""A server's folder for temporary files, its shared memory, and what is left of both when nobody was there to remove
them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "paged-serve-"
_LOCK = "in-use"
_SHARED_MEMORY = Path("/dev/shm")


class Scratch:
    """Owns a new folder, and the files in /dev/shm whose names begin as it is called.

    Invariant: a file in the folder is locked until `remove`; if this process is killed, until the last process has gone
        that inherited `lock`.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        new = self.folder / f"{_LOCK}.new"  # under its name it is locked already
        self.lock = os.open(new, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(self.folder / _LOCK)

    @property
    def shm_prefix(self) -> str:
        """How the names of its files in /dev/shm begin."""
        return _shm_prefix(self.folder)

    def remove(self) -> None:
        _remove(self.folder)
        os.close(self.lock)


def sweep() -> list[Path]:
    """Removes what servers of this user left whose `paged serve` was killed, and that have ended themselves. Returns
    their folders.
    """
    swept = []
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            about = folder.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)
                swept.append(folder)
            finally:
                os.close(lock)
    return swept


def _shm_prefix(folder: Path) -> str:
    return f"{folder.name}-"


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for region in _SHARED_MEMORY.glob(f"{_shm_prefix(folder)}*"):
        with suppress(OSError):
            region.unlink()
