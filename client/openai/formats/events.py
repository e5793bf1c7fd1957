"""What a parser finds in a model's text."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Content:
    """A piece of the answer proper."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thought before."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """The next tool call: its arguments follow."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of a call's arguments, which all together are JSON."""

    index: int
    text: str


Event = Content | Reasoning | CallBegun | CallArguments


@dataclass
class Call:
    """A whole tool call."""

    call_id: str
    name: str
    arguments: str = ""


@dataclass
class Message:
    """Everything that was said."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)


def message_of(events: Iterable[Event]) -> Message:
    """The whole of which they are the pieces."""
    message = Message()
    for event in events:
        match event:
            case Content(text):
                message.content += text
            case Reasoning(text):
                message.reasoning += text
            case CallBegun(_, call_id, name):
                message.calls.append(Call(call_id, name))
            case CallArguments(index, text):
                message.calls[index].arguments += text
    return message


class Calls:
    """Numbers the calls of one answer."""

    def __init__(self) -> None:
        self.count = 0

    def begin(self, name: str, call_id: str = "") -> CallBegun:
        event = CallBegun(self.count, call_id or f"call_{secrets.token_hex(12)}", name)
        self.count += 1
        return event

    def arguments(self, text: str) -> CallArguments:
        """Of the call that was begun last."""
        return CallArguments(self.count - 1, text)
