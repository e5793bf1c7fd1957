"""Quantities as operators read and write them."""

from __future__ import annotations

import re

_SCALES = {"b": 1}
for _power, _letter in enumerate("kmgt", 1):
    _SCALES[f"{_letter}b"] = 1000**_power
    _SCALES[f"{_letter}ib"] = 1024**_power


def spell_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count} bytes"


def read_bytes(text: str) -> int:
    """ "4GiB" -> 4294967296; also "1.5 gib", "500 MB" (of 1000) and plain "4294967296".

    Raises:
        ValueError: it is no number of bytes, or its unit is ambiguous; the sentence says what to write.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    scale = _SCALES.get(found[2] or "b") if found else None
    if found is None or scale is None or not (size := float(found[1]) * scale).is_integer():
        raise ValueError("expected a number of bytes, such as 4GiB, 512MiB or 4000000000")
    return int(found[1]) if scale == 1 and found[1].isdigit() else int(size)
