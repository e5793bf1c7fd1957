"""What a killed `paged serve` left is removed by the next start, as soon as its server has ended, too; nothing else
is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paged_backend.process_id import ProcessId
from paged_backend.server.scratch import Scratch, sweep

OWNER = """
import os, subprocess, sys
from paged_backend.process_id import ProcessId
from paged_backend.server.scratch import Scratch
scratch = Scratch()
heir = subprocess.Popen(["sleep", "60"], pass_fds=(scratch.lock,)) if sys.argv[1] == "heir" else None
print(scratch.folder, heir.pid if heir else 0, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def shared_memory() -> Iterator[list[Path]]:
    made: list[Path] = []
    yield made
    for path in made:
        path.unlink(missing_ok=True)


def killed_owner(folder: Path, kind: str) -> tuple[Path, int]:
    """(its folder, the process that inherited the lock) of an owner that was killed."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"TMPDIR": str(folder)},
        text=True,
    )
    assert owner.stdout is not None
    made, heir = owner.stdout.readline().split()
    owner.kill()
    owner.wait()
    return Path(made), int(heir)


def test_what_a_killed_owner_left_is_swept_with_its_shared_memory(folder: Path, shared_memory: list[Path]) -> None:
    left, _ = killed_owner(folder, "alone")
    shared_memory += [Path(f"/dev/shm/{left.name}-region"), Path(f"/dev/shm/{left.name}x-region")]
    for path in shared_memory:
        path.touch()
    assert sweep() == [left]
    assert not left.exists()
    assert [path.exists() for path in shared_memory] == [False, True]


def test_what_is_in_use_stays(folder: Path) -> None:
    mine = Scratch()
    inherited, heir = killed_owner(folder, "heir")
    assert sweep() == []
    heir_id = ProcessId.of(heir)
    assert heir_id is not None
    os.kill(heir, signal.SIGKILL)
    while heir_id.alive:
        time.sleep(0.01)
    assert sweep() == [inherited]
    assert mine.folder.exists()
    mine.remove()
    assert list(folder.iterdir()) == []


def test_other_folders_and_links_stay(folder: Path) -> None:
    target = folder / "elsewhere"
    target.mkdir()
    (target / "in-use").touch()
    (folder / "paged-serve-link").symlink_to(target)
    (folder / "paged-serve-no-lock").mkdir()
    assert sweep() == []
    assert len(list(folder.iterdir())) == 3
