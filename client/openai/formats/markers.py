"""Finds markers in text that arrives in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable


class Markers:
    """Strings that mean something. Where several begin alike, the longest is meant."""

    def __init__(self, markers: Iterable[str]) -> None:
        longest_first = sorted({marker for marker in markers if marker}, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._beginnings = {marker[:length] for marker in longest_first for length in range(1, len(marker))}
        self._longest = max(map(len, longest_first), default=0)

    def split(self, text: str) -> tuple[str, str, str]:
        """(plain text, the first marker, what follows); without a marker ("") what follows may be the beginning of one,
        and is to be given again with more text behind it."""
        found = self._any.search(text)
        if found is not None and not (found.end() == len(text) and found[0] in self._beginnings):
            return text[: found.start()], found[0], text[found.end() :]
        end = len(text) if found is None else found.start()
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                end = min(end, len(text) - length)
                break
        return text[:end], "", text[end:]

    def split_end(self, text: str) -> tuple[str, str, str]:
        """As `split` of a text after which nothing comes."""
        found = self._any.search(text)
        return (text, "", "") if found is None else (text[: found.start()], found[0], text[found.end() :])
