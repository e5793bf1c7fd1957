"""Tools of the Responses API: functions of a namespace and tools that take plain text, as functions of a chat, and
their calls back in this API's shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from paged_client.openai.errors import RefusalError
from paged_client.openai.plain_text import TEXT_ARGUMENT, arguments_of

# What OpenAI runs itself or knows by heart: a model that is served here has not learned them. Agents offer them always.
_LEFT_OUT = (
    "web_search",
    "web_search_preview",
    "file_search",
    "code_interpreter",
    "image_generation",
    "mcp",
    "computer",
    "computer_use_preview",
    "local_shell",
    "shell",
    "apply_patch",
    "tool_search",
    "programmatic_tool_calling",
)
_DATE = re.compile(r"_\d{4}_\d{2}_\d{2}$")  # of a tool's version, behind its type
_BETWEEN = "__"  # a namespace and the name in it


class ResponseTools:
    """A body's tools.

    functions: for a chat. left_out: places in the body of what only OpenAI has.

    Raises:
        RefusalError: a tool is of a kind that cannot be had, or not described as it must be.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self.functions: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self._names: set[str] = set()  # in the chat
        self._of_namespaces: dict[str, tuple[str, str]] = {}  # namespace and name, by the chat's name
        self._texts: set[str] = set()  # names in the chat of tools that take plain text
        for position, tool in enumerate(tools):
            where = f"tools.{position}"
            if tool.get("type") == "namespace":
                self._add_namespace(where, tool)
            elif _is_left_out(tool):
                self.left_out.append(f"{where}.{tool['type']}")
            else:
                self._add(where, tool, "")

    def _add_namespace(self, where: str, namespace: Mapping[str, Any]) -> None:
        name, tools = namespace.get("name"), namespace.get("tools")
        if not isinstance(name, str) or not name:
            raise RefusalError(f"{where}.name: missing", param=f"{where}.name")
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise RefusalError(f"{where}.tools: expected a list of tools", param=f"{where}.tools")
        for position, tool in enumerate(tools):
            self._add(f"{where}.tools.{position}", tool, name)

    def _add(self, where: str, tool: Mapping[str, Any], namespace: str) -> None:
        kind, name = tool.get("type"), tool.get("name")
        if kind not in ("function", "custom"):
            said = f"'{str(kind)[:80]}' is not supported; function, custom and namespace are"
            raise RefusalError(f"{where}.type: {said}", param=f"{where}.type")
        if not isinstance(name, str) or not name:
            raise RefusalError(f"{where}.name: missing", param=f"{where}.name")
        if not isinstance(tool.get("parameters"), (dict, type(None))):
            raise RefusalError(f"{where}.parameters: expected a JSON schema", param=f"{where}.parameters")
        flat = chat_name(name, namespace)
        if flat in self._names:
            raise RefusalError(f"{where}.name: there are two tools '{flat[:80]}'", param=f"{where}.name")
        self._names.add(flat)
        if namespace:
            self._of_namespaces[flat] = (namespace, name)
        if kind == "custom":
            self._texts.add(flat)
            function = {"description": _described(tool), "parameters": TEXT_ARGUMENT}
        else:
            kept = ("description", "parameters", "strict")
            function = {key: tool[key] for key in kept if tool.get(key) is not None}
        self.functions.append({"type": "function", "function": {"name": flat, **function}})

    def choice(self, choice: str | Mapping[str, Any] | None) -> Any:
        """A body's tool_choice as a chat has it.

        Raises:
            RefusalError: it names a tool that has no name.
        """
        match choice:
            case {"type": "function" | "custom", "name": str()}:
                return _named("tool_choice", choice)
            case {"type": "allowed_tools", "mode": mode, "tools": [*tools]}:
                named = [
                    _named(f"tool_choice.tools.{at}", tool) for at, tool in enumerate(tools) if not _is_left_out(tool)
                ]
                return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
        return choice

    def is_text(self, name: str) -> bool:
        """Whether the tool of this name in the chat takes plain text."""
        return name in self._texts

    def names(self, name: str) -> dict[str, str]:
        """How this API names the tool of this name in the chat."""
        namespace, own = self._of_namespaces.get(name, ("", name))
        return {"name": own, "namespace": namespace} if namespace else {"name": own}


def _is_left_out(tool: Any) -> bool:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return isinstance(kind, str) and _DATE.sub("", kind) in _LEFT_OUT


def chat_name(name: str, namespace: Any) -> str:
    """A tool's name in a chat, which has no namespaces."""
    return f"{namespace}{_BETWEEN}{name}" if isinstance(namespace, str) and namespace else name


def call_of(item: Mapping[str, Any]) -> dict[str, Any] | None:
    """The chat's call that an item of an earlier answer is; None: it is none."""
    match item:
        case {"type": "function_call", "call_id": str() as call_id, "name": str() as name, "arguments": str() as given}:
            arguments = given
        case {"type": "custom_tool_call", "call_id": str() as call_id, "name": str() as name, "input": str() as given}:
            arguments = arguments_of(given)
        case _:
            return None
    function = {"name": chat_name(name, item.get("namespace")), "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def _named(where: str, tool: Any) -> dict[str, Any]:
    name = tool.get("name") if isinstance(tool, dict) else None
    if not isinstance(name, str):
        raise RefusalError(f"{where}: expected a tool's type and name", param=where)
    return {"type": "function", "function": {"name": chat_name(name, tool.get("namespace"))}}


def _described(tool: Mapping[str, Any]) -> str:
    """A tool that takes plain text, with the grammar of that text where it has one: the model reads it."""
    texts = [str(tool.get("description") or "")]
    match tool.get("format"):
        case {"type": "grammar", "definition": str() as definition, **others}:
            texts.append(f"input follows this grammar ({str(others.get('syntax'))[:20]}):\n{definition}")
    return "\n\n".join(filter(None, texts))
