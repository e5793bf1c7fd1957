"""A body in OpenAI's words → what our server is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from paged_client.openai.conversation import unread
from paged_client.openai.errors import RefusalError
from paged_client.openai.protocol import MAX_PROMPTS, Body, ChatBody, CompletionBody, SamplingKeys
from paged_client.openai.readable import fault
from paged_client.question import Prompt

_COMPLETION_MAX_TOKENS = 16  # OpenAI's default, and vLLM's
_REFUSED = ("audio", "functions", "function_call", "web_search_options", "chat_template", "documents")
_INSTEAD = {"functions": "; use tools", "function_call": "; use tool_choice"}
_SYSTEM_ROLES = ("system", "developer")  # the same, by the older name that templates know
EFFORTS = {"max": "xhigh"}  # the most that templates know
_PARAMS_OF_PROMPT = {"text_input": "prompt", "input_ids": "prompt"}


@dataclass(frozen=True)
class Asked:
    """One request to the gateway: one request to the server for each of its prompts."""

    prompts: tuple[Prompt | None, ...]  # None: the messages
    sampling: Mapping[str, Any]  # as PagedClient takes it
    num_choices: int  # of each prompt
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    continue_final_message: bool = False
    cache_salt: str = ""
    request_id: str = ""  # in the server's log
    echoed: tuple[str, ...] = ()  # what each prompt's choices begin with
    first_tokens: tuple[str, ...] = ()  # of each prompt whose log-probabilities are echoed: it has none itself
    prompt_only: bool = False  # nothing of the answer is wanted
    left_out: tuple[str, ...] = ()  # places of parts that are not shown to the model, which is told so
    # the server's names of fields → the body's, where they differ
    params: Mapping[str, str] = field(default_factory=dict)


def asked_of_completion(body: CompletionBody) -> Asked:
    """
    Raises:
        RefusalError: what cannot be asked of the server, by its name in the body.
    """
    prompts = _prompts(body.prompt)
    if body.suffix:
        raise RefusalError(
            "suffix: not supported: the model continues text, it does not fill gaps",
            param="suffix",
            code="unsupported_parameter",
        )
    prompt_only = body.max_tokens == 0 and bool(body.echo)  # the server makes a token at least
    sampling = _sampling(body) | {
        "max_tokens": _COMPLETION_MAX_TOKENS if body.max_tokens is None else 1 if prompt_only else body.max_tokens,
        "logprobs": body.logprobs,
        "prompt_logprobs": body.logprobs if body.echo else None,
    }
    _check_stream(body)
    return Asked(
        prompts=prompts,
        sampling=sampling,
        num_choices=body.n or 1,
        cache_salt=body.cache_salt or "",
        prompt_only=prompt_only,
        params=_PARAMS_OF_PROMPT | {"prompt_logprobs": "logprobs"} | _params_of(body),
    )


def asked_of_chat(body: ChatBody) -> Asked:
    """
    Raises:
        RefusalError: what cannot be asked of the server, by its name in the body.
    """
    for name in _REFUSED:
        if getattr(body, name) is not None:
            raise RefusalError(
                f"{name}: not supported{_INSTEAD.get(name, '')}", param=name, code="unsupported_parameter"
            )
    if body.top_logprobs is not None and not body.logprobs:
        raise RefusalError("top_logprobs: logprobs must be true with it", param="top_logprobs")
    if body.add_generation_prompt is not None and body.add_generation_prompt == body.continue_final_message:
        raise RefusalError(
            "add_generation_prompt: true for a new turn, false with continue_final_message",
            param="add_generation_prompt",
        )
    _check_stream(body)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = (
        _params_of(body)
        | {"logprobs": "top_logprobs"}
        | ({} if body.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"})
    )
    defaults = True if body.generation_defaults is None else body.generation_defaults  # as `vllm serve` has it
    own = {
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "chat_template_kwargs": template_kwargs(body),
        "generation_defaults": defaults,
    }
    left_out: list[str] = []
    messages = [message_of(position, message, left_out) for position, message in enumerate(body.messages)]
    return Asked(
        prompts=(None,),
        sampling=_sampling(body) | own,
        num_choices=body.n or 1,
        messages=messages,
        left_out=tuple(left_out),
        tools=None if body.tool_choice == "none" else template_tools(body.tools),
        continue_final_message=body.continue_final_message,
        cache_salt=body.cache_salt or "",
        params=params,
    )


def template_kwargs(body: ChatBody) -> dict[str, Any] | None:
    """With the effort as templates know it: gpt-oss's and others' have the word, Qwen's and DeepSeek's a switch."""
    if body.reasoning_effort is None:
        return body.chat_template_kwargs
    thinks = body.reasoning_effort != "none"
    effort = {"reasoning_effort": EFFORTS.get(body.reasoning_effort, body.reasoning_effort)} if thinks else {}
    return {**effort, "enable_thinking": thinks, "thinking": thinks, **(body.chat_template_kwargs or {})}


def with_adapter(asked: Asked, adapter: str) -> Asked:
    """adapter: named by the body's model, "" if by none.

    Raises:
        RefusalError: lora_name names one too.
    """
    if not adapter:
        return asked
    if asked.sampling.get("lora_name") is not None:
        raise RefusalError("lora_name: not together with a model that names an adapter itself", param="lora_name")
    return replace(
        asked,
        sampling={**asked.sampling, "lora_name": adapter},
        params={**asked.params, "lora_name": "model"},
    )


def _sampling(body: Body) -> dict[str, Any]:
    """The keys that have the same name on both sides, and response_format."""
    given = {name: getattr(body, name) for name in SamplingKeys.model_fields} | {"best_of": body.best_of}
    if body.priority is not None:
        if body.priority_level not in (None, body.priority):
            raise RefusalError("priority: not together with another priority_level", param="priority")
        given["priority_level"] = body.priority
    schema = _schema(body.response_format)
    if schema is None:
        return given
    others = [name for name in given if name.startswith(("guided_", "structured_")) and given[name] is not None]
    if others:
        raise RefusalError(
            f"response_format: not together with {others[0]}: an answer has one form", param="response_format"
        )
    # room for white space is room for answers without an end
    return given | {"structured_outputs": {"json": schema, "disable_any_whitespace": True}}


def _schema(response_format: Mapping[str, Any] | None) -> Any:
    """The JSON schema that the answer must match; None: any text."""
    if response_format is None:
        return None
    match response_format:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": dict() as schema}}:
            return schema
        case {"type": "json_schema"}:
            raise RefusalError("response_format: json_schema must be an object with a schema", param="response_format")
    raise RefusalError("response_format: expected type text, json_object or json_schema", param="response_format")


def _params_of(body: Body) -> dict[str, str]:
    """The server's names of fields → this body's, where they differ."""
    form = {} if body.response_format is None else {"structured_outputs": "response_format"}
    return form if body.priority is None else form | {"priority_level": "priority"}


def _check_stream(body: Body) -> None:
    if body.stream_options is not None and not body.stream:
        raise RefusalError("stream_options: only with stream: true", param="stream_options")


def _prompts(prompt: str | Sequence[Any]) -> tuple[Prompt, ...]:
    """One string, one list of token ids, or a list of either."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return (prompt,)
    if len(prompt) > MAX_PROMPTS:
        raise RefusalError(f"prompt: {len(prompt)} prompts; the most allowed is {MAX_PROMPTS}", param="prompt")
    return tuple(prompt)


