"""What a tool that takes plain text is given: a model calls it with JSON of one argument, `{"input": "…"}`."""

from __future__ import annotations

import json
import re

TEXT_ARGUMENT = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
_HEAD = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_LONGEST_HEAD = 64
# of a JSON string, one that is written wrongly included: a pair of surrogates is one character
_UNIT = re.compile(
    r'[^"\\]+'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}(?:\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?=[^\\]|\\[^u]|\\u[^dD]|\\u[dD][^c-fC-F]))"
    r"|\\u(?![dD][89abAB])[0-9a-fA-F]{4}"
    r"|\\u(?=[0-9a-fA-F]{0,3}[^0-9a-fA-F])"
    r"|\\[^u]"
)


def arguments_of(text: str) -> str:
    """The JSON with which the tool is called."""
    return json.dumps({"input": text}, ensure_ascii=False)


def text_of(arguments: str) -> str:
    """What the tool is given; arguments: JSON as the model wrote it."""
    text = PlainText()
    return text.feed(arguments) + text.finish()


class PlainText:
    """The same while the JSON arrives. Arguments of another form are passed on as they are, at the end."""

    def __init__(self) -> None:
        self._pending = ""
        self._begun = self._over = False

    def feed(self, arguments: str) -> str:
        """What is new of the text."""
        if self._over:
            return ""
        self._pending += arguments
        if not self._begun:
            found = _HEAD.match(self._pending[:_LONGEST_HEAD])
            if found is None:
                return ""
            self._begun, self._pending = True, self._pending[found.end() :]
        said, at = [], 0
        while (unit := _UNIT.match(self._pending, at)) is not None:
            said.append(_decoded(unit[0]))
            at = unit.end()
        self._over = self._pending.startswith('"', at)
        self._pending = self._pending[at:]
        return "".join(said)

    def finish(self) -> str:
        """The same, where nothing more comes. Half a character at the end is left out."""
        return "" if self._begun else self._pending


def _decoded(unit: str) -> str:
    if not unit.startswith("\\"):
        return unit
    try:
        return str(json.loads(f'"{unit}"')).encode(errors="replace").decode()
    except ValueError:  # no escape that JSON has
        return unit
