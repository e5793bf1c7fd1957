"""A `pattern` of a JSON schema as a grammar of its own, in GBNF, for what may stand between the quotation marks of a
JSON string.

xgrammar has a converter for patterns that makes automata of them. It lets an optional group begin within its last loop
("^a(bc+)?$" takes "ac"), mixes up alternatives with counted loops, passes over lookaheads, and knows no escapes of
JSON. So patterns are read here, and only grammars go to the library.

What a class means differs between ECMAScript, which JSON Schema names, and Python's `re`, with which validators are
written: "\\d" has digits of other scripts there. A set therefore knows the characters that every dialect counts in and
those that some dialect does; only the former are said, and a negated set says none of the latter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Ranges = tuple[tuple[int, int], ...]  # of code points, sorted, apart from each other, both ends included

_MAX_REPEATS = 10_000
_LAST = 0x10FFFF
_SURROGATES: Ranges = ((0xD800, 0xDFFF),)
_LINE_ENDS: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
_CONTROLS = 0x20  # below it JSON wants an escape
_MANY = 1000  # characters of a set: it was not meant to have each control character
_SHORT = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r", 0x22: '"', 0x5C: "\\"}
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = ((0x09, 0x0D), (0x20, 0x20))
# Spaces of some dialect: Unicode's, U+FEFF (ECMAScript), U+001C to U+001F and U+0085 (Python).
_SOME_SPACE: Ranges = (
    *((0x09, 0x0D), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)),
    *((0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
)
# What surely is no word character, in any dialect: ASCII and a few blocks of punctuation and pictures.
_NO_WORD: Ranges = (
    *(
        (0x00, 0x2F),
        (0x3A, 0x40),
        (0x5B, 0x5E),
        (0x60, 0x60),
        (0x7B, 0xA9),
        (0xAB, 0xB1),
        (0xB4, 0xB4),
        (0xB6, 0xB8),
        (0xBB, 0xBB),
        (0xBF, 0xBF),
    ),
    *(
        (0xD7, 0xD7),
        (0xF7, 0xF7),
        (0x2010, 0x2027),
        (0x2030, 0x203E),
        (0x20A0, 0x20BF),
        (0x2190, 0x23FF),
        (0x2500, 0x2775),
        (0x3001, 0x3003),
    ),
    *((0x1F300, 0x1F64F),),
)
_NO_DIGIT: Ranges = ((0x00, 0x2F), (0x3A, 0x65F), (0x3040, 0xA61F), (0xAC00, 0xD7FF), (0x1F300, 0x1F64F))
_ESCAPES = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "0": 0x00}
_QUANTIFIER = re.compile(r"(?P<sign>[*+?])|\{(?P<least>\d+)(?P<comma>,(?P<most>\d*))?\}")
_CODE = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}|c([A-Za-z])")
_LOW_SURROGATE = re.compile(r"\\u([dD][c-fC-F][0-9A-Fa-f]{2})")
_FLAGS = re.compile(r"\(\?[a-zA-Z-]+[:)]")


class PatternError(Exception):
    """Why a pattern cannot be followed; a clause for the caller."""


@dataclass(frozen=True)
class _Set:
    inner: Ranges  # what every dialect counts in
    outer: Ranges  # what some dialect does


def pattern_grammar(pattern: str) -> str:
    """The right side of a rule that takes what the pattern matches from beginning to end, as JSON spells it. Anchors
    must be where they mean nothing else (regex_syntax.py).

    Raises:
        PatternError: names what is not supported, and its place.
    """
    return _Reader(pattern).read()


class _Reader:
    """Reads a pattern from left to right. Depth is bounded by Python's own recursion, and by the schema's length."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0

    def read(self) -> str:
        try:
            grammar = self._alternatives()
        except RecursionError:
            raise PatternError("pattern: it is nested too deeply") from None
        if self._at < len(self._text):
            raise self._wrong("a ')' without its '('")
        return grammar

    def _error(self, what: str, at: int | None = None) -> PatternError:
        return PatternError(f"{self._wrong(what, at)} is not supported")

    def _wrong(self, what: str, at: int | None = None) -> PatternError:
        return PatternError(f"pattern: {what} at position {(self._at if at is None else at) + 1}")

    def _alternatives(self) -> str:
        branches = [self._sequence()]
        while self._text.startswith("|", self._at):
            self._at += 1
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else f"({' | '.join(branches)})"

    def _sequence(self) -> str:
        parts = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            atom = self._atom()
            parts.append(self._repeated(atom))
        return " ".join(part for part in parts if part != '""') or '""'

    def _atom(self) -> str:
        char, start = self._text[self._at], self._at
        self._at += 1
        match char:
            case "^" | "$":
                return '""'
            case "(":
                return self._group(start)
            case "[":
                return _spelled(self._set(start))
            case ".":
                return _spelled(_without(_everything(), _LINE_ENDS))
            case "\\":
                return _spelled(self._escape(start).inner)
            case "*" | "+" | "?":
                raise self._wrong(f"'{char}' without anything before it", start)
            case "{":
                raise self._wrong("'{' without numbers (write '\\{' for the character)", start)
        return _spelled(((ord(char), ord(char)),))

    def _group(self, start: int) -> str:
        for opening, name in (
            ("?=", "the lookahead"),
            ("?!", "the lookahead"),
            ("?<=", "the lookbehind"),
            ("?<!", "the lookbehind"),
        ):
            if self._text.startswith(opening, self._at):
                raise self._error(f"{name} '({opening}'", start)
        flags = _FLAGS.match(self._text, start)
        named = re.compile(r"\?(?::|P?<\w+>)").match(self._text, self._at)
        if named:
            self._at = named.end()
        elif flags:
            raise self._error(f"the inline flag '{flags[0]}'", start)
        elif self._text.startswith("?", self._at):
            raise self._error(f"the group '{self._text[start : start + 3]}'", start)
        inside = self._alternatives()
        if not self._text.startswith(")", self._at):
            raise self._wrong("a '(' without its ')'", start)
        self._at += 1
        return f"({inside})"

    def _repeated(self, atom: str) -> str:
        found = _QUANTIFIER.match(self._text, self._at)
        if found is None:
            return atom
        self._at = found.end()
        if self._text.startswith("?", self._at):  # lazy: the same answers
            self._at += 1
        elif self._text.startswith(("+", "*", "{"), self._at):
            raise self._error(f"'{self._text[self._at]}' after a repetition")
        least, most = {"*": (0, -1), "+": (1, -1), "?": (0, 1)}.get(found["sign"] or "", (0, 0))
        if not found["sign"]:
            least = int(found["least"])
            most = least if not found["comma"] else int(found["most"]) if found["most"] else -1
        if max(least, most) > _MAX_REPEATS or -1 < most < least:
            raise self._error(f"the repetition '{found[0]}'", found.start())
        if atom == '""' or most == 0:
            return '""'
        signs = {(0, -1): "*", (1, -1): "+", (0, 1): "?", (1, 1): ""}
        bounds = f"{{{least},{'' if most < 0 else most}}}"
        return f"({atom}){signs.get((least, most), bounds)}"

    def _escape(self, start: int) -> _Set:
        if self._at >= len(self._text):
            raise self._wrong("a '\\' at the end", start)
        char = self._text[self._at]
        code = _CODE.match(self._text, self._at)
        if code:
            self._at = code.end()
            return _one(self._code_point(code, start))
        self._at += 1
        if char in _CLASSES:
            return _CLASSES[char]
        if char in _ESCAPES and not (char == "0" and self._text[self._at : self._at + 1].isdigit()):
            return _one(_ESCAPES[char])
        if char.isalnum():
            raise self._error(f"the escape '\\{char}'", start)
        return _one(ord(char))

    def _code_point(self, code: re.Match[str], start: int) -> int:
        if code[4]:
            return ord(code[4]) & 31
        point = int(code[1] or code[2] or code[3], 16)
        low = _LOW_SURROGATE.match(self._text, self._at) if 0xD800 <= point < 0xDC00 else None
        if low:
            self._at = low.end()
            return 0x10000 + ((point & 0x3FF) << 10 | (int(low[1], 16) & 0x3FF))
        if point > _LAST or 0xD800 <= point < 0xE000:
            raise self._error(f"the escape '\\{code[0]}'", start)
        return point

    def _set(self, start: int) -> Ranges:
        negated = self._text.startswith("^", self._at)
        self._at += negated
        if self._text.startswith("]", self._at):
            raise self._error("a set that begins with ']' (write '\\]' for the character)", start)
        inner: list[tuple[int, int]] = []
        outer: list[tuple[int, int]] = []
        while not self._text.startswith("]", self._at):
            item = self._item(start)
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                item = self._range(item, self._item(start), start)
            inner += item.inner
            outer += item.outer
        self._at += 1
        found = _without(_everything(), _merged(outer)) if negated else _merged(inner)
        if not _without(found, _SURROGATES):
            raise self._wrong("a set without characters", start)
        return found

    def _item(self, start: int) -> _Set:
        if self._at >= len(self._text):
            raise self._wrong("a '[' without its ']'", start)
        char, at = self._text[self._at], self._at
        self._at += 1
        if char == "\\":
            if self._text.startswith("b", self._at):
                self._at += 1
                return _one(0x08)
            return self._escape(at)
        if self._text.startswith(("[:", "[.", "[="), at) or (
            char in "&-~|" and self._text.startswith(char, self._at) and char != "-"
        ):
            raise self._error(f"'{self._text[at : at + 2]}' in a set", at)
        return _one(ord(char))

    def _range(self, first: _Set, last: _Set, start: int) -> _Set:
        single = all(
            len(each.inner) == 1 and each.inner == each.outer and each.inner[0][0] == each.inner[0][1]
            for each in (first, last)
        )
        if not single or first.inner[0][0] > last.inner[0][0]:
            raise self._error("a range whose ends are no characters in their order", start)
        ranges = ((first.inner[0][0], last.inner[0][0]),)
        return _Set(ranges, ranges)


