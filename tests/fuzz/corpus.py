"""The inputs that are kept."""

from __future__ import annotations

from pathlib import Path


def read_corpus(target: str) -> list[tuple[str, bytes]]:
    """(name, content) of each file kept for a target."""
    folder = Path(__file__).parent / "corpus" / target
    return [(path.name, path.read_bytes()) for path in sorted(folder.glob("*"))]
