"""Chat messages to a prompt's text, by the model's own template, which runs in a process of its own
(template_renderer.py).

The engine exports the checkpoint's template beside tokenizer.json (models/tokenizer.py); front ends read that file.
Special tokens are the template's to write. Where a caller's own words spell one, they stay words: nobody ends a turn or
speaks as the system from within one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from paged_backend.errors import RequestError
from paged_backend.frontend.template_process import Rendered, Rendering
from paged_backend.messages import ExportedTemplate
from paged_backend.request import Chat

_OWN_VARIABLES = frozenset(
    [
        "self",
        "conversations",
        "messages",
        "tools",
        "chat_template",
        "return_assistant_tokens_mask",
        "continue_final_message",
        "add_generation_prompt",
    ]
)  # of the template's caller, or of render_jinja_template's
_MARKED_SHARE = 33  # a mark before and behind a special word, the shortest of which have two characters
_TOOLS_TEMPLATE = "tool_use"

Render = Callable[[Rendering], Rendered]


class ChatTemplate:
    """A checkpoint's chat template. Thread-safe."""

    def __init__(
        self, exported: ExportedTemplate, special_words: Sequence[str], render: Render, max_bytes: int
    ) -> None:
        """special_words: how the tokenizer's special tokens are spelled. max_bytes: of a prompt."""
        self.exported = exported
        self._render = render
        self._max_bytes = max_bytes
        longest_first = sorted(special_words, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def render(self, chat: Chat) -> list[str]:
        """The prompt's text, special tokens included, in parts: the second, fourth, … are words of the caller's that
        only look like special tokens.

        Raises:
            RequestError: the messages are not what they should be, or the template refuses them; in the template's own
                words.
        """
        messages = _read_list("messages", chat.messages)
        if not messages:
            raise RequestError("messages: the list is empty")
        tools = None if chat.tools is None else _read_list("tools", chat.tools)
        for position, message in enumerate(messages):
            if not isinstance(message.get("role"), str):
                raise RequestError(f"messages: entry {position} has no role")
            _read_arguments(message)
        # before and behind such words on their way through the template; nobody can have guessed them
        marks = secrets.token_hex(16), secrets.token_hex(16)
        try:
            rendering = Rendering(
                template=self._template(with_tools=bool(tools)),
                messages=self._field("messages", [_without_null(message) for message in messages], marks),
                tools=self._field("tools", tools, marks),
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
                variables=self.exported.special_tokens | self._kwargs(chat.template_kwargs, marks),
                max_bytes=self._max_bytes + len(chat.messages) * _MARKED_SHARE,
            )
            rendered = self._render(rendering)
            # "" for templates that cannot do without
            if rendered.error and any(message.get("content", "") is None for message in messages):
                filled = [_without_null({**message, "content": message.get("content") or ""}) for message in messages]
                given = self._field("messages", filled, marks)
                again = self._render(msgspec.structs.replace(rendering, messages=given))
                rendered = rendered if again.error else again
        except RecursionError:
            raise RequestError("messages: the JSON is nested too deeply") from None
        if rendered.error:
            raise RequestError(f"messages: the model's chat template refuses them: {rendered.error}")
        return self._parted(rendered.text, *marks)

    def _kwargs(self, given: Mapping[str, Any], marks: tuple[str, str]) -> dict[str, Any]:
        taken = sorted(given.keys() & (_OWN_VARIABLES | self.exported.special_tokens.keys()))
        if taken:
            raise RequestError(f"chat_template_kwargs: '{taken[0]}' is not to be set there")
        return {name: self._field("chat_template_kwargs", value, marks) for name, value in given.items()}

    def _parted(self, text: str, opening: str, closing: str) -> list[str]:
        """Text at its marked words. A template that cuts text at such a word leaves halves of marks, which mark nothing
        any more.
        """
        if self._special is None:
            return [text]
        parts = re.split(f"{opening}({self._special.pattern}){closing}", text)
        return [part.replace(opening, "").replace(closing, "") for part in parts]

    def _field(self, name: str, value: Any, marks: tuple[str, str]) -> Any:
        """As `_marked`.

        Raises:
            RequestError: its JSON has too many levels.
        """
        try:
            return self._marked(value, marks)
        except RecursionError:
            raise RequestError(f"{name}: the JSON is nested too deeply") from None

    def _marked(self, value: Any, marks: tuple[str, str]) -> Any:
        """JSON in which marks stand before and behind every special token's name."""
        match value:
            case str() if self._special is not None:
                return self._special.sub(lambda found: f"{marks[0]}{found[0]}{marks[1]}", value)
            case list():
                return [self._marked(member, marks) for member in value]
            case dict():
                return {self._marked(key, marks): self._marked(member, marks) for key, member in value.items()}
        return value

    def _template(self, with_tools: bool) -> str:
        templates = self.exported.templates
        if with_tools and _TOOLS_TEMPLATE in templates:
            return templates[_TOOLS_TEMPLATE]
        if "default" not in templates:
            raise RequestError("messages: the model has several chat templates and none of them is the default")
        return templates["default"]


def _without_null(message: Mapping[str, Any]) -> dict[str, Any]:
    """As apply_chat_template does."""
    return {key: value for key, value in message.items() if value is not None}


def _read_arguments(message: Mapping[str, Any]) -> None:
    """Makes the arguments of tool calls objects, as templates expect them and vLLM hands them over; OpenAI's are
    strings, and empty or null for none.
    """
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or "arguments" not in function:
            continue
        arguments = function["arguments"]
        if isinstance(arguments, str):
            try:
                arguments = msgspec.json.decode(arguments) if arguments.strip() else None
            except (msgspec.DecodeError, RecursionError):
                continue  # the template may know what to make of it
        if arguments is None or isinstance(arguments, dict):
            function["arguments"] = arguments or {}


def _read_list(name: str, text: str) -> list[Any]:
    try:
        return msgspec.json.decode(text, type=list[dict[str, Any]])
    except RecursionError:
        raise RequestError(f"{name}: the JSON is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise RequestError(f"{name}: expected a JSON list of objects: {error}") from None
    except msgspec.DecodeError as error:
        raise RequestError(f"{name}: not valid JSON: {error}") from None
