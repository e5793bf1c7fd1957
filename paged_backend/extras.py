"""The packages that an optional part of paged needs, and the command that installs them from wherever the user is."""

from __future__ import annotations

import shlex
from importlib import metadata

DISTRIBUTION = "paged-backend"


def install_command(extra: str) -> str:
    """`pip install …` with the packages of an extra of pyproject.toml.

    The packages are named one by one: `paged-backend[extra]` can be found by pip only in a folder that holds the
    sources, and the user may be in another, or may have none.
    """
    packages = packages_of(extra)
    if not packages:
        return f"pip install '.[{extra}]' in the folder of paged's sources"
    return "pip install " + " ".join(map(shlex.quote, packages))


def packages_of(extra: str) -> list[str]:
    """Requirements as pip takes them, for this Python and platform; none if paged is not installed as a
    distribution.
    """
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            requirement.marker = None
            found.append(str(requirement))
    return found
