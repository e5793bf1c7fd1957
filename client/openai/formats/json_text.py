"""JSON that arrives in pieces: where a value ends, and the members of an object as they come."""

from __future__ import annotations

import json

_SPACE = " \t\r\n"


class ValueScanner:
    """Finds the end of one JSON value, whose text is passed on as it is. It does not check the text."""

    def __init__(self) -> None:
        self.begun = self.over = False
        self.is_text = False  # the value is a string
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> tuple[str, str]:
        """(of the value, of what follows it). White space before the value is dropped."""
        if not self.begun:
            text = text.lstrip(_SPACE)
        for place, char in enumerate(text):
            if not self.begun:
                self.begun, self.is_text = True, char == '"'
            if self._in_string:
                self._string(char)
                if self.over:
                    return text[: place + 1], text[place + 1 :]
            elif self._depth == 0 and char in ",}]" + _SPACE:  # after a number or a word
                self.over = True
                return text[:place], text[place:]
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.over = True
                    return text[: place + 1], text[place + 1 :]
        return text, ""

    def _string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
            self.over = self._depth == 0


class CallScanner:
    """One call written as a JSON object, with its name and its arguments as members, in either order."""

    names = ("name", "function")
    arguments = ("arguments", "parameters")
    others = ("type", "id")

    def __init__(self) -> None:
        self.name: str | None = None
        self.over = False
        self.broken = False  # it is no such object
        self._key: str | None = None
        self._expects = "{"
        self._value = ValueScanner()
        self._kept = ""  # of a key, a name, or arguments that must wait
        self._early = ""  # arguments that came before the name
        self._said_arguments = False

    @property
    def begun(self) -> bool:
        return self._expects != "{"

    def feed(self, text: str) -> tuple[str, str]:
        """(what is new of the arguments, what was not looked at). It stops behind the object, and where the name is
        known.
        """
        said, name = "", self.name
        while text and not self.over and not self.broken and self.name is name:
            if self._expects in ("key", "value"):
                piece, text = self._value.feed(text)
                said += self._piece(piece)
                if self._value.over:
                    said += self._end()
                continue
            char, text = text[0], text[1:]
            if char not in _SPACE:
                said += self._punctuation(char)
        return said, text

    def _punctuation(self, char: str) -> str:
        if self._expects == "key or end" and char == '"':
            self._start("key")
            self._piece(self._value.feed('"')[0])
        elif self._expects == "{" and char == "{":
            self._expects = "key or end"
        elif self._expects == ":" and char == ":":
            self._start("value")
        elif self._expects == "," and char == ",":
            self._expects = "key or end"
        elif self._expects in (",", "key or end") and char == "}":
            self.over = True
            return self._rest()
        else:
            self.broken = True
        return ""

    def _start(self, expected: str) -> None:
        self._expects, self._value, self._kept = expected, ValueScanner(), ""

    def _piece(self, piece: str) -> str:
        """Of a key or a value; arguments that are an object are passed on at once."""
        streams = (
            self._expects == "value"
            and self._key in self.arguments
            and self.name is not None
            and not self._value.is_text
        )
        if streams:
            self._said_arguments = self._said_arguments or bool(piece)
            return piece
        self._kept += piece
        return ""

    def _end(self) -> str:
        """A key or a value is whole."""
        kept, self._kept = self._kept, ""
        if self._expects == "key":
            self._key, self._expects = _decoded(kept), ":"
            self.broken = self._key is None or (
                self.name is None and self._key not in self.names + self.arguments + self.others
            )
            return ""
        self._expects = ","
        if self._key in self.names:
            self.name = _decoded(kept)
            self.broken = not self.name
            early, self._early = self._early, ""
            self._said_arguments = bool(early)
            return early
        if self._key in self.arguments and kept:
            whole = (_decoded(kept) or "") if self._value.is_text else kept
            if self.name is None:
                self._early = whole
            else:
                self._said_arguments = True
                return whole
        return ""

    def _rest(self) -> str:
        self.broken = self.name is None
        return "" if self._said_arguments or self.broken else "{}"


def _decoded(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
