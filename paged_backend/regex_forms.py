r"""Regular expressions that the grammar library would read as something else: it takes an escape that it does not know for the letter, and ignores anchors
in the middle, with a warning where nobody looks. What it refuses by itself (lookaround, back references, `\b`) is not checked here."""

from __future__ import annotations

import re

_ESCAPES = "dDsSwWnrtfv" + "bBckpPux"  # it knows the first, and refuses the others
_PIECE = re.compile(r"\\(?P<escape>.)|\[\^?\]?(?:\\.|[^\]\\])*\]|(?P<anchor>[$^])|.", re.DOTALL)


def misread(regex: str) -> str | None:
    """What of it would be read as something else, for the caller; None: nothing."""
    for piece in _PIECE.finditer(regex):
        escape, anchor = piece["escape"], piece["anchor"]
        if escape and escape.isascii() and escape.isalpha() and escape not in _ESCAPES:
            return f"'\\{escape}' is not supported"
        start, end = piece.span()
        if anchor == "^" and start and not regex.endswith(("|", "(", "(?:"), 0, start):
            return "'^' is supported at the beginning only"
        if anchor == "$" and end < len(regex) and not regex.startswith(("|", ")"), end):
            return "'$' is supported at the end only"
    return None
