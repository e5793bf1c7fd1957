"""Where compiled kernels are kept from one start to the next."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import MutableMapping
from pathlib import Path

_VARIABLE = "TRITON_CACHE_DIR"  # the Triton language's own: where it looks and writes


def keep_kernels(environment: MutableMapping[str, str]) -> str:
    """Chooses a folder for kernels of this version of the package and of the compiler, unless TRITON_CACHE_DIR says
    otherwise; before the first kernel is compiled. Returns a sentence for the operator.
    """
    if environment.get(_VARIABLE):
        return f"compiled kernels are kept in {environment[_VARIABLE]} ({_VARIABLE})"
    version, compiler = (_version(name) for name in ("paged-backend", "triton"))
    name = f"kernels-{version}-triton-{compiler}"
    try:
        caches = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME") or Path.home(), ".cache")
        folder = Path(caches) / "paged" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} is not writable")
        num_kept = len(os.listdir(folder))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        return f"compiled kernels are not kept: {error}; {_VARIABLE} names a folder that can be written"
    environment[_VARIABLE] = str(folder)
    state = f"{num_kept} entries" if num_kept else "empty, so this start compiles them"
    return f"compiled kernels are kept in {folder} ({state})"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
