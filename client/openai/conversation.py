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
    settled: list[dict[str, Any]] = []
    for at, message in enumerate(messages):
        if message["role"] in _SYSTEM and at >= num_before:
            message = {"role": "user", "content": f"<system-reminder>\n{message['content']}\n</system-reminder>"}
        if settled and message["role"] != "tool" and (settled[-1]["role"] == message["role"] or at < num_before):
            message = _together(settled.pop(), message)
        settled.append(message)
    return [_with_content(message) for message in settled]


def _with_content(message: dict[str, Any]) -> dict[str, Any]:
    """Null is for calls alone: a turn of which only the thoughts were told has none to take its place."""
    return message if message["content"] or message.get("tool_calls") else {**message, "content": ""}


def _together(before: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
    together = {"role": before["role"], "content": _joined(before, message, "content") or None}
    calls = [*before.get("tool_calls", ()), *message.get("tool_calls", ())]
    thought = _joined(before, message, "reasoning_content")
    return together | ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": thought} if thought else {})


def _joined(before: dict[str, Any], message: dict[str, Any], member: str) -> str:
    return "\n".join(filter(None, (before.get(member), message.get(member))))
