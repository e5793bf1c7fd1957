"""OpenAI's Responses API, on its way in: a body and its items → the chat that is asked for."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from paged_client.openai.conversation import settled, unread
from paged_client.openai.errors import RefusalError
from paged_client.openai.protocol import ChatBody, Effort
from paged_client.openai.readable import ReadableBody
from paged_client.openai.response_tools import ResponseTools, call_of

_REFUSED = ("background", "conversation", "prompt")
_ROLES = ("user", "assistant", "system", "developer")
SEALED_THOUGHTS = "reasoning.encrypted_content"  # of `include`
_LOGPROBS = "message.output_text.logprobs"
# Known: what there is nothing of here, and the thoughts.
_INCLUDED = (
    SEALED_THOUGHTS,
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
# Of tools that OpenAI runs itself or knows by heart, in a conversation that began there.
_LEFT_OUT = (
    *("web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call"),
    *("mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "mcp_call"),
    *("computer_call", "computer_call_output", "local_shell_call", "local_shell_call_output"),
    *("shell_call", "shell_call_output", "apply_patch_call", "apply_patch_call_output"),
    *("tool_search_call", "tool_search_output", "program", "program_output"),
    *("configuration_update", "compaction_trigger"),
)
_FIRST = Field(fail_fast=True)
_SEAL = "paged:"  # begins what `sealed` writes
# of metadata, as OpenAI has it
_MAX_PAIRS, _LONGEST_KEY, _LONGEST_VALUE = 16, 64, 512


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    effort: Effort | None = None
    summary: Any = None  # nothing is summarised: what the model thinks is told


class ResponsesBody(ReadableBody):
    """POST /v1/responses."""

    model: str
    input: str | Annotated[list[dict[str, Any]], _FIRST] | None = None
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
    include: Annotated[list[str], _FIRST] | None = None
    # The answer is the same without.
    user: Any = None
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


def chat_body(
    body: ResponsesBody,
    tools: ResponseTools,
    earlier: Sequence[Mapping[str, Any]],
    given: Sequence[Mapping[str, Any]],
    left_out: list[str],
) -> ChatBody:
    """tools: of the body. earlier: items of the conversation before. given: the body's own. left_out: takes the places
    of what is not shown to the model.

    Raises:
        RefusalError: what cannot be asked, by its name in the body.
    """
    for name in _REFUSED:
        if getattr(body, name):
            raise RefusalError(f"{name}: not supported", param=name, code="unsupported_parameter")
    _check_metadata(body.metadata or {})
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages = [*messages_of(earlier, []), *messages_of(given, left_out)]
    if not messages:
        raise RefusalError("input: there is nothing in it", param="input")
    members = {
        "model": body.model,
        "messages": settled([*system, *messages]),
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
    return ChatBody.model_validate({name: value for name, value in members.items() if value is not None})


def without_effect(body: ResponsesBody) -> list[str]:
    """Names in the body of what is known, and not followed.

    Raises:
        RefusalError: something that the caller cannot have overlooked would be missing.
    """
    include = body.include or []
    if _LOGPROBS in include:
        raise RefusalError(f"include: '{_LOGPROBS}' is not to be had here", param="include")
    names = [f"include.{name[:80]}" for name in include if name not in _INCLUDED]
    names += ["truncation"] if body.truncation == "auto" else []
    return names + [f"text.{name[:80]}" for name in body.text or () if name != "format"]


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    if len(metadata) > _MAX_PAIRS:
        raise RefusalError(f"metadata: {len(metadata)} pairs; the most allowed is {_MAX_PAIRS}", param="metadata")
    for key, value in metadata.items():
        if len(key) > _LONGEST_KEY or not isinstance(value, str) or len(value) > _LONGEST_VALUE:
            where = f"metadata.{key[:_LONGEST_KEY]}"
            reason = f"expected a key of {_LONGEST_KEY} characters at most and a text of {_LONGEST_VALUE} at most"
            raise RefusalError(f"{where}: {reason}", param=where)


def messages_of(items: Sequence[Mapping[str, Any]], left_out: list[str]) -> list[dict[str, Any]]:
    """A chat's messages; `settled` puts calls of one turn and the text before them together. left_out: takes the places
    of what is not shown to the model.

    Raises:
        RefusalError: an item is of a kind that this model cannot read.
    """
    return [message for position, item in enumerate(items) for message in _messages(position, item, left_out)]


def _messages(position: int, item: Mapping[str, Any], left_out: list[str]) -> Iterator[dict[str, Any]]:
    where = f"input.{position}"
    call = call_of(item)
    if call is not None:
        yield {"role": "assistant", "content": None, "tool_calls": [call]}
        return
    match item:
        case {
            "type": "function_call_output" | "custom_tool_call_output",
            "call_id": str() as call_id,
            "output": str() | list() as output,
        }:
            yield {"role": "tool", "tool_call_id": call_id, "content": _text(f"{where}.output", output, left_out)}
        case {"type": "function_call_output" | "custom_tool_call_output", "call_id": str()}:
            said = f"{where}.output: expected a string or a list of parts"
            raise RefusalError(said, param=f"{where}.output")
        case {"type": "reasoning"}:
            thought = thought_of(item)
            if thought:  # templates show those of the turn that goes on, between calls
                yield {"role": "assistant", "content": None, "reasoning_content": thought}
        case {"type": str() as kind} if kind in _LEFT_OUT:
            left_out.append(f"{where}.{kind}")
        case {"role": str() as role, "content": str() | list() as content} if item.get("type", "message") == "message":
            if role not in _ROLES:
                raise RefusalError(f"{where}.role: expected one of {', '.join(_ROLES)}", param=f"{where}.role")
            yield {"role": role, "content": _text(f"{where}.content", content, None)}
        case {"type": str() as kind}:
            reason = f"{where}: no item of type '{kind[:80]}': not supported, or not complete"
            raise RefusalError(reason, param=where)
        case _:
            reason = f"{where}: expected an item with a type, or with role and content"
            raise RefusalError(reason, param=where)


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


def _text(where: str, content: str | Sequence[Any], left_out: list[str] | None) -> str:
    """left_out: takes the places of parts that are no text, in whose stead the model is told so; None: these are
    refused.
    """
    if isinstance(content, str):
        return content
    texts = []
    for place, part in enumerate(content):
        match part:
            case {"type": "input_text" | "output_text" | "text", "text": str() as text} | {
                "type": "refusal",
                "refusal": str() as text,
            }:
                texts.append(text)
            case {"type": "input_image" | "input_file" as kind} if left_out is not None:
                texts.append(unread(kind.removeprefix("input_")))
                left_out.append(f"{where}.{place}.{kind}")
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
