"""`/v1/messages`: Anthropic's Messages API over the chat that the gateway has anyway."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from paged_client.openai.chat_source import ChatSource, Chunks
from paged_client.openai.disconnect import EventStream
from paged_client.openai.errors import refusal_of_body
from paged_client.openai.message_events import MessageEvents, error_body, whole_message
from paged_client.openai.message_items import CountBody, MessagesBody, chat_of_messages
from paged_client.openai.protocol import ChatBody
from paged_client.openai.unknown_keys import unused_keys, with_warning

PATH = "/v1/messages"


def add_message_paths(app: FastAPI, source: ChatSource, strict: bool) -> None:
    @app.post(PATH)
    async def create(body: MessagesBody, request: Request) -> Response:
        unused, chat = unused_keys(body, strict), _chat(body)
        if not chat.stream:
            return with_warning(JSONResponse(whole_message(body.model, await source.whole(request, chat))), unused)
        chunks, pieces = await source.chunks(request, chat)
        return with_warning(EventStream(_events(MessageEvents(body.model), chunks), pieces), unused)

    @app.post(f"{PATH}/count_tokens")
    async def count(body: CountBody) -> Response:
        return JSONResponse({"input_tokens": await source.num_prompt_tokens(_chat(body))})


def _chat(body: CountBody) -> ChatBody:
    try:
        return chat_of_messages(body)
    except ValidationError as error:
        raise refusal_of_body([{**found, "loc": ("body", *found["loc"])} for found in error.errors()]) from None


async def _events(events: MessageEvents, chunks: Chunks) -> AsyncGenerator[bytes, None]:
    async for chunk in chunks:
        if "error" in chunk:
            status = 503 if chunk["error"].get("code") == "overloaded" else 500
            yield _event(error_body(str(chunk["error"]["message"]), status))
            return
        for event in events.take(chunk):
            yield _event(event)
    for event in events.finish():
        yield _event(event)


def _event(said: Mapping[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (said["type"].encode(), msgspec.json.encode(said))
