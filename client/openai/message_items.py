"""Anthropic's Messages API, on its way in: a body and its blocks → the chat that is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from paged_client.openai.conversation import settled
from paged_client.openai.errors import RefusalError
from paged_client.openai.protocol import ChatBody
from paged_client.openai.readable import ReadableBody

_FIRST = Field(fail_fast=True)
_BILLING_HEADER = "x-anthropic-billing-header:"
_EFFORTS = {"max": "xhigh"}  # the most that templates know


class Thinking(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0)] | None = None


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


def chat_of_messages(body: CountBody) -> ChatBody:
    """
    Raises:
        RefusalError: what cannot be asked, by its name in the body.
        pydantic.ValidationError: as for a chat.
    """
    instructions = _system(body.system)
    system = [{"role": "system", "content": instructions}] if instructions else []
    given_messages = [message for position, one in enumerate(body.messages) for message in _messages(position, one)]
    messages = settled([*system, *given_messages])
    choice = body.tool_choice or {}
    output, begun = body.output_config or OutputConfig(), _is_begun(messages[-1])
    if begun and output.format is not None:
        where = "output_config.format"
        raise RefusalError(f"{where}: not with an answer that the last message has begun", param=where)
    given: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "tools": [_tool(position, tool) for position, tool in enumerate(body.tools or ())] or None,
        "tool_choice": _choice(choice) if body.tools and choice else None,
        "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None,
        "chat_template_kwargs": _switches(body.thinking, output) or None,
        # an answer whose beginning the caller has written
        "continue_final_message": begun,
        "include_reasoning": body.thinking is not None and body.thinking.type != "disabled",
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
        thinks if output.effort is None else {**thinks, "reasoning_effort": _EFFORTS.get(output.effort, output.effort)}
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
    return _text("system", given)


def _messages(position: int, message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One turn: results of tools are messages of their own, before what the user says."""
    where = f"messages.{position}"
    role, content = message.get("role"), message.get("content")
    if role == "system":
        return [{"role": role, "content": _text(f"{where}.content", content)}]
    if role not in ("user", "assistant"):
        raise RefusalError(f"{where}.role: expected user, assistant or system", param=f"{where}.role")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise RefusalError(f"{where}.content: expected a string or a list of blocks", param=f"{where}.content")
    read = _Blocks()
    for at, block in enumerate(content):
        read.add(f"{where}.content.{at}", block)
    own: dict[str, Any] = {"role": role, "content": "\n".join(read.texts) if read.texts else None}
    if read.calls:
        own["tool_calls"] = read.calls
    if read.thoughts:
        own["reasoning_content"] = "\n".join(read.thoughts)
    return [*read.results, *([own] if len(own) > 2 or read.texts or not read.results else [])]


class _Blocks:
    """What the blocks of a turn have."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.thoughts: list[str] = []  # templates show those of the turn that goes on, between calls
        self.calls: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []

    def add(self, where: str, block: Any) -> None:
        match block:
            case {"type": "text", "text": str() as text}:
                self.texts.append(text)
            case {"type": "tool_use", "id": str() as call_id, "name": str() as name, "input": dict() as arguments}:
                function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
                self.calls.append({"id": call_id, "type": "function", "function": function})
            case {"type": "tool_result", "tool_use_id": str() as call_id}:
                text = _text(f"{where}.content", block.get("content", ""))
                self.results.append({"role": "tool", "tool_call_id": call_id, "content": text})
            case {"type": "thinking", "thinking": str() as thought}:
                self.thoughts.append(thought)
            case {"type": "redacted_thinking"}:
                pass
            case _:
                kind = str(block.get("type"))[:80] if isinstance(block, dict) else type(block).__name__
                raise RefusalError(f"{where}: no block of type '{kind}': not supported, or not complete", param=where)


def _text(where: str, content: Any) -> str:
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
