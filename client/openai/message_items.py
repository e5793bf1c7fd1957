"""Anthropic's Messages API, on its way in: a body and its blocks → the chat that is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from paged_client.openai.conversation import settled
from paged_client.openai.errors import RefusalError
from paged_client.openai.message_blocks import chat_messages, text_of
from paged_client.openai.protocol import ChatBody
from paged_client.openai.readable import ReadableBody
from paged_client.openai.translation import EFFORTS

_FIRST = Field(fail_fast=True)
_BILLING_HEADER = "x-anthropic-billing-header:"
# Types of tools that Anthropic runs itself or knows by heart: bash_20250124, web_search_20250305, computer_toolset_…
_OWN_TOOL = re.compile(r"_\d{8}$|_toolset$")


class Thinking(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    display: Literal["summarized", "omitted"] | None = None  # nothing is summarised

    @property
    def is_shown(self) -> bool:
        return self.type != "disabled" and self.display != "omitted"


class OutputConfig(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class CountBody(ReadableBody):
    """POST /v1/messages/count_tokens."""

    model: str
    messages: Annotated[list[dict[str, Any]], Field(fail_fast=True, min_length=1)]
    system: str | Annotated[list[dict[str, Any]], _FIRST] | None = None
    tools: Annotated[list[dict[str, Any]], _FIRST] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: Annotated[list[str], _FIRST] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Any = None
    service_tier: Any = None
    container: None = None


def chat_of_messages(body: CountBody, left_out: list[str]) -> ChatBody:
    """
    left_out: takes the places of what is not shown to the model.

    Raises:
        RefusalError: what cannot be asked, by its name in the body.
        pydantic.ValidationError: as for a chat.
    """
    instructions = _system(body.system)
    system = [{"role": "system", "content": instructions}] if instructions else []
    messages = settled(
        [*system, *(each for at, one in enumerate(body.messages) for each in chat_messages(at, one, left_out))]
    )
    tools = [_tool(at, tool) for at, tool in enumerate(body.tools or ()) if not _is_left_out(at, tool, left_out)]
    choice = body.tool_choice or {}
    output, begun = body.output_config or OutputConfig(), _is_begun(messages[-1])
    if begun and output.format is not None:
        where = "output_config.format"
        raise RefusalError(f"{where}: not with an answer that the last message has begun", param=where)
    given: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "tools": tools or None,
        "tool_choice": _choice(choice) if body.tools and choice else None,
        "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None,
        "chat_template_kwargs": _switches(body.thinking, output) or None,
        # an answer whose beginning the caller has written
        "continue_final_message": begun,
        "include_reasoning": body.thinking is not None and body.thinking.is_shown,
    }
    if isinstance(body, MessagesBody):
        if body.thinking is not None and body.thinking.type == "enabled":
            given["max_thinking_tokens"] = body.thinking.budget_tokens
        given |= {"max_tokens": body.max_tokens, "stream": body.stream, "stop": body.stop_sequences or None}
        given["include_stop_str_in_output"] = True if body.stop_sequences else None  # so that it can be told
        given["response_format"] = None if output.format is None else _response_format(output.format)
        given |= {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
        if body.stream:
            given["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return ChatBody.model_validate({name: value for name, value in given.items() if value is not None})


def _is_begun(last: Mapping[str, Any]) -> bool:
    return bool(last["role"] == "assistant" and last["content"] and not last.get("tool_calls"))


def _switches(thinking: Thinking | None, output: OutputConfig) -> dict[str, Any]:
    """By the names that templates have for them."""
    thinks = {} if thinking is None else dict.fromkeys(("enable_thinking", "thinking"), thinking.type != "disabled")
    return (
        thinks if output.effort is None else {**thinks, "reasoning_effort": EFFORTS.get(output.effort, output.effort)}
    )


def _response_format(given: Mapping[str, Any]) -> dict[str, Any]:
    match given:
        case {"type": "json_schema", "schema": dict() as schema}:
            return {"type": "json_schema", "json_schema": {"schema": schema}}
    where = "output_config.format"
    raise RefusalError(f"{where}: expected type json_schema with a schema", param=where)


def _system(given: str | list[dict[str, Any]] | None) -> str:
    """The system prompt, without the line of Claude Code that tells its maker whom to bill: it changes from request to
    request, and nothing after it would be found in the prefix cache.
    """
    if isinstance(given, list):
        given = [block for block in given if not str(block.get("text")).startswith(_BILLING_HEADER)]
    return text_of("system", given)


def _is_left_out(position: int, tool: Mapping[str, Any], left_out: list[str]) -> bool:
    kind = tool.get("type")
    if not isinstance(kind, str) or not _OWN_TOOL.search(kind):
        return False
    left_out.append(f"tools.{position}.{kind[:80]}")
    return True


def _tool(position: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    where = f"tools.{position}"
    if tool.get("type", "custom") not in ("custom", None):
        raise RefusalError(
            f"{where}.type: '{str(tool['type'])[:80]}' is not supported; only custom is", param=f"{where}.type"
        )
    if not isinstance(tool.get("name"), str) or not tool["name"]:
        raise RefusalError(f"{where}.name: missing", param=f"{where}.name")
    if not isinstance(tool.get("input_schema"), dict):
        raise RefusalError(f"{where}.input_schema: expected a JSON schema", param=f"{where}.input_schema")
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    function |= {name: tool[name] for name in ("description", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _choice(choice: Mapping[str, Any]) -> Any:
    match choice:
        case {"type": "auto" | "none" as kind}:
            return kind
        case {"type": "any"}:
            return "required"
        case {"type": "tool", "name": str() as name}:
            return {"type": "function", "function": {"name": name}}
    raise RefusalError("tool_choice: expected type auto, any, none, or tool with a name", param="tool_choice")