# ---- sets of characters


def _everything() -> Ranges:
    return ((0, 0xD7FF), (0xE000, _LAST))


def _one(point: int) -> _Set:
    return _Set(((point, point),), ((point, point),))


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(found[-1][1], high)
        else:
            found.append((low, high))
    return tuple(found)


def _without(ranges: Ranges, taken: Ranges) -> Ranges:
    left: list[tuple[int, int]] = []
    for low, high in ranges:
        for first, last in taken:
            if last < low or first > high:
                continue
            if first > low:
                left.append((low, first - 1))
            low = last + 1
        if low <= high:
            left.append((low, high))
    return tuple(left)


_SOME_WORD = _without(_everything(), _NO_WORD)
_SOME_DIGIT = _without(_everything(), _NO_DIGIT)
_DIGIT: Ranges = ((0x30, 0x39),)
_CLASSES = {
    "d": _Set(_DIGIT, _SOME_DIGIT),
    "D": _Set(_NO_DIGIT, _without(_everything(), _DIGIT)),
    "w": _Set(_WORD, _SOME_WORD),
    "W": _Set(_NO_WORD, _without(_everything(), _WORD)),
    "s": _Set(_SPACE, _SOME_SPACE),
    "S": _Set(_without(_everything(), _SOME_SPACE), _without(_everything(), _SPACE)),
}


def _spelled(ranges: Ranges) -> str:
    """One character of a set, as JSON spells it within a string."""
    ranges = _without(ranges, _SURROGATES)
    num_chars = sum(high - low + 1 for low, high in ranges)
    plain = _without(ranges, ((0, _CONTROLS - 1), (0x22, 0x22), (0x5C, 0x5C)))
    options = [f"[{''.join(_bounds(plain))}]"] if plain else []
    for point in (*range(_CONTROLS), 0x22, 0x5C):
        if any(low <= point <= high for low, high in ranges) and (num_chars < _MANY or point in _SHORT):
            options.append(_gbnf_literal(f"\\{_SHORT[point]}" if point in _SHORT else f"\\u{point:04x}"))
    return options[0] if len(options) == 1 else f"({' | '.join(options)})"


def _bounds(ranges: Ranges) -> Iterator[str]:
    for low, high in ranges:
        yield _in_class(low) if low == high else f"{_in_class(low)}-{_in_class(high)}"


def _in_class(point: int) -> str:
    return chr(point) if point < 128 and chr(point).isalnum() else f"\\U{point:08x}"


def _gbnf_literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
