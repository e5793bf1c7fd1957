"""Turns of a conversation as chat templates take them: agents write the system's words and two turns of one side
wherever they like, and most templates refuse what is not one system prompt and then turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SYSTEM = ("system", "developer")


def settled(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of a chat, of which system and developer ones that begin the conversation become one, turns of one role
    that follow each other become one, and what the system says between turns is told in a user's turn, marked as Claude
    Code marks it there. Results of tools stay apart.
    """
    num_before = next((at for at, one in enumerate(messages) if one["role"] not in _SYSTEM), len(messages))
    groups: list[list[dict[str, Any]]] = []
    for at, message in enumerate(messages):
        if message["role"] in _SYSTEM and at >= num_before:
            message = {"role": "user", "content": f"<system-reminder>\n{message['content']}\n</system-reminder>"}
        same = bool(groups) and (groups[-1][0]["role"] == message["role"] or at < num_before)
        if same and message["role"] != "tool":
            groups[-1].append(message)
        else:
            groups.append([message])
    return [_with_content(group[0] if len(group) == 1 else _together(group)) for group in groups]


def _with_content(message: dict[str, Any]) -> dict[str, Any]:
    """Null is for calls alone: a turn of which only the thoughts were told has none to take its place."""
    return message if message["content"] or message.get("tool_calls") else {**message, "content": ""}


def unread(kind: str) -> str:
    """What a model that reads text is told in a tool's result instead of a picture or the like: it may go on."""
    return f"[{kind}: left out, since only text can be read here]"


def _together(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    together = {"role": group[0]["role"], "content": _joined(group, "content") or None}
    calls = [call for each in group for call in each.get("tool_calls", ())]
    thought = _joined(group, "reasoning_content")
    return together | ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": thought} if thought else {})


def _joined(group: Sequence[dict[str, Any]], member: str) -> str:
    return "\n".join(filter(None, (each.get(member) for each in group)))
