"""A body's tools and tool_choice: what the template is told of, and what the answer is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paged_client.openai.errors import RefusalError
from paged_client.openai.formats.families import ANY_MODEL, ToolFormat
from paged_client.openai.protocol import ChatBody

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolWishes:
    """What the caller wants of tools."""

    tools: Sequence[dict[str, Any]] = ()
    choice: Any = "auto"  # "auto", "required", or an object that names a tool or some
    parallel: bool = True

    @property
    def must_call(self) -> bool:
        if isinstance(self.choice, dict) and self.choice.get("type") == "allowed_tools":
            return bool(self.choice["allowed_tools"].get("mode") == "required")
        return self.choice != "auto"

    @property
    def enforces(self) -> bool:
        """Whether something about the calls must be enforced."""
        return self.choice != "auto" or any(tool["function"].get("strict") for tool in self.tools)


def tool_wishes(body: ChatBody) -> ToolWishes | None:
    """None: no tool may be called.

    Raises:
        RefusalError: a tool is not described as it must be, or the choice names none of them.
    """
    tools = body.tools or []
    for position, tool in enumerate(tools):
        _check_tool(position, tool)
    choice = body.tool_choice if body.tool_choice is not None else "auto"
    if choice not in ("none", "auto", "required"):
        _check_choice(choice, {tool["function"]["name"] for tool in tools})
    elif choice == "required" and not tools:
        raise RefusalError("tool_choice: 'required', and there are no tools", param="tool_choice")
    if choice == "none" or not tools:
        return None
    return ToolWishes(tools, choice, body.parallel_tool_calls is not False)


def format_for(wishes: ToolWishes, of_model: ToolFormat | None) -> ToolFormat | None:
    """How calls are to be read. What must come, in a format that cannot be enforced, comes as JSON."""
    if wishes.enforces and (of_model is None or not of_model.xgrammar):
        return ANY_MODEL
    return of_model


def structural_tag(wishes: ToolWishes, form: ToolFormat, begins_reasoning: bool) -> dict[str, Any]:
    """What the server is to hold the answer to. Where a call may come and need not, only strict tools' arguments are
    held.
    """
    if form.name == "harmony" and wishes.must_call:
        return _harmony_tag(wishes)
    return {
        "model": form.xgrammar,
        "tools": [_strict(tool, wishes.must_call) for tool in wishes.tools],
        "tool_choice": wishes.choice,
        "reasoning": "enabled" if begins_reasoning or form.name == "harmony" else "disabled",
        "parallel_tool_calls": wishes.parallel,
    }


def _harmony_tag(wishes: ToolWishes) -> dict[str, Any]:
    """One call, perhaps after some thought. The library's own tag (xgrammar 0.2.9) takes an empty answer, too."""
    thought = {
        "type": "tag",
        "begin": "<|channel|>analysis<|message|>",
        "content": {"type": "any_text"},
        "end": "<|end|>",
    }
    opening = {"type": "const_string", "value": "<|start|>assistant"}
    calls = [
        {
            "type": "tag",
            "begin": f"<|channel|>commentary to=functions.{tool['function']['name']} <|constrain|>json<|message|>",
            "content": {"type": "json_schema", "json_schema": tool["function"].get("parameters") or _NO_ARGUMENTS},
            "end": "<|call|>",
        }
        for tool in _choosable(wishes)
    ]
    first = {"type": "optional", "content": {"type": "sequence", "elements": [thought, opening]}}
    return {
        "type": "structural_tag",
        "format": {"type": "sequence", "elements": [first, {"type": "or", "elements": calls}]},
    }


def _choosable(wishes: ToolWishes) -> list[dict[str, Any]]:
    """The tools that the choice leaves."""
    match wishes.choice:
        case {"function": {"name": str() as name}}:
            names = {name}
        case {"allowed_tools": {"tools": [*allowed]}}:
            names = {tool["function"]["name"] for tool in allowed}
        case _:
            return list(wishes.tools)
    return [tool for tool in wishes.tools if tool["function"]["name"] in names]


def _strict(tool: dict[str, Any], must: bool) -> dict[str, Any]:
    function = tool["function"]
    enforced = must or bool(function.get("strict"))
    parameters = function.get("parameters") or _NO_ARGUMENTS
    kept = {"name": function["name"], "parameters": parameters, "strict": enforced}
    return {"type": "function", "function": kept}


def _check_tool(position: int, tool: dict[str, Any]) -> None:
    where = f"tools.{position}"
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise RefusalError(f'{where}: expected {{"type": "function", "function": {{…}}}}', param=where)
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RefusalError(f"{where}.function.name: missing", param=f"{where}.function.name")
    if not isinstance(function.get("parameters"), (dict, type(None))):
        raise RefusalError(f"{where}.function.parameters: expected a JSON schema", param=f"{where}.function.parameters")


def _check_choice(choice: Any, names: set[str]) -> None:
    match choice:
        case {"type": "function", "function": {"name": str() as name}}:
            named = [name]
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required", "tools": [*allowed]}}:
            named = [_allowed_name(position, tool) for position, tool in enumerate(allowed)]
        case _:
            raise RefusalError(
                "tool_choice: expected none, auto, required, or an object that names a tool", param="tool_choice"
            )
    unknown = [name for name in named if name not in names]
    if unknown or not named:
        raise RefusalError(f"tool_choice: there is no tool '{[*unknown, ''][0][:80]}'", param="tool_choice")


def _allowed_name(position: int, tool: Any) -> str:
    match tool:
        case {"type": "function", "function": {"name": str() as name}}:
            return name
    where = f"tool_choice.allowed_tools.tools.{position}"
    raise RefusalError(f'{where}: expected {{"type": "function", "function": {{"name": …}}}}', param=where)