def template_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """For the template; None: there are none."""
    return tools or None


def message_of(position: int, message: Mapping[str, Any], left_out: list[str]) -> dict[str, Any]:
    """As chat templates expect it: text is a string, a tool call's arguments an object. left_out: takes the places of
    parts of a tool's result that are no text.
    """
    changed = dict(message)
    if not isinstance(message.get("role"), str):
        raise RefusalError(f"messages.{position}.role: missing", param=f"messages.{position}.role")
    if message["role"] in _SYSTEM_ROLES:
        changed["role"] = "system"
    if isinstance(message.get("content"), list):
        unreadable = left_out if message["role"] == "tool" else None
        changed["content"] = "\n".join(
            _text(position, at, part, unreadable) for at, part in enumerate(message["content"])
        )
    elif not isinstance(message.get("content"), (str, type(None))):  # a template would write it as Python does
        raise _no_content(position)
    if isinstance(message.get("tool_calls"), list):
        changed["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    if isinstance(message.get("reasoning"), str):  # the newer of the two names that an answer has it by
        changed.setdefault("reasoning_content", message["reasoning"])
    return changed


def _text(position: int, at: int, part: Any, left_out: list[str] | None) -> str:
    """left_out: None: a part that is no text is refused."""
    match part:
        case {"type": "text", "text": str() as text} | {"type": "refusal", "refusal": str() as text}:
            return text
        case {"type": "image_url" | "input_audio" | "video_url" | "file" as kind} if left_out is not None:
            left_out.append(f"messages.{position}.content.{at}.{kind}")
            return unread(kind.removesuffix("_url").removeprefix("input_"))
        case {"type": str() as kind}:
            raise RefusalError(
                f"messages.{position}.content: no part of type '{kind[:80]}': this model reads text",
                param=f"messages.{position}.content",
            )
    raise _no_content(position)


def _no_content(position: int) -> RefusalError:
    where = f"messages.{position}.content"
    return RefusalError(f"{where}: expected a string or a list of parts", param=where)


def _tool_call(call: Any) -> Any:
    match call:
        # a call without arguments, as some clients write it
        case {"function": {"arguments": None | "", **function}}:
            return {**call, "function": {**function, "arguments": {}}}
        case {"function": {"arguments": str() as arguments, **function}}:
            return {**call, "function": {**function, "arguments": _arguments(arguments)}}
    return call


def _arguments(text: str) -> dict[str, Any]:
    """As templates walk through them. A model may have written anything else, and the caller tells it what was wrong
    with it: then the conversation goes on, with the text as the only argument.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {"arguments": text}
    if found is None:
        return {}
    return found if isinstance(found, dict) and not fault(found) else {"arguments": text}
