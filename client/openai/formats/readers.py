"""Readers of what stands between a call's markers. Each is fed text until it says what follows its end.

`feed` returns None while there is more to come, and then the text behind. What turns out to be no call is `Content`
again, to the letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from paged_client.openai.formats.events import Calls, Content, Event
from paged_client.openai.formats.json_text import CallScanner, ValueScanner

_SPACE = " \t\r\n"
_LONGEST_NAME = 1000


class Reader(Protocol):
    def feed(self, text: str, events: list[Event]) -> str | None: ...

    def finish(self, events: list[Event]) -> None:
        """The text ends here, perhaps in the middle of a call."""


class Closing:
    """What may stand behind a call: white space, perhaps some filling, and the closing marker."""

    def __init__(self, closer: str, filling: str = _SPACE) -> None:
        self._closer = closer
        self._filling = filling
        self._seen = ""

    def feed(self, text: str) -> str | None:
        """What follows the marker, or what stands in its place; None: not known yet."""
        self._seen += text
        behind = self._seen.lstrip(self._filling)
        if self._closer and behind.startswith(self._closer):
            return behind[len(self._closer) :]
        if behind and not self._closer.startswith(behind):
            return behind
        return None


class JsonCalls:
    """Calls as JSON objects: one, several behind one another, or a list of them."""

    def __init__(self, calls: Calls, closer: str, opened_by: str = "", known: frozenset[str] | None = None) -> None:
        """opened_by: the marker before. known: names that may be called; None: any."""
        self._calls = calls
        self._closer = closer
        self._known = known
        self._scanner = CallScanner()
        self._raw = opened_by  # everything, until a call is certain
        self._named = False
        self._in_list = False
        self._behind: Closing | None = None

    def feed(self, text: str, events: list[Event]) -> str | None:
        if self._behind is not None:
            return self._close(text, events)
        if not self._scanner.begun and not self._in_list and text.lstrip(_SPACE).startswith("["):
            before = len(text) - len(text.lstrip(_SPACE)) + 1
            self._raw, self._in_list, text = self._raw + text[:before], True, text[before:]
        while text and not self._scanner.over:
            said, rest = self._scanner.feed(text)
            if not self._named:
                self._raw += text[: len(text) - len(rest)]
            text, name = rest, self._scanner.name
            if self._scanner.broken or (name is not None and not self._may_call(name)):
                return self._give_up(text, said, events)
            if name is not None and not self._named:
                self._named, self._raw = True, ""
                events.append(self._calls.begin(name))
            if said:
                events.append(self._calls.arguments(said))
        if not self._scanner.over:
            return None
        self._behind = Closing("]" if self._in_list else self._closer, _SPACE + ",;")
        return self._close(text, events)

    def _may_call(self, name: str) -> bool:
        return self._known is None or name in self._known

    def _close(self, text: str, events: list[Event]) -> str | None:
        assert self._behind is not None
        rest = self._behind.feed(text)
        if rest is None:
            return None
        if rest.startswith("{"):  # another one
            self._scanner, self._behind, self._named, self._raw = CallScanner(), None, False, ""
            return self.feed(rest, events)
        if self._in_list:  # what closes the list is behind it
            self._in_list, self._behind = False, Closing(self._closer)
            return self._close(rest, events)
        return rest

    def _give_up(self, rest: str, said: str, events: list[Event]) -> str:
        if self._named:  # the call is out: the rest of it cannot be made sense of
            if said:
                events.append(self._calls.arguments(said))
            return rest
        events.append(Content(self._raw))
        return rest

    def finish(self, events: list[Event]) -> None:
        if not self._named and self._raw:
            events.append(Content(self._raw))


class HeadThenJson:
    """A name, something that separates, and the arguments as JSON: DeepSeek, Kimi, Mistral."""

    def __init__(
        self, calls: Calls, closer: str, opened_by: str, separator: str, named: Callable[[str], tuple[str, str]]
    ) -> None:
        """separator: a regular expression. named: the head → (name, id or "")."""
        self._calls = calls
        self._closer = closer
        self._raw = opened_by
        self._separator = re.compile(separator)
        self._named = named
        self._head: str | None = ""
        self._value = ValueScanner()
        self._behind: Closing | None = None

    def feed(self, text: str, events: list[Event]) -> str | None:
        if self._head is not None:
            self._head += text
            brace = self._head.find("{")
            closed = self._head.find(self._closer) if self._closer else -1
            if closed >= 0 and (brace < 0 or closed < brace):
                return self._without_arguments(events)
            if brace < 0:
                return None
            found = self._separator.search(self._head)
            if found is None or found.end() > brace:
                behind = self._head[brace + 1 :]
                events.append(Content(self._raw + self._head[: brace + 1]))
                return behind
            head, text, self._head = self._head[: found.start()], self._head[brace:], None
            events.append(self._calls.begin(*self._named(head)))
        if self._behind is None:
            said, text = self._value.feed(text)
            if said:
                events.append(self._calls.arguments(said))
            if not self._value.over:
                return None
            self._behind = Closing(self._closer, _SPACE + "`")
        return self._behind.feed(text)

    def _without_arguments(self, events: list[Event]) -> str:
        assert self._head is not None
        head, _, rest = self._head.partition(self._closer)
        found = self._separator.search(head)
        self._head = None
        if found is None:
            events.append(Content(self._raw + head + self._closer))
        else:
            events.append(self._calls.begin(*self._named(head[: found.start()])))
            events.append(self._calls.arguments("{}"))
        return rest

    def finish(self, events: list[Event]) -> None:
        if self._head is not None:
            events.append(Content(self._raw + self._head))


class TaggedArguments:
    """A name, then each argument between tags: Qwen3-Coder's and GLM's XML. Each argument is passed on when it is
    whole.
    """

    def __init__(
        self, calls: Calls, opened_by: str, name: str, parameter: tuple[str, str], end: str, types: Mapping[str, Any]
    ) -> None:
        """name, parameter (its opening, with the key as a group; and its end), end: regular expressions. types: the
        tools.
        """
        self._calls = calls
        self._raw = opened_by
        self._name, self._end = re.compile(name), re.compile(end)
        self._open, self._close = re.compile(parameter[0]), re.compile(parameter[1])
        self._types = types
        self._properties: Mapping[str, Any] | None = None  # of the tool, once the name is known
        self._separator = "{"
        self._text = ""
        self._searched = 0  # of the text, for the end of an argument

    def feed(self, text: str, events: list[Event]) -> str | None:
        self._text += text
        if self._properties is None:
            first = self._text[:_LONGEST_NAME]
            found = self._name.match(first)
            if found is None:
                ended = self._end.search(first)
                if ended is None and len(first) < _LONGEST_NAME:
                    return None
                at = len(first) if ended is None else ended.end()
                events.append(Content(self._raw + first[:at]))
                return self._text[at:]
            events.append(self._calls.begin(found["name"].strip()))
            self._properties = self._types.get(found["name"].strip(), {})
            self._text = self._text[found.end() :]
        while (step := self._step(events)) is not None:
            if step:
                return self._text
        return None

    def _step(self, events: list[Event]) -> bool | None:
        """One argument (False) or the end (True) is read; None: there must be more text."""
        opened, ended = self._open.search(self._text), self._end.search(self._text)
        if opened is not None and (ended is None or opened.start() < ended.start()):
            closed = self._close.search(self._text, max(opened.end(), self._searched))
            if closed is None:
                self._searched = max(opened.end(), len(self._text) - 20)  # longer than any end's beginning
                return None
            key, value = opened["key"].strip(), self._text[opened.end() : closed.start()]
            assert self._properties is not None
            said = f"{json.dumps(key, ensure_ascii=False)}: {_as_json(value, self._properties.get(key))}"
            events.append(self._calls.arguments(self._separator + said))
            self._separator, self._text, self._searched = ", ", self._text[closed.end() :], 0
            return False
        if ended is not None:
            self._text = self._text[ended.end() :]
            events.append(self._calls.arguments("{}" if self._separator == "{" else "}"))
            return True
        return None

    def finish(self, events: list[Event]) -> None:
        if self._properties is None:
            events.append(Content(self._raw + self._text))


class WholeText:
    """Calls that can be read only when they are whole: Python's and Gemma's."""

    def __init__(self, calls: Calls, opened_by: str, closer: str, read: Callable[[str], list[tuple[str, str]]]) -> None:
        """closer: "": the end of the text. read: raises ValueError for what is no call."""
        self._calls = calls
        self._raw = opened_by
        self._closer = closer
        self._read = read
        self._text = ""

    def feed(self, text: str, events: list[Event]) -> str | None:
        self._text += text
        if not self._closer:
            return None
        body, closer, rest = self._text.partition(self._closer)
        if not closer:
            return None
        self._end(body, closer, events)
        return rest

    def _end(self, body: str, closer: str, events: list[Event]) -> None:
        try:
            found = self._read(body)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            events.append(Content(self._raw + body + closer))
            return
        for name, arguments in found:
            events += [self._calls.begin(name), self._calls.arguments(arguments)]

    def finish(self, events: list[Event]) -> None:
        self._end(self._text, "", events)


def _as_json(text: str, schema: Any) -> str:
    """An argument's text as JSON: text where the tool wants text, else what it says."""
    plain = text.removeprefix("\n").removesuffix("\n")
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string":
        return json.dumps(plain, ensure_ascii=False)
    try:
        return json.dumps(json.loads(plain, parse_constant=_no_constant), ensure_ascii=False)
    except (ValueError, RecursionError):
        lowered = plain.strip().lower()
        if kind == "boolean" and lowered in ("true", "false"):
            return lowered
        return (
            "null"
            if kind == "null" or (lowered == "none" and kind != "string" and schema is not None)
            else json.dumps(plain, ensure_ascii=False)
        )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
