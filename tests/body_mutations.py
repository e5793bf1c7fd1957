"""Bodies of every endpoint of the gateway with every field that can be given, and what may be wrong in each place of
them: a value of another type, null, out of range, huge, nested too deeply, missing, unknown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Place = tuple[str | int, ...]

_DEEP, _DEEPEST = 300, 900  # levels: beyond what checks recurse into, and just what JSON's reader takes
# As JSON, some of which no Python value stands for.
VALUES: Mapping[str, str] = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "minus one": "-1",
    "a half": "0.5",
    "beyond 64 bits": "1" + "0" * 30,
    "beyond a double": "1" + "0" * 400,
    "more digits than are read": "1" + "0" * 5000,
    "1e308": "1e308",
    "1e999": "1e999",
    "NaN": "NaN",
    "empty text": '""',
    "text": '"no such"',
    "long text": '"' + "x" * 20_000 + '"',
    "half a character": '"\\ud83d"',
    "no character": '"\\u0000"',
    "empty list": "[]",
    "mixed list": '[1, "a", null, {"b": []}]',
    "list of numbers": "[1, 2, 3]",
    "lists": "[[[]]]",
    "deep lists": "[" * _DEEP + "]" * _DEEP,
    "deepest lists": "[" * _DEEPEST + "]" * _DEEPEST,
    "empty object": "{}",
    "object": '{"no": "such"}',
    "deep objects": '{"a":' * _DEEP + "0" + "}" * _DEEP,
    "many keys": json.dumps({f"k{number}": number for number in range(2000)}),
}
_HERE = "@here@"
_FOUND = ("model",)  # fields that name something, which may not be there
# Field → others that are wrong without it, or with another value of it.
_BESIDE: Mapping[str | int, tuple[str, ...]] = {
    "stream": ("stream_options",),
    "logprobs": ("top_logprobs",),
    "tools": ("tool_choice",),
    "messages": ("prompt",),
    "beam_width": ("use_beam_search",),
    "use_beam_search": ("beam_width",),
    "temperature": ("n",),  # equal sequences
}

_FUNCTION = {
    "name": "look_up",
    "description": "Looks it up.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"thing": {"type": "string", "enum": ["lamp", "fox"]}},
        "required": ["thing"],
        "additionalProperties": False,
    },
}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"thing": "fox"}'}}
_CHAT = [
    {"role": "developer", "content": "Be brief.", "name": "house"},
    {"role": "user", "content": [{"type": "text", "text": "Where is the fox?"}]},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "in the garden"},
]
_TOOLS = [{"type": "function", "function": _FUNCTION}]
_SAMPLING = {
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 7,
    "stop": ["END"],
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.5},
    "min_tokens": 1,
    "ignore_eos": False,
    "stop_token_ids": [3],
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "bad_words": ["lamp"],
    "truncate_prompt_tokens": 100,
    "add_special_tokens": True,
    "priority": 1,
    "request_deadline_seconds": 100,
    "skip_prefix_cache": False,
    "generation_defaults": False,
    "cache_salt": "salt",
    "request_id": "mine-1",
    "user": "someone",
    "best_of": 2,
}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
_POOLING = {
    "pooling": "mean",
    "truncate_prompt_tokens": 100,
    "add_special_tokens": True,
    "priority": 1,
    "cache_salt": "salt",
    "request_deadline_seconds": 100,
    "skip_prefix_cache": False,
}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "form", "strict": True, "schema": _SCHEMA}}


@dataclass(frozen=True)
class Asked:
    """A body that is answered."""

    path: str
    body: Mapping[str, Any]


def bodies(model: str) -> dict[str, Asked]:
    """By name; a path has several where its fields exclude one another. model: that is served."""
    head = {"model": model}
    return _completions(head) | _chats(head) | _responses(head) | _messages(head) | _others(head)


def _completions(head: Mapping[str, Any]) -> dict[str, Asked]:
    text = {**head, "prompt": "Once", "max_tokens": 4}
    return {
        "completions": Asked("/v1/completions", {**text, **_SAMPLING, "echo": True, "logprobs": 2}),
        "completions streamed": Asked(
            "/v1/completions", {**text, "stream": True, "stream_options": {"include_usage": True}, "prompt": ["a", "b"]}
        ),
        "completions beams": Asked(
            "/v1/completions",
            {**text, "use_beam_search": True, "beam_width": 2, "length_penalty": 1.0, "early_stopping": True},
        ),
        "completions ids": Asked("/v1/completions", {**text, "prompt": [[5, 6], [7]], "allowed_token_ids": [5, 6, 7]}),
        "completions guided": Asked("/v1/completions", {**text, "guided_regex": "[ab]{2}"}),
        "completions choice": Asked("/v1/completions", {**text, "guided_choice": ["yes", "no"]}),
        "completions json": Asked("/v1/completions", {**text, "guided_json": _SCHEMA}),
        "completions structured": Asked("/v1/completions", {**text, "structured_outputs": {"json": _SCHEMA}}),
    }


def _chats(head: Mapping[str, Any]) -> dict[str, Asked]:
    chat = {**head, "messages": _CHAT, "max_completion_tokens": 4}
    said = "/v1/chat/completions"
    return {
        "chat": Asked(
            said,
            {
                **chat,
                **{name: value for name, value in _SAMPLING.items() if name != "best_of"},
                "logprobs": True,
                "top_logprobs": 2,
                "reasoning_effort": "low",
                "include_reasoning": True,
                "max_thinking_tokens": 5,
                "chat_template_kwargs": {"enable_thinking": False},
            },
        ),
        "chat tools": Asked(
            said, {**chat, "tools": _TOOLS, "tool_choice": "auto", "parallel_tool_calls": False, "stream": False}
        ),
        "chat named tool": Asked(
            said, {**chat, "tools": _TOOLS, "tool_choice": {"type": "function", "function": {"name": "look_up"}}}
        ),
        "chat allowed tools": Asked(
            said,
            {
                **chat,
                "tools": _TOOLS,
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "look_up"}}]},
                },
            },
        ),
        "chat form": Asked(said, {**chat, "response_format": _FORMAT, "max_tokens": 4, "modalities": ["text"]}),
        "chat streamed": Asked(said, {**chat, "stream": True, "stream_options": {"include_usage": True}}),
    }


def _responses(head: Mapping[str, Any]) -> dict[str, Asked]:
    responses_input = [
        {"role": "user", "content": [{"type": "input_text", "text": "Where is the fox?"}]},
        {"type": "function_call", "call_id": "call_1", "name": "look_up", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "in the garden"},
        {"type": "reasoning", "summary": []},
    ]
    return {
        "responses": Asked(
            "/v1/responses",
            {
                **head,
                "input": responses_input,
                "instructions": "Be brief.",
                "store": True,
                "max_output_tokens": 4,
                "temperature": 0.5,
                "top_p": 0.9,
                "top_k": 5,
                "seed": 7,
                "tools": [{"type": "function", **_FUNCTION}],
                "tool_choice": "auto",
                "parallel_tool_calls": False,
                "reasoning": {"effort": "low", "summary": "auto"},
                "metadata": {"a": "b"},
                "truncation": "auto",
                "max_thinking_tokens": 5,
                "chat_template_kwargs": {"enable_thinking": False},
                "request_id": "mine-1",
            },
        ),
        "responses form": Asked(
            "/v1/responses",
            {**head, "input": "x", "text": {"format": {"type": "json_schema", "name": "form", "schema": _SCHEMA}}},
        ),
        "responses streamed": Asked("/v1/responses", {**head, "input": "x", "max_output_tokens": 4, "stream": True}),
    }


def _messages(head: Mapping[str, Any]) -> dict[str, Asked]:
    called = {"type": "tool_use", "id": "t1", "name": "look_up", "input": {"thing": "fox"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "garden"}]}
    anthropic_turns = [
        {"role": "user", "content": [{"type": "text", "text": "Where is the fox?"}]},
        {"role": "assistant", "content": [called]},
        {"role": "user", "content": [result]},
    ]
    anthropic = {
        **head,
        "messages": anthropic_turns,
        "system": [{"type": "text", "text": "Be brief."}],
        "tools": [{"name": "look_up", "description": "Looks up.", "input_schema": _SCHEMA}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 100},
    }
    return {
        "messages": Asked(
            "/v1/messages",
            {
                **anthropic,
                "max_tokens": 4,
                "stop_sequences": ["END"],
                "temperature": 0.5,
                "top_p": 0.9,
                "top_k": 5,
                "metadata": {"user_id": "someone"},
            },
        ),
        "messages streamed": Asked(
            "/v1/messages", {**head, "messages": anthropic_turns[:1], "max_tokens": 4, "stream": True}
        ),
        "count tokens": Asked("/v1/messages/count_tokens", anthropic),
    }


def _others(head: Mapping[str, Any]) -> dict[str, Asked]:
    """Embeddings and what is made of them; tokens."""
    return {
        "embeddings": Asked(
            "/v1/embeddings",
            {
                **head,
                **_POOLING,
                "input": ["a fox", "a lamp"],
                "encoding_format": "base64",
                "dimensions": 8,
                "normalize": True,
            },
        ),
        "embeddings of ids": Asked("/v1/embeddings", {**head, "input": [[5, 6], [7]]}),
        "score": Asked("/v1/score", {**head, **_POOLING, "text_1": "a fox", "text_2": ["a", "b"], "scoring": "cosine"}),
        "rerank": Asked(
            "/v1/rerank",
            {
                **head,
                **_POOLING,
                "query": "a fox",
                "documents": ["a", {"text": "b"}],
                "top_n": 1,
                "return_documents": True,
                "scoring": "cosine",
            },
        ),
        "tokenize": Asked("/tokenize", {**head, "prompt": "a fox", "add_special_tokens": True}),
        "tokenize a chat": Asked(
            "/tokenize",
            {
                **head,
                "messages": _CHAT,
                "tools": _TOOLS,
                "add_generation_prompt": True,
                "continue_final_message": False,
                "chat_template_kwargs": {"enable_thinking": False},
            },
        ),
        "detokenize": Asked("/detokenize", {**head, "tokens": [5, 6]}),
    }


def places(value: Any, here: Place = ()) -> Iterator[Place]:
    """Of everything in a body, itself left out."""
    members: Sequence[tuple[str | int, Any]] = []
    if isinstance(value, Mapping):
        members = list(value.items())
    elif isinstance(value, list):
        members = list(enumerate(value))
    for step, member in members:
        yield (*here, step)
        yield from places(member, (*here, step))


@dataclass(frozen=True)
class Mutation:
    """A body in which one thing is wrong, or at least other than before."""

    place: Place
    wrong: str
    json: str

    @property
    def is_json(self) -> bool:
        return self.wrong != "more digits than are read"


def mutations(body: Mapping[str, Any]) -> Iterator[Mutation]:
    for place in places(body):
        marked = json.dumps(_changed(body, place, _HERE))
        for name, value in VALUES.items():
            yield Mutation(place, name, marked.replace(json.dumps(_HERE), value))
        if isinstance(place[-1], str):
            yield Mutation(place, "missing", json.dumps(_changed(body, place, None, drop=True)))
    for place in [(), *places(body)]:
        if isinstance(_at(body, place), Mapping):
            unknown = (*place, "unheard_of")
            yield Mutation(unknown, "unknown key", json.dumps(_changed(body, unknown, {"a": [1]})))


def check_refusal(status: int, text: str, path: str, mutation: Mutation) -> None:
    """That an error has its API's form, a status that a client takes as its own mistake, and the field's name."""
    told = (status, text[:500], path, mutation.place, mutation.wrong)
    assert status in (400, 404), told
    said = json.loads(text)
    error = said["error"]
    if path.startswith("/v1/messages"):
        assert (
            set(said) == {"type", "error", "request_id"}
            and said["type"] == "error"
            and set(error) == {"type", "message"}
        ), told
        assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error"), told
        named = error["message"].partition(":")[0]
    else:
        assert set(said) == {"error"} and set(error) == {"message", "type", "param", "code"}, told
        assert error["type"] == "invalid_request_error", told
        named = error["param"]
    assert status == 400 or mutation.place[0] in _FOUND, told
    if not mutation.is_json:
        assert error["message"].endswith("the body is not valid JSON"), told
        return
    if "tokens; the longest this model takes is" in error["message"]:  # whatever has made the prompt so long
        return
    assert named, told
    field = named.partition(".")[0]
    assert field == mutation.place[0] or field in _BESIDE.get(mutation.place[0], ()), told
    assert field in error["message"], told


def _at(value: Any, place: Place) -> Any:
    for step in place:
        value = value[step]
    return value


def _changed(body: Mapping[str, Any], place: Place, value: Any, drop: bool = False) -> Any:
    copied = json.loads(json.dumps(body))
    parent = _at(copied, place[:-1])
    if drop:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return copied
