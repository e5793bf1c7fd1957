"""What of a regular expression xgrammar reads otherwise than it is meant: it ignores anchors inside, takes an escape
that it does not know as its letter, and inline flags for a group.

Found by what xgrammar 0.2.8 makes of each escape, and of anchors in every place. What it refuses itself (lookarounds,
references, word boundaries) is let by.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

_TOKEN = re.compile(
    r"(?P<escape>\\.)|(?P<set>\[(?:\\.|[^\]\\])*\])|(?P<flags>\(\?[a-zA-Z-]+[:)])|(?P<open>\((?:\?(?:[:=!]|<[=!]|P?<\w+>))?)|(?P<close>\))|(?P<other>.)",
    re.DOTALL,
)
_KNOWN = re.compile(r"\\([abcdefknprstuvwxBDPSW]|0(?!\d)|[1-9]|[^A-Za-z0-9])", re.DOTALL)
_KNOWN_IN_SET = re.compile(_KNOWN.pattern.replace("B", ""), re.DOTALL)


def misread(regex: str) -> str | None:
    """The first part that the library reads otherwise, as a clause for the caller; None: there is none. Time is linear
    in the length.
    """
    tokens = list(_TOKEN.finditer(regex))
    for token in tokens:
        if token.lastgroup == "flags":
            return (
                f"the inline flag '{token[0]}' at position {token.start() + 1} of the regular expression is not "
                "supported"
            )
        known = _KNOWN_IN_SET if token.lastgroup == "set" else _KNOWN
        for escape in re.finditer(r"\\.", token[0], re.DOTALL) if token.lastgroup in ("set", "escape") else ():
            start = token.start() + escape.start()
            if not known.match(regex, start):
                return f"the escape '{escape[0]}' at position {start + 1} of the regular expression is not supported"
    kinds = [token[0] if token.lastgroup == "other" else str(token.lastgroup) for token in tokens]
    repeated = _repeated(kinds)
    for anchor, order, into, out, where in (
        ("^", range(len(kinds)), "open", "close", "beginning"),
        ("$", range(len(kinds) - 1, -1, -1), "close", "open", "end"),
    ):
        at = _astray(kinds, order, anchor, into, out, repeated)
        if at is not None:
            return (
                f"'{anchor}' at position {tokens[at].start() + 1} of the regular expression, which need not be "
                f"its {where}, is not supported"
            )
    return None


def _repeated(kinds: Sequence[str]) -> set[int]:
    """Where groups begin and end that may come more than once, or not at all."""
    open_at: list[int] = []
    found: set[int] = set()
    for at, kind in enumerate(kinds):
        if kind == "open":
            open_at.append(at)
        elif kind == "close" and open_at:
            begun = open_at.pop()
            if at + 1 < len(kinds) and kinds[at + 1] in "*+?{":
                found |= {begun, at}
    return found


def _astray(
    kinds: Sequence[str], order: Iterable[int], anchor: str, into: str, out: str, repeated: Collection[int]
) -> int | None:
    """The first anchor, in reading order, before which there may be something. Groups begin with `into`, in that
    order.
    """
    clear, beginnings = True, [True]  # nothing was before, here and at the beginning of each group around
    for at in order:
        kind = kinds[at]
        if kind == anchor:
            if not clear:
                return at
        elif kind == into:
            clear = clear and at not in repeated
            beginnings.append(clear)
        elif kind == "|":
            clear = beginnings[-1]
        else:
            clear = False
            if kind == out and len(beginnings) > 1:
                beginnings.pop()
    return None
