"""gpt-oss's harmony: messages with a channel and a recipient, closed by special tokens.

https://developers.openai.com/cookbook/articles/openai-harmony. Read from text: the library `openai-harmony` reads token
ids, with a vocabulary that it loads from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from paged_client.openai.formats.events import Calls, Content, Event, Reasoning
from paged_client.openai.formats.markers import Markers

MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
ANALYSIS = ("<|channel|>", "analysis", "<|message|>")  # begins a message of thoughts, each word a token
END = "<|end|>"  # ends any message after which another follows
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?(?P<name>[^\s<]+)")


def as_template_has_them(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chat's messages for gpt-oss's own template: what the model thought before a call is `thinking`, which it takes
    only without content beside it, and an empty content is "".
    """
    return [_as_template_has_it(dict(message)) for message in messages]


def _as_template_has_it(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] != "assistant":
        return message
    content = message.get("content") or ""
    if not message.get("tool_calls"):
        return {**message, "content": content}
    thought = message.get("reasoning_content") or message.get("thinking") or ""
    return {**message, "content": "", "thinking": "\n".join(filter(None, (thought, content)))}


class HarmonyParser:
    """Of the interface of AnswerParser."""

    def __init__(self) -> None:
        self._calls = Calls()
        self._markers = Markers(MARKERS)
        self._pending = ""
        self._header: str | None = ""  # of the message; None: its text is being read
        self._kind = "content"

    @property
    def num_calls(self) -> int:
        return self._calls.count

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        self._pending += text
        marker = "-"
        while marker:
            plain, marker, self._pending = self._markers.split(self._pending)
            self._take(plain, marker, events)
        return events

    def finish(self) -> list[Event]:
        events: list[Event] = []
        self._take(self._pending, "", events)
        self._pending = ""
        if self._header and "<|" not in self._header and not _RECIPIENT.search(self._header):
            events.append(Content(self._header))  # no message at all: plain text
        return events

    def _take(self, plain: str, marker: str, events: list[Event]) -> None:
        if self._header is not None:
            self._header += plain
        elif plain:
            self._text(plain, events)
        if marker == "<|message|>" and self._header is not None:
            self._open(self._header, events)
            self._header = None
        elif marker in _ENDS:
            self._header = ""
        elif self._header is not None:
            self._header += marker

    def _text(self, text: str, events: list[Event]) -> None:
        if self._kind == "call":
            events.append(self._calls.arguments(text))
        else:
            events.append(Reasoning(text) if self._kind == "reasoning" else Content(text))

    def _open(self, header: str, events: list[Event]) -> None:
        """A message begins, of which the header says for whom."""
        recipient = _RECIPIENT.search(header)
        channel = header.partition("<|channel|>")[2].split()[:1]
        if recipient is not None:
            self._kind = "call"
            events.append(self._calls.begin(recipient["name"]))
        else:
            self._kind = "reasoning" if channel == ["analysis"] else "content"
