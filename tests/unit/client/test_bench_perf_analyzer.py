"""The folder of a perf_analyzer that was brought outlives the environment that brought it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from paged_backend.errors import EngineError
from paged_client.bench import perf_analyzer
from paged_client.bench.perf_analyzer import WHEEL_VERSION, find_perf_analyzer


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for site-packages with the nvidia-pytriton wheel."""
    site = tmp_path / "site-packages"
    (site / "pytriton").mkdir(parents=True)
    (site / "pytriton" / "__init__.py").touch()
    (site / "nvidia_pytriton.libs").mkdir()
    for name in ("libb64-98cb.so.0d", "libcudart-0952.so.12.6"):
        (site / "nvidia_pytriton.libs" / name).write_text(name)
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    monkeypatch.delitem(sys.modules, "pytriton", raising=False)
    return site


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, with a stand-in that runs once its libraries are there."""
    folder = tmp_path / "cache" / "paged" / f"perf_analyzer-{WHEEL_VERSION}"
    folder.mkdir(parents=True)
    program = folder / "perf_analyzer"
    program.write_text(
        "#!/bin/sh\nfor name in libb64.so.0d libcudart.so.12; do [ -e ${LD_LIBRARY_PATH##*:}/$name ] || exit 1; done\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(perf_analyzer.shutil, "which", lambda name: None)
    return folder


@pytest.mark.parametrize("before", ["nothing", "links into an environment that was deleted"])
def test_libraries_are_copied_and_outlive_the_environment(
    environment: Path, brought: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before != "nothing":
        (brought / "lib").mkdir()
        (brought / "lib" / "libb64.so.0d").symlink_to("/nowhere/libb64.so.0d")
    assert find_perf_analyzer(pytest.fail).executable == brought / "perf_analyzer"
    assert (brought / "lib" / "libb64.so.0d").read_text() == "libb64-98cb.so.0d"
    assert sorted(file.name for file in (brought / "lib").iterdir()) == ["libb64.so.0d", "libcudart.so.12"]
    assert not any(file.is_symlink() for file in (brought / "lib").iterdir())


def test_a_home_that_cannot_be_written_to_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").touch()  # no folder can be made in a file
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(perf_analyzer.shutil, "which", lambda name: None)
    with pytest.raises(EngineError, match=r"cannot be laid into .*cache/paged \(.+\): XDG_CACHE_HOME names another"):
        find_perf_analyzer(lambda line: None)


def test_what_stopped_pip_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an error that pip did not foresee, the traceback's last line is the one that says something."""
    said = "ERROR: Exception:\nTraceback (most recent call last):\nOSError: [Errno 28] No space left on device\n"
    finished = subprocess.CompletedProcess([], 2, stdout="", stderr=said)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(perf_analyzer.shutil, "which", lambda name: None)
    monkeypatch.setattr(perf_analyzer.subprocess, "run", lambda *command, **options: finished)
    with pytest.raises(EngineError, match="pip cannot bring tritonclient .*: OSError: .* No space left on device$"):
        find_perf_analyzer(lambda line: None)
    assert not list((tmp_path / "cache" / "paged").iterdir())
