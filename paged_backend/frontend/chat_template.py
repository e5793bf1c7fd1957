"""Chat messages to a prompt's text, by the model's own template. transformers does it, without torch (its `chat_template_utils` needs none).

The engine exports the checkpoint's template beside tokenizer.json (models/tokenizer.py); front ends read that file.
Special tokens are the template's to write. Where a caller's own words spell one, they stay words: nobody ends a turn or speaks as the system from within one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from paged_backend.errors import RequestError
from paged_backend.messages import ExportedTemplate
from paged_backend.request import Chat

_OWN_VARIABLES = frozenset(
    ["self", "conversations", "messages", "tools", "chat_template", "return_assistant_tokens_mask", "continue_final_message", "add_generation_prompt"]
)  # of the template's caller, or of render_jinja_template's
_TOOLS_TEMPLATE = "tool_use"


class ChatTemplate:
    """A checkpoint's chat template. Thread-safe."""

    def __init__(self, exported: ExportedTemplate, special_words: Sequence[str] = ()) -> None:
        """special_words: how the tokenizer's special tokens are spelled."""
        self._exported = exported
        longest_first = sorted(special_words, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @classmethod
    def load(cls, path: Path, special_words: Sequence[str] = ()) -> ChatTemplate | None:
        """None if there is no such file: the checkpoint has no chat template."""
        return cls(msgspec.json.decode(path.read_bytes(), type=ExportedTemplate), special_words) if path.exists() else None

    def warm(self) -> None:
        """Imports what rendering needs, so that the first caller does not wait for it."""
        import transformers.utils.chat_template_utils  # noqa: F401

    def render(self, chat: Chat) -> list[str]:
        """The prompt's text, special tokens included, in parts: the second, fourth, … are words of the caller's that only look like special tokens.

        Raises:
            RequestError: the messages are not what they should be, or the template refuses them; in the template's own words.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = _read_list("messages", chat.messages)
        if not messages:
            raise RequestError("messages: the list is empty")
        tools = None if chat.tools is None else _read_list("tools", chat.tools)
        marks = secrets.token_hex(16), secrets.token_hex(16)  # before and behind such words on their way through the template; nobody can have guessed them
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]  # as apply_chat_template does
        for position, message in enumerate(given):
            if not isinstance(message.get("role"), str):
                raise RequestError(f"messages: entry {position} has no role")
        variables = self._exported.special_tokens | self._kwargs(chat.template_kwargs, marks)
        try:
            rendered: Any = render_jinja_template(  # (one text a conversation, something about each)
                conversations=[self._marked(given, marks)],
                tools=self._marked(tools, marks),
                chat_template=self._template(with_tools=bool(tools)),
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
                **variables,
            )
        except Exception as error:  # a template may raise anything, and every bit of it was caused by what the caller sent
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise RequestError(f"messages: the model's chat template refuses them: {reason[:500]}") from None
        text: str = rendered[0][0]
        return self._parted(text, *marks)

    def _kwargs(self, given: Mapping[str, Any], marks: tuple[str, str]) -> dict[str, Any]:
        taken = sorted(given.keys() & (_OWN_VARIABLES | self._exported.special_tokens.keys()))
        if taken:
            raise RequestError(f"chat_template_kwargs: '{taken[0]}' is not to be set there")
        return {name: self._marked(value, marks) for name, value in given.items()}

    def _parted(self, text: str, opening: str, closing: str) -> list[str]:
        """Text at its marked words. A template that cuts text at such a word leaves halves of marks, which mark nothing any more."""
        if self._special is None:
            return [text]
        parts = re.split(f"{opening}({self._special.pattern}){closing}", text)
        return [part.replace(opening, "").replace(closing, "") for part in parts]

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
        templates = self._exported.templates
        if with_tools and _TOOLS_TEMPLATE in templates:
            return templates[_TOOLS_TEMPLATE]
        if "default" not in templates:
            raise RequestError("messages: the model has several chat templates and none of them is the default")
        return templates["default"]


def _read_list(name: str, text: str) -> list[Any]:
    try:
        return msgspec.json.decode(text, type=list[dict[str, Any]])
    except RecursionError:
        raise RequestError(f"{name}: the JSON is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise RequestError(f"{name}: expected a JSON list of objects: {error}") from None
    except msgspec.DecodeError as error:
        raise RequestError(f"{name}: not valid JSON: {error}") from None
