"""Quantities as operators read them."""

from __future__ import annotations


def spell_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count} bytes"
