"""`/v1/messages`: Anthropic's Messages API over the chat that the gateway has anyway."""

from __future__ import annotations

import re
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
from paged_client.openai.message_events import Limits, MessageEvents, error_body, whole_message
from paged_client.openai.message_items import CountBody, MessagesBody, chat_of_messages
from paged_client.openai.protocol import ChatBody
from paged_client.openai.unknown_keys import refuse_if_strict, unused_keys, with_warning

PATH = "/v1/messages"
_RENAMED = {
    "max_thinking_tokens": "thinking.budget_tokens",
    "stop": "stop_sequences",
    "chat_template_kwargs": "thinking",
    "response_format": "output_config.format",
}
_STATUSES = {"overloaded": 503, "not_ready": 503, "timeout": 504}  # by the code of an error in a stream
_OF_TOOLS = {"name": "name", "parameters": "input_schema"}


def add_message_paths(app: FastAPI, source: ChatSource, strict: bool) -> None:
    @app.post(PATH)
    async def create(body: MessagesBody, request: Request) -> Response:
        chat, unused = _chat(body, strict)
        try:
            return with_warning(await _answer(source, request, body, chat), unused)
        except RefusalError as refusal:
            if refusal.param != "max_thinking_tokens" or strict:
                raise _renamed(refusal) from None
        # Anthropic's clients always send it, whatever the model
        unlimited = chat.model_copy(update={"max_thinking_tokens": None})
        return with_warning(await _answer(source, request, body, unlimited), [*unused, _RENAMED["max_thinking_tokens"]])

    @app.post(f"{PATH}/count_tokens")
    async def count(body: CountBody) -> Response:
        chat, unused = _chat(body, strict)
        try:
            found = {"input_tokens": await source.num_prompt_tokens(chat)}
            return with_warning(JSONResponse(found), unused)
        except RefusalError as refusal:
            raise _renamed(refusal) from None


async def _answer(source: ChatSource, request: Request, body: MessagesBody, chat: ChatBody) -> Response:
    limits = Limits(body.max_tokens, body.stop_sequences or ())
    if not chat.stream:
        return JSONResponse(whole_message(body.model, await source.whole(request, chat), limits))
    chunks, pieces = await source.chunks(request, chat)
    return EventStream(_events(MessageEvents(body.model, limits), chunks), pieces)


def _renamed(refusal: RefusalError) -> RefusalError:
    """By the names of this API's fields, which begin its messages: it tells a field in no other way."""
    param, message = refusal.param or "", str(refusal)
    if not param:
        return refusal
    renamed = re.sub(
        r"^(tools\.\d+)\.function\.(name|parameters)",
        lambda found: f"{found[1]}.{_OF_TOOLS[found[2]]}",
        _RENAMED.get(param, param),
    )
    said = message.removeprefix(param).removeprefix(": ") if message.startswith(param) else message
    return RefusalError(f"{renamed}: {said}", refusal.status, param=renamed, code=refusal.code)


def _chat(body: CountBody, strict: bool) -> tuple[ChatBody, list[str]]:
    """And the names and places in the body of what is ignored."""
    unused, left_out = unused_keys(body, strict), list[str]()
    try:
        chat = chat_of_messages(body, left_out)
    except ValidationError as error:
        raise refusal_of_body([{**found, "loc": ("body", *found["loc"])} for found in error.errors()]) from None
    refuse_if_strict(left_out, strict)
    return chat, [*unused, *left_out]


async def _events(events: MessageEvents, chunks: Chunks) -> AsyncGenerator[bytes, None]:
    async with aclosing(chunks):
        async for of_piece in chunks:
            said = []
            for chunk in of_piece:
                if "error" in chunk:
                    status = _STATUSES.get(chunk["error"].get("code"), 500)
                    yield _written([*said, error_body(str(chunk["error"]["message"]), status)])
                    return
                said += events.take(chunk)
            if said:
                yield _written(said)
    yield _written(events.finish())


def _written(events: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(map(_event, events))


def _event(said: Mapping[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (said["type"].encode(), msgspec.json.encode(said))
