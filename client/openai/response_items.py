"""OpenAI's Responses API, on its way in: a body and its items → the chat that is asked for."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from paged_client.openai.conversation import settled
from paged_client.openai.errors import RefusalError
from paged_client.openai.protocol import ChatBody
from paged_client.openai.readable import ReadableBody
from paged_client.openai.response_tools import ResponseTools, calls_of

_REFUSED = ("background", "conversation", "prompt")
_FIRST = Field(fail_fast=True)
_SEAL = "paged:"  # begins what `sealed` writes
SEALED_THOUGHTS = "reasoning.encrypted_content"  # of `include`


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Any = None  # nothing is summarised: what the model thinks is told


class ResponsesBody(ReadableBody):
    """POST /v1/responses."""

    model: str
    input: str | Annotated[list[dict[str, Any]], _FIRST]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: Annotated[list[dict[str, Any]], _FIRST] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, Any] | None = None
    # The answer is the same without.
    user: Any = None
    include: Any = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    stream_options: Any = None
    top_logprobs: Literal[0] | None = None
    max_tool_calls: Any = None
    # vLLM's
    seed: int | None = None
    top_k: int | None = None
    request_id: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # ours, as in a chat
    max_thinking_tokens: Annotated[int, Field(ge=0)] | None = None
    # Refused if given.
    background: Any = None
    conversation: Any = None
    prompt: Any = None


def chat_body(body: ResponsesBody, tools: ResponseTools, earlier: Sequence[dict[str, Any]]) -> ChatBody:
    """tools: of the body. earlier: the messages of the response that goes before, its answer included.

    Raises:
        RefusalError: what cannot be asked, by its name in the body.
    """
    for name in _REFUSED:
        if getattr(body, name):
            raise RefusalError(f"{name}: not supported", param=name, code="unsupported_parameter")
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    given = {
        "model": body.model,
        "messages": settled([*system, *earlier, *messages_of(body.input)]),
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "seed": body.seed,
        "stream": body.stream,
        "stream_options": {"include_usage": True} if body.stream else None,
        "tools": tools.functions or None,
        "tool_choice": tools.choice(body.tool_choice) if body.tools else None,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _response_format(body.text),
        "reasoning_effort": body.reasoning.effort if body.reasoning is not None else None,
        "chat_template_kwargs": body.chat_template_kwargs,
        "max_thinking_tokens": body.max_thinking_tokens,
        "request_id": body.request_id,
    }
    return ChatBody.model_validate({name: value for name, value in given.items() if value is not None})


def messages_of(items: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chat's messages. Calls of one turn are one message's, together with the text before them.

    Raises:
        RefusalError: an item is of a kind that this model cannot read.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages = [message for position, item in enumerate(items) for message in _messages(position, item)]
    if not messages:
        raise RefusalError("input: there is nothing in it", param="input")
    return messages


def _messages(position: int, item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    calls = [*calls_of(item)]
    if calls:
        yield {"role": "assistant", "content": None, "tool_calls": calls}
        return
    match item:
        case {
            "type": "function_call_output" | "custom_tool_call_output",
            "call_id": str() as call_id,
            "output": str() | list() as output,
        }:
            yield {"role": "tool", "tool_call_id": call_id, "content": _text(f"input.{position}.output", output)}
        case {"type": "function_call_output" | "custom_tool_call_output", "call_id": str()}:
            where = f"input.{position}.output"
            raise RefusalError(f"{where}: expected a string or a list of parts", param=where)
        case {"type": "reasoning"}:
            thought = thought_of(item)
            if thought:  # templates show those of the turn that goes on, between calls
                yield {"role": "assistant", "content": None, "reasoning_content": thought}
        case {"role": str() as role, "content": str() | list() as content} if item.get("type", "message") == "message":
            yield {"role": role, "content": _text(f"input.{position}.content", content)}
        case {"type": str() as kind}:
            raise RefusalError(
                f"input.{position}: no item of type '{kind[:80]}': not supported, or not complete",
                param=f"input.{position}",
            )
        case _:
            raise RefusalError(
                f"input.{position}: expected an item with a type, or with role and content", param=f"input.{position}"
            )


def thought_of(item: Mapping[str, Any]) -> str:
    """What an item of type reasoning says; "": it does not."""
    match item:
        case {"content": [_, *_] as parts}:
            return "\n".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
        case {"encrypted_content": str() as sealed} if sealed.startswith(_SEAL):
            with suppress(ValueError):
                return base64.b64decode(sealed.removeprefix(_SEAL), validate=True).decode()
    return ""


def sealed(thought: str) -> str:
    """A thought for an agent that keeps no text of thoughts and gives back what it does not understand. It is coded,
    not encrypted: the caller may read it anyway.
    """
    return _SEAL + base64.b64encode(thought.encode()).decode()


def _text(where: str, content: str | Sequence[Any]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        match part:
            case {"type": "input_text" | "output_text" | "text", "text": str() as text} | {
                "type": "refusal",
                "refusal": str() as text,
            }:
                texts.append(text)
            case _:
                kind = str(part.get("type"))[:80] if isinstance(part, dict) else type(part).__name__
                raise RefusalError(f"{where}: no part of type '{kind}': this model reads text", param=where)
    return "\n".join(texts)


def _response_format(text: Mapping[str, Any] | None) -> Any:
    match text:
        case None | {"format": None} | {"format": {"type": "text"}}:
            return None
        case {"format": {"type": "json_schema", "schema": dict() as schema}}:
            return {"type": "json_schema", "json_schema": {"schema": schema}}
        case {"format": {"type": "json_object"}}:
            return {"type": "json_object"}
        case {"format": _}:
            raise RefusalError(
                "text.format: expected type text, json_object, or json_schema with a schema", param="text.format"
            )
    return None
