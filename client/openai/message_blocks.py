"""Turns of Anthropic's Messages API, in blocks → messages of a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paged_client.openai.conversation import unread
from paged_client.openai.errors import RefusalError

_TEXTUAL = ("text", "search_result", "tool_reference")  # where one is not read, it is not complete
_SAYS_SO = ("error", "<error", "<tool_use_error")  # how a result begins that need not be told to be an error


@dataclass
class _Blocks:
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)  # templates show those of the turn that goes on, between calls
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)


def chat_messages(position: int, message: Mapping[str, Any], left_out: list[str]) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, before what the user says. left_out: takes the places of what is not
    shown to the model.

    Raises:
        RefusalError: a block that cannot be read, by its place.
    """
    where = f"messages.{position}"
    role, content = message.get("role"), message.get("content")
    if role == "system":
        return [{"role": role, "content": text_of(f"{where}.content", content)}]
    if role not in ("user", "assistant"):
        raise RefusalError(f"{where}.role: expected user, assistant or system", param=f"{where}.role")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise RefusalError(f"{where}.content: expected a string or a list of blocks", param=f"{where}.content")
    found = _Blocks()
    for at, block in enumerate(content):
        _read(f"{where}.content.{at}", block, found, left_out)
    own: dict[str, Any] = {"role": role, "content": "\n".join(found.texts) or (None if found.calls else "")}
    if found.calls:
        own["tool_calls"] = found.calls
    if found.thoughts:
        own["reasoning_content"] = "\n".join(found.thoughts)
    return [*found.results, *([own] if len(own) > 2 or found.texts or not found.results else [])]


def _read(where: str, block: Any, found: _Blocks, left_out: list[str]) -> None:
    text = _text_of_block(block)
    match block:
        case _ if text is not None:
            found.texts.append(text)
        case {"type": "tool_use", "id": str() as call_id, "name": str() as name, "input": dict() as arguments}:
            function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
            found.calls.append({"id": call_id, "type": "function", "function": function})
        case {"type": "tool_result", "tool_use_id": str() as call_id}:
            text = _text_of_result(f"{where}.content", block.get("content", ""), left_out)
            if block.get("is_error") is True and not text.lstrip().lower().startswith(_SAYS_SO):
                text = f"Error: {text}"
            found.results.append({"role": "tool", "tool_call_id": call_id, "content": text})
        case {"type": "thinking", "thinking": str() as thought}:
            found.thoughts.append(thought)
        case {"type": "redacted_thinking"}:
            pass
        case {"type": str() as kind} if kind in ("server_tool_use", "mcp_tool_use") or kind.endswith("_tool_result"):
            left_out.append(f"{where}.{kind}")  # of a tool that Anthropic runs itself
        case _:
            kind = str(block.get("type"))[:80] if isinstance(block, dict) else type(block).__name__
            raise RefusalError(f"{where}: no block of type '{kind}': not supported, or not complete", param=where)


def _text_of_block(block: Any) -> str | None:
    """None: it has no text that could be read."""
    match block:
        case {"type": "text", "text": str() as text}:
            return text
        case {"type": "search_result", "content": list() as parts, **about}:
            texts = [_text_of_block(part) for part in parts]
            return "\n".join([*_words(about, "title", "source"), *(text for text in texts if text is not None)])
        case {"type": "document", "source": {"type": "text", "data": str() as text}, **about}:
            return "\n".join([*_words(about, "title", "context"), text])
        case {"type": "document", "source": {"type": "content", "content": str() | list() as parts}, **about}:
            texts = [parts] if isinstance(parts, str) else [_text_of_block(part) for part in parts]
            if None not in texts:
                return "\n".join([*_words(about, "title", "context"), *map(str, texts)])
        case {"type": "tool_reference", "tool_name": str() as name}:
            return f"The tool {name} can be called."
    return None


def _words(about: Mapping[str, Any], *names: str) -> list[str]:
    return [str(about[name]) for name in names if about.get(name)]


def _text_of_result(where: str, content: Any, left_out: list[str]) -> str:
    """An agent cannot take back what its tool has found: the model is told of what it cannot read, and goes on."""
    if not isinstance(content, list):
        return text_of(where, content)
    texts = []
    for at, block in enumerate(content):
        text = _text_of_block(block)
        if text is None:
            kind = block.get("type") if isinstance(block, dict) else None
            if not isinstance(kind, str) or kind in _TEXTUAL:
                raise RefusalError(f"{where}.{at}: no block, or not complete", param=f"{where}.{at}")
            text = unread(kind[:80])
            left_out.append(f"{where}.{at}.{kind[:80]}")
        texts.append(text)
    return "\n".join(texts)


def text_of(where: str, content: Any) -> str:
    """Of what may hold text only."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, type(None))):
        raise RefusalError(f"{where}: expected a string or a list of blocks", param=where)
    texts = []
    for block in content or ():
        match block:
            case {"type": "text", "text": str() as text}:
                texts.append(text)
            case _:
                raise RefusalError(f"{where}: only blocks of type text are supported", param=where)
    return "\n".join(texts)
