"""Finds perf_analyzer, or brings the one in the tritonclient wheel, and prepares what it needs to run.

The 2.50.0 wheel is the newest whose binary was seen to run on Debian 12 and Ubuntu 22.04 as it is; later ones want
glibc 2.38 or ship none.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from paged_backend.errors import EngineError
from paged_backend.extras import install_command

WHEEL_VERSION = "2.50.0"
_WHEEL_PLATFORM = "manylinux1_x86_64"
_BINARY = f"tritonclient-{WHEEL_VERSION}.data/data/bin/perf_analyzer"
# wanted name -> file in the nvidia-pytriton wheel
_LIBRARIES = {"libb64.so.0d": "libb64-*.so*", "libcudart.so.12": "libcudart-*.so*"}
_DOWNLOAD_SECONDS = 600
_CHECK_SECONDS = 30

# perf_analyzer 2.50 keeps an output that a response lacks as an array of no bytes and then exports the bytes that
# happen to lie there as a number. Where they are a NaN its JSON writer stops and the export ends in the middle: seen in
# 2 of 12 runs of 64 streams. Zeros are no NaN.
_ZEROED = """
#include <stdlib.h>
void *_Znam(size_t size) { void *memory = calloc(1, size ? size : 8); if (!memory) abort(); return memory; }
"""


@dataclass(frozen=True)
class PerfAnalyzer:
    """A perf_analyzer that runs. `found` says where it comes from, for the report."""

    executable: Path
    environment: Mapping[str, str]
    found: str
    may_cut_exports: bool  # no C compiler was there for the remedy: exports may end in the middle


def find_perf_analyzer(say: Callable[[str], None]) -> PerfAnalyzer:
    """The perf_analyzer on PATH, else the one in the user's cache folder, else brought there from the tritonclient
    wheel.

    Raises:
        EngineError: there is none for this machine, it cannot be downloaded, or a library that it needs is missing.
    """
    on_path = shutil.which("perf_analyzer")
    folder = cache_folder() / f"perf_analyzer-{WHEEL_VERSION}"
    if on_path is not None:
        executable, found = Path(on_path), f"{on_path} (PATH)"
    else:
        if not (folder / "perf_analyzer").is_file():
            say(f"paged: bringing perf_analyzer from the tritonclient {WHEEL_VERSION} wheel to {folder}")
            _bring(folder)
        _copy_libraries(folder / "lib")
        executable, found = folder / "perf_analyzer", f"tritonclient {WHEEL_VERSION} wheel"
    environment = dict(os.environ)
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(
        filter(None, [environment.get("LD_LIBRARY_PATH"), str(folder / "lib")])
    )
    _require_that_it_runs(executable, environment)
    zeroed = _zeroed_library()
    if zeroed is not None:
        environment["LD_PRELOAD"] = " ".join(filter(None, [environment.get("LD_PRELOAD"), str(zeroed)]))
    return PerfAnalyzer(executable, environment, found, zeroed is None)


def cache_folder() -> Path:
    """Where brought programs stay: `$XDG_CACHE_HOME/paged`, `~/.cache/paged` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paged"


def _bring(folder: Path) -> None:
    """Downloads the wheel with pip and lays the binary into `folder`, all or nothing."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise EngineError(
            f"no perf_analyzer on PATH, and the tritonclient wheel has none for {sys.platform} on {platform.machine()}"
        )
    if importlib.util.find_spec("pip") is None:
        raise EngineError(
            "no perf_analyzer on PATH, and no pip in this environment to bring it with: python -m ensurepip"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _lay(folder)
    except OSError as error:  # a home without room, or read-only
        raise EngineError(
            f"no perf_analyzer on PATH, and it cannot be laid into {folder.parent} ({error.strerror}): "
            "XDG_CACHE_HOME names another place"
        ) from None


def _lay(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="bringing-") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        executable = made / "perf_analyzer"
        with zipfile.ZipFile(_download(Path(temporary))) as wheel:
            executable.write_bytes(wheel.read(_BINARY))
        executable.chmod(0o755)
        try:
            made.rename(folder)
        except OSError:  # another run brought it meanwhile
            if not (folder / "perf_analyzer").is_file():
                raise


def _download(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--platform",
        _WHEEL_PLATFORM,
    ]
    try:
        finished = subprocess.run(
            [*command, "--dest", str(folder), f"tritonclient=={WHEEL_VERSION}"],
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"no perf_analyzer on PATH, and pip did not bring tritonclient {WHEEL_VERSION} within {_DOWNLOAD_SECONDS} s"
        ) from None
    if finished.returncode != 0:
        lines = [line for line in finished.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR: ") and line != "ERROR: Exception:"] or lines
        raise EngineError(
            f"no perf_analyzer on PATH, and pip cannot bring tritonclient {WHEEL_VERSION}: "
            f"{errors[-1] if errors else 'see pip'}"
        )
    return next(folder.glob("tritonclient-*.whl"))


def _copy_libraries(folder: Path) -> None:
    """Those that are not there yet of two that Debian does not have under these names, from the nvidia-pytriton wheel,
    if it is installed. No links: the environment that the wheel is in may be deleted, and the folder stays.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        return
    libraries = Path(spec.origin).parents[1] / "nvidia_pytriton.libs"
    for name, pattern in _LIBRARIES.items():
        for file in sorted(libraries.glob(pattern))[:1]:
            if not (folder / name).is_file():
                folder.mkdir(exist_ok=True)
                with tempfile.TemporaryDirectory(dir=folder) as temporary:  # whole or not at all
                    Path(shutil.copy(file, Path(temporary) / name)).replace(folder / name)


def _require_that_it_runs(executable: Path, environment: Mapping[str, str]) -> None:
    try:
        tried = subprocess.run(
            [executable, "--version"],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=_CHECK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"perf_analyzer does not run: {error}") from None
    if tried.returncode != 0:
        why = (tried.stderr.strip().splitlines() or ["no message"])[-1]
        remedy = (
            f": {install_command('serve')} brings libb64 and libcudart"
            if any(name in why for name in _LIBRARIES)
            else ""
        )
        raise EngineError(f"perf_analyzer does not run: {why.removeprefix(str(executable)).lstrip(': ')}{remedy}")


def _zeroed_library() -> Path | None:
    """A library that makes perf_analyzer's byte arrays start as zeros; compiled once. None without a C compiler."""
    library = cache_folder() / "perf_analyzer-zeroed-1.so"
    if library.is_file():
        return library
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="compiling-") as temporary:
        made = Path(temporary) / library.name
        command = [compiler, "-shared", "-fPIC", "-O2", "-x", "c", "-", "-o", str(made)]
        if subprocess.run(command, input=_ZEROED, text=True, capture_output=True, check=False).returncode != 0:
            return None
        made.rename(library)
    return library
