"""`/v1/responses`: OpenAI's Responses API over the chat that the gateway has anyway."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI, Query, Request
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from paged_client.openai.chat_source import ChatSource, Chunks
from paged_client.openai.disconnect import EventStream
from paged_client.openai.errors import RefusalError, refusal_of_body
from paged_client.openai.kept_items import given_items, kept, page_of
from paged_client.openai.protocol import ChatBody
from paged_client.openai.response_events import ResponseBuilder
from paged_client.openai.response_items import ResponsesBody, chat_body, without_effect
from paged_client.openai.response_store import ResponseStore
from paged_client.openai.response_tools import ResponseTools
from paged_client.openai.unknown_keys import refuse_if_strict, unused_keys, with_warning

_PARAMS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


@dataclass(frozen=True)
class _Conversation:
    """What a body asks, and the conversation in which it does."""

    body: ResponsesBody
    tools: ResponseTools
    earlier: list[dict[str, Any]]  # items of the response that goes before, its answer included
    given: list[Mapping[str, Any]]  # the body's own items
    chat: ChatBody
    ignored: list[str]  # places in the body


def add_response_paths(app: FastAPI, source: ChatSource, store: ResponseStore, strict: bool) -> None:
    @app.post("/v1/responses")
    async def create(body: ResponsesBody, request: Request) -> Response:
        asked = _asked(store, body, strict)
        try:
            return with_warning(await _answer(source, store, asked, request), asked.ignored)
        except RefusalError as refusal:
            raise _renamed(refusal) from None

    @app.post("/v1/responses/input_tokens")
    async def count(body: ResponsesBody) -> Response:
        asked = _asked(store, body, strict)
        try:
            num_tokens = await source.num_prompt_tokens(asked.chat)
        except RefusalError as refusal:
            raise _renamed(refusal) from None
        found = {"object": "response.input_tokens", "input_tokens": num_tokens}
        return with_warning(JSONResponse(found), asked.ignored)

    @app.get("/v1/responses/{response_id}")
    async def retrieve(response_id: str, stream: bool = False) -> Response:
        if stream:  # a caller that waits for events would take anything else for an answer without any
            said = "stream: not supported: an answer that is over comes whole"
            raise RefusalError(said, param="stream", code="unsupported_parameter")
        return JSONResponse(store.get(response_id).response)

    @app.get("/v1/responses/{response_id}/input_items")
    async def input_items(
        response_id: str,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> Response:
        items = store.get(response_id).items
        return JSONResponse(page_of(items, newest_first=order == "desc", after=after, limit=limit))

    @app.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> Response:
        store.delete(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})


def _asked(store: ResponseStore, body: ResponsesBody, strict: bool) -> _Conversation:
    """
    Raises:
        RefusalError: what cannot be asked, by its name in the body.
    """
    unused = unused_keys(body, strict)
    tools = ResponseTools(body.tools or ())
    earlier: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        earlier = store.get(body.previous_response_id, "previous_response_id").conversation
    given = given_items([] if body.input is None else body.input, store)
    left_out: list[str] = []
    try:
        chat = chat_body(body, tools, earlier, given, left_out)
    except ValidationError as error:
        refusal = refusal_of_body([{**found, "loc": ("body", *found["loc"])} for found in error.errors()])
        raise _renamed(refusal) from None
    ignored = [*tools.left_out, *left_out]
    refuse_if_strict(ignored, strict)
    return _Conversation(body, tools, earlier, given, chat, [*unused, *without_effect(body), *ignored])


async def _answer(source: ChatSource, store: ResponseStore, asked: _Conversation, request: Request) -> Response:
    keeps = store.keeps and asked.body.store is not False
    builder = ResponseBuilder(asked.body, asked.tools, stored=keeps)

    def keep(response: dict[str, Any]) -> None:
        if keeps:
            store.put(response, [*asked.earlier, *kept(asked.given, builder.id)])

    if asked.chat.stream:
        chunks, pieces = await source.chunks(request, asked.chat)
        return EventStream(_events(builder, chunks, keep), pieces)
    return JSONResponse(_whole(builder, await source.whole(request, asked.chat), keep))


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
