"""What Triton Server and its front ends share: files in /dev/shm that hold prompts and answers. The server makes them
readable by every user (0644, less its umask); a front end takes that back before the first request, whoever started the
server.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_FOLDER = "/dev/shm/"


def keep_shared_memory_private() -> None:
    """Of this process: what belongs to other users stays as it is."""
    for path in shared_files():
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid():
                path.chmod(0o600)


def unlink(files: Iterable[Path]) -> None:
    """Of a server that is dead: nobody else would. Who has them mapped keeps them."""
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()


def shared_files() -> set[Path]:
    """Those that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(words[5]) for line in lines if len(words := line.split(None, 5)) == 6 and words[5].startswith(_FOLDER)}
