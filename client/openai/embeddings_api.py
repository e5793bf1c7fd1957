"""`/v1/embeddings`, as OpenAI has it: each input is asked of the server as a request of its own, which its engine
batches.
"""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import Response

from paged_client.answers import Answer
from paged_client.errors import PagedError
from paged_client.openai.disconnect import unless_left
from paged_client.openai.errors import RefusalError, refusal_of
from paged_client.openai.metrics import GatewayMetrics
from paged_client.openai.middleware import REQUEST_ID
from paged_client.openai.model_card import ModelCard
from paged_client.openai.models import Models
from paged_client.openai.protocol import MAX_PROMPTS, TokenIds
from paged_client.openai.readable import ReadableBody
from paged_client.openai.unknown_keys import unused_keys, with_warning
from paged_client.question import Prompt

PATH = "/v1/embeddings"
_SAME_NAMES = (
    "pooling",
    "dimensions",
    "normalize",
    "truncate_prompt_tokens",
    "add_special_tokens",
    "request_deadline_seconds",
    "skip_prefix_cache",
)

Result = TypeVar("Result")
Item = TypeVar("Item")


class PoolingBody(ReadableBody):
    """What the paths that embed texts share: keys of the server that go there under their own names, and what is
    ignored.
    """

    model: str
    pooling: str | None = None  # last or mean; None: the checkpoint's own
    truncate_prompt_tokens: int | None = None  # vLLM's
    add_special_tokens: bool | None = None  # vLLM's
    priority: int | None = None  # vLLM's
    cache_salt: str | None = None  # vLLM's
    lora_name: str | None = None
    request_deadline_seconds: float | None = None
    skip_prefix_cache: bool | None = None
    user: Any = None


class EmbeddingBody(PoolingBody):
    """POST /v1/embeddings."""

    input: (
        str
        | TokenIds
        | Annotated[list[str], Field(fail_fast=True, min_length=1)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    normalize: bool | None = None  # vLLM's


class EmbeddingSource:
    """Embeddings of a model behind the gateway."""

    def __init__(self, models: Models, metrics: GatewayMetrics, at_once: int) -> None:
        """at_once: requests of one body; the others wait."""
        self._models = models
        self._metrics = metrics
        self._at_once = at_once

    def card(self, body: PoolingBody) -> ModelCard:
        """Of the model that a body names.

        Raises:
            RefusalError: it is not served.
        """
        return self._models.find(body.model)[0].card

    def sampling(self, body: PoolingBody) -> dict[str, Any]:
        """The server's keys.

        Raises:
            RefusalError: the model is not served, or names an adapter beside lora_name.
        """
        _, adapter = self._models.find(body.model)
        if adapter and body.lora_name is not None:
            raise RefusalError("lora_name: not together with a model that names an adapter itself", param="lora_name")
        given = {name: getattr(body, name, None) for name in _SAME_NAMES}
        return {
            **given,
            "priority_level": body.priority,
            "lora_name": adapter or body.lora_name,
            "cache_salt": body.cache_salt or "",
        }

    async def embeddings(
        self, request: Request, body: PoolingBody, prompts: Sequence[Prompt], params: Mapping[str, str]
    ) -> list[Answer]:
        """One answer a prompt, in their order. params: the server's names of fields → the body's.

        Raises:
            RefusalError: one of them is refused.
            CallerLeftError: nobody waits for them any more.
        """
        client, sampling, request_id = self.card(body).client, self.sampling(body), request.scope.get(REQUEST_ID, "")
        return await self.answers(
            request, prompts, lambda prompt: client.embed(prompt, request_id=request_id, **sampling), params
        )

    async def answers(
        self,
        request: Request,
        items: Sequence[Item],
        ask: Callable[[Item], Awaitable[Answer]],
        params: Mapping[str, str],
    ) -> list[Answer]:
        """As `embeddings`, of anything that is asked for each of some items."""
        places = asyncio.Semaphore(self._at_once)

        async def one(item: Item) -> Answer:
            async with places:
                return await ask(item)

        try:
            answers = await unless_left(request.receive, _gathered([one(item) for item in items]))
        except PagedError as error:
            raise refusal_of(error, params) from None
        for answer in answers:
            self._metrics.count(answer.usage)
        return answers


async def _gathered(asked: Sequence[Awaitable[Result]]) -> list[Result]:
    """All results; if one fails, or this is cancelled, the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def add_embedding_paths(app: FastAPI, source: EmbeddingSource, strict: bool) -> None:
    @app.post(PATH)
    async def create(body: EmbeddingBody, request: Request) -> Response:
        unused = unused_keys(body, strict)
        prompts = _prompts(body.input)
        params = {
            "text_input": "input",
            "input_ids": "input",
            "priority_level": "priority",
            **({"lora_name": "model"} if body.lora_name is None else {}),
        }
        answers = await source.embeddings(request, body, prompts, params)
        encode = _base64 if body.encoding_format == "base64" else list
        entries = [
            {"object": "embedding", "index": index, "embedding": encode(answer.embedding)}
            for index, answer in enumerate(answers)
        ]
        return with_warning(
            json_response({"object": "list", "data": entries, "model": body.model, "usage": usage_of(answers)}), unused
        )


def _prompts(given: str | list[Any]) -> list[Prompt]:
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    if len(given) > MAX_PROMPTS:
        raise RefusalError(f"input: {len(given)} inputs; the most allowed is {MAX_PROMPTS}", param="input")
    return list(given)


def _base64(values: Sequence[float]) -> str:
    """float32, little-endian, as OpenAI's library reads them."""
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def usage_of(answers: Sequence[Answer]) -> dict[str, int]:
    num_tokens = sum(answer.usage.num_input_tokens for answer in answers)
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def json_response(said: Any) -> Response:
    """Embeddings are many numbers: the fast encoder."""
    return Response(msgspec.json.encode(said), media_type="application/json")
