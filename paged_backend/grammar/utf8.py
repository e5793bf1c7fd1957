"""Which bytes may follow which in UTF-8: a grammar's characters are ranges of code points, and the library spells
surrogates and other bytes that are none.

Source of the table: Unicode 15, table 3-7, well-formed UTF-8 byte sequences.
"""

from __future__ import annotations

CLEAN = 0  # between characters
# 1, 2, 3: that many bytes of 80 to BF are due; the others: the first of those is bounded more closely
STATES = range(8)
_LEADS = (
    (0x00, 0x7F, CLEAN),
    (0xC2, 0xDF, 1),
    (0xE0, 0xE0, 4),
    (0xE1, 0xEC, 2),
    (0xED, 0xED, 5),
    (0xEE, 0xEF, 2),
    (0xF0, 0xF0, 6),
    (0xF1, 0xF3, 3),
    (0xF4, 0xF4, 7),
)
_DUE = {
    1: (0x80, 0xBF, CLEAN),
    2: (0x80, 0xBF, 1),
    3: (0x80, 0xBF, 2),
    4: (0xA0, 0xBF, 1),
    5: (0x80, 0x9F, 1),
    6: (0x90, 0xBF, 2),
    7: (0x80, 0x8F, 2),
}


def advance(state: int, text: bytes) -> int | None:
    """The state after more bytes; None: they cannot follow."""
    for byte in text:
        nexts = [after for low, high, after in (_LEADS if state == CLEAN else (_DUE[state],)) if low <= byte <= high]
        if not nexts:
            return None
        state = nexts[0]
    return state
