"""`/v1/responses`: OpenAI's Responses API over the chat that the gateway has anyway."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from paged_client.openai.chat_source import ChatSource, Chunks
from paged_client.openai.disconnect import EventStream
from paged_client.openai.errors import RefusalError, refusal_of_body
from paged_client.openai.protocol import ChatBody
from paged_client.openai.response_events import ResponseBuilder
from paged_client.openai.response_items import ResponsesBody, chat_body, messages_of, thought_of
from paged_client.openai.response_store import ResponseStore
from paged_client.openai.response_tools import ResponseTools, calls_of
from paged_client.openai.unknown_keys import unused_keys, with_warning

_PARAMS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


def add_response_paths(app: FastAPI, source: ChatSource, store: ResponseStore, strict: bool) -> None:
    @app.post("/v1/responses")
    async def create(body: ResponsesBody, request: Request) -> Response:
        unused = unused_keys(body, strict)
        tools = _tools(body, strict)
        try:
            return with_warning(await _answer(source, store, body, tools, request), [*unused, *tools.left_out])
        except RefusalError as refusal:
            raise _renamed(refusal) from None

    @app.post("/v1/responses/input_tokens")
    async def count(body: ResponsesBody) -> Response:
        unused = unused_keys(body, strict)
        tools = _tools(body, strict)
        try:
            _, chat = _asked(store, body, tools)
            found = {"object": "response.input_tokens", "input_tokens": await source.num_prompt_tokens(chat)}
        except RefusalError as refusal:
            raise _renamed(refusal) from None
        return with_warning(JSONResponse(found), [*unused, *tools.left_out])

    @app.get("/v1/responses/{response_id}")
    async def retrieve(response_id: str) -> Response:
        return JSONResponse(store.get(response_id).response)

    @app.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> Response:
        store.delete(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})


def _tools(body: ResponsesBody, strict: bool) -> ResponseTools:
    tools = ResponseTools(body.tools or ())
    for place in tools.left_out if strict else ():
        where, _, kind = place.rpartition(".")
        raise RefusalError(f"{where}.type: '{kind}' is not to be had here", param=f"{where}.type")
    return tools


def _asked(store: ResponseStore, body: ResponsesBody, tools: ResponseTools) -> tuple[list[dict[str, Any]], ChatBody]:
    """The conversation so far, and the chat that goes on with it."""
    earlier: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        earlier = store.get(body.previous_response_id, "previous_response_id").messages
    try:
        return earlier, chat_body(body, tools, earlier)
    except ValidationError as error:
        raise refusal_of_body([{**found, "loc": ("body", *found["loc"])} for found in error.errors()]) from None


async def _answer(
    source: ChatSource, store: ResponseStore, body: ResponsesBody, tools: ResponseTools, request: Request
) -> Response:
    earlier, chat = _asked(store, body, tools)
    keeps = store.keeps and body.store is not False
    builder = ResponseBuilder(body, tools, stored=keeps)

    def keep(response: dict[str, Any]) -> None:
        if keeps:
            store.put(response, [*earlier, *messages_of(body.input), _answer_message(response)])

    if chat.stream:
        chunks, pieces = await source.chunks(request, chat)
        return EventStream(_events(builder, chunks, keep), pieces)
    return JSONResponse(_whole(builder, await source.whole(request, chat), keep))


def _whole(builder: ResponseBuilder, answer: Mapping[str, Any], keep: Any) -> dict[str, Any]:
    (choice,) = answer["choices"]
    for _ in builder.take(choice["message"]):
        pass
    (last,) = [event for event in builder.finish(choice["finish_reason"], answer["usage"]) if "response" in event]
    keep(last["response"])
    response: dict[str, Any] = last["response"]
    return response


async def _events(builder: ResponseBuilder, chunks: Chunks, keep: Any) -> AsyncGenerator[bytes, None]:
    reason, usage = None, None
    said = [*builder.begin()]
    async with aclosing(chunks):
        async for of_piece in chunks:
            for chunk in of_piece:
                if "error" in chunk:
                    yield _written([*said, *builder.fail(chunk["error"])])
                    return
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    reason = choice["finish_reason"] or reason
                    said += builder.take(choice["delta"])
            if said:
                yield _written(said)
                said = []
    said += builder.finish(reason, usage)
    if said[-1]["type"] in ("response.completed", "response.incomplete"):
        keep(said[-1]["response"])
    yield _written(said)


def _written(events: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(map(_event, events))


def _event(said: Mapping[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (said["type"].encode(), msgspec.json.encode(said))


def _answer_message(response: Mapping[str, Any]) -> dict[str, Any]:
    """The answer as the next chat has it."""
    texts = [part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"]]
    calls = [call for item in response["output"] for call in calls_of(item)]
    thoughts = [thought_of(item) for item in response["output"] if item["type"] == "reasoning"]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) or (None if calls else "")}
    message |= {"tool_calls": calls} if calls else {}
    return message | ({"reasoning_content": "\n".join(thoughts)} if thoughts else {})


def _renamed(refusal: RefusalError) -> RefusalError:
    """By the names of this API's fields."""
    param = refusal.param or ""
    first, _, rest = param.partition(".")
    if first not in _PARAMS:
        return refusal
    renamed = ".".join([_PARAMS[first], *([rest] if rest else [])])
    message = str(refusal)
    message = renamed + message.removeprefix(param) if message.startswith(param) else message
    return RefusalError(message, refusal.status, param=renamed, code=refusal.code)
