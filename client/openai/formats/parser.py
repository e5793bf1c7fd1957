"""Reads a model's answer while it arrives: start here.

Text goes in, in whatever pieces; events come out, and all together they hold every character but markers and the white
space around reasoning and calls. However the text is cut, the whole is the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from paged_client.openai.formats.events import Calls, Content, Event, Reasoning
from paged_client.openai.formats.families import ReasoningFormat, ToolFormat, Types
from paged_client.openai.formats.harmony import HarmonyParser
from paged_client.openai.formats.markers import Markers
from paged_client.openai.formats.readers import Reader

_SPACE = " \t\r\n"


class Parser(Protocol):
    """Of one sequence's text."""

    @property
    def num_calls(self) -> int: ...
    def feed(self, text: str) -> list[Event]: ...
    def finish(self) -> list[Event]: ...


@dataclass(frozen=True)
class AnswerForm:
    """What to look for in an answer."""

    tools: ToolFormat | None = None  # None: no calls
    reasoning: ReasoningFormat | None = None
    begins_reasoning: bool = False  # the prompt has opened it
    types: Types = field(default_factory=dict)
    dropped: tuple[str, ...] = ()  # special words that mean nothing to the caller
    template: Mapping[str, Any] | None = None  # transformers' response template, which replaces the formats
    prompt_end: str = ""  # for that

    @property
    def is_plain(self) -> bool:
        return self.tools is None and self.reasoning is None and self.template is None

    def parser(self) -> Parser:
        if self.template is not None:
            return TemplateParser(self.template, self.prompt_end, self.types)
        if self.tools is not None and self.tools.name == "harmony":
            return HarmonyParser()
        return AnswerParser(self)


class AnswerParser:
    """Reasoning, then content with calls in it or behind it."""

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        self._calls = Calls()
        tools, reasoning = form.tools, form.reasoning
        self._openers = dict(tools.openers) if tools is not None else {}
        ignored = tools.ignored if tools is not None else ()
        self._reasoning_opener = reasoning.opener if reasoning is not None else ""
        self._markers = Markers([*self._openers, *ignored, *form.dropped, self._reasoning_opener])
        self._closer = reasoning.closer if reasoning is not None else ""
        self._edges = Markers([self._closer, self._reasoning_opener])
        self._bare = re.compile(tools.bare) if tools is not None and tools.bare else None
        self._reasons = form.begins_reasoning and reasoning is not None
        self._reader: Reader | None = None
        self._pending = ""  # not understood yet
        self._space = ""  # white space that belongs to what comes next, or to nobody
        self._said = False  # something since the last marker
        # white space behind that marker is dropped; at an answer's beginning it is the model's own
        self._trims = self._reasons
        self._has_content = False

    @property
    def num_calls(self) -> int:
        return self._calls.count

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        self._pending += text
        while self._pending and self._step(events, final=False):
            pass
        return events

    def finish(self) -> list[Event]:
        events: list[Event] = []
        while self._pending and self._step(events, final=True):
            pass
        if self._reader is not None:
            found: list[Event] = []
            self._reader.finish(found)
            self._take(found, events)
        if self._pending:
            (self._think if self._reasons else self._say)(self._pending, events)
            self._pending = ""
        if self._space and not self._calls.count and not self._reasons:
            events.append(Content(self._space))
        return events

    def _step(self, events: list[Event], final: bool) -> bool:
        """Whether there may be more to do with what is pending."""
        if self._reader is not None:
            return self._step_of_call(self._reader, events)
        if self._reasons:
            return self._step_of_reasoning(events, final)
        if self._bare is not None and not self._has_content:
            begun = (self._space + self._pending).lstrip(_SPACE)
            if self._bare.match(begun):
                assert self._form.tools is not None and self._form.tools.bare_reader is not None
                self._reader = self._form.tools.bare_reader(self._calls, "", self._form.types)
                self._space = ""
                return True
            if not final and len(begun) < 2 and (not begun or begun[0] in "[{"):
                return False
        split = self._markers.split_end if final else self._markers.split
        plain, marker, self._pending = split(self._pending)
        self._say(plain, events)
        if marker in self._openers:
            self._reader = self._openers[marker](self._calls, marker, self._form.types)
        elif marker and marker == self._reasoning_opener:
            self._reasons = True
            self._begin_anew()
        return bool(marker)

    def _step_of_call(self, reader: Reader, events: list[Event]) -> bool:
        found: list[Event] = []
        rest = reader.feed(self._pending, found)
        self._pending = rest or ""
        self._take(found, events)
        if rest is not None:
            self._reader = None
            if not found or not isinstance(found[-1], Content):  # else it was none
                self._begin_anew()
        return rest is not None

    def _take(self, found: list[Event], events: list[Event]) -> None:
        """Of a reader: what is no call is content like any other."""
        for event in found:
            if isinstance(event, Content):
                self._say(event.text, events)
            else:
                events.append(event)

    def _begin_anew(self) -> None:
        """Behind a marker."""
        self._said, self._trims, self._space = False, True, ""

    def _step_of_reasoning(self, events: list[Event], final: bool) -> bool:
        split = self._edges.split_end if final else self._edges.split
        plain, marker, self._pending = split(self._pending)
        self._think(plain, events)
        if marker == self._closer:
            self._reasons = False
            self._begin_anew()
        elif marker and self._said:  # at the beginning: what the prompt has opened, once more
            self._think(marker, events)
        return bool(marker)

    def _think(self, text: str, events: list[Event]) -> None:
        said = self._without_edges(text)
        if said:
            events.append(Reasoning(said))

    def _say(self, text: str, events: list[Event]) -> None:
        said = self._without_edges(text)
        if said:
            self._has_content = True
            events.append(Content(said))

    def _without_edges(self, text: str) -> str:
        """Keeps white space at the end back, until it is known to be inside; drops it at the beginning."""
        whole = self._space + text
        said = whole.rstrip(_SPACE)
        self._space = whole[len(said) :]
        if not said:
            if self._trims and not self._said:
                self._space = ""
            return ""
        if self._trims and not self._said:
            said = said.lstrip(_SPACE)
        self._said = True
        return said


class TemplateParser:
    """By transformers' response template, as the checkpoint brings it. Calls come when they are whole."""

    def __init__(self, template: Mapping[str, Any], prompt_end: str, types: Types) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        tools = [{"function": {"name": name, "parameters": {"properties": known}}} for name, known in types.items()]
        self._parser = ResponseParser(dict(template), prefix=prompt_end, tools=tools)
        self._calls = Calls()

    @property
    def num_calls(self) -> int:
        return self._calls.count

    def feed(self, text: str) -> list[Event]:
        return self._events(self._parser.feed(text))

    def finish(self) -> list[Event]:
        _, events = self._parser.finalize()
        return self._events(events)

    def _events(self, found: list[dict[str, Any]]) -> list[Event]:
        events: list[Event] = []
        for event in found:
            kind, name = event["type"], event["field"]
            if kind == "region_chunk" and name == "content":
                events.append(Content(event["text"]))
            elif kind == "region_chunk" and name in ("reasoning_content", "reasoning", "thinking"):
                events.append(Reasoning(event["text"]))
            elif kind == "region_close" and name == "tool_calls":
                value = event["value"]
                for call in value if isinstance(value, list) else [value]:
                    self._call(call, events)
        return events

    def _call(self, call: Any, events: list[Event]) -> None:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            arguments = function.get("arguments")
            said = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
            events += [self._calls.begin(function["name"]), self._calls.arguments(said)]
