"""`/v1/models`, `/tokenize` and `/detokenize`: what the models are, and their tokens."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timezone
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from paged_client.openai.errors import unknown_model
from paged_client.openai.model_card import Description, ModelCard
from paged_client.openai.models import Models, ServedModel
from paged_client.openai.protocol import DetokenizeBody, TokenizeBody
from paged_client.openai.tokens import detokenize, tokenize
from paged_client.openai.unknown_keys import unused_keys, with_warning


def add_model_paths(app: FastAPI, models: Models, strict: bool, list_adapters: bool) -> None:
    started = int(time.time())
    since = datetime.fromtimestamp(started, timezone.utc).isoformat()

    def entry(name: str, description: Description, parent: str | None = None) -> dict[str, Any]:
        # as vLLM has them
        facts = {"root": parent or name, "parent": parent, "max_model_len": description.max_model_len}
        # as Anthropic has them
        facts |= {"type": "model", "display_name": name, "created_at": since, "lifecycle": "active"}
        return {"id": name, "object": "model", "created": started, "owned_by": "paged", **facts}

    def adapters_of(description: Description) -> tuple[str, ...]:
        return description.adapters if list_adapters else ()

    def card_of(body: TokenizeBody | DetokenizeBody) -> ModelCard:
        served: ServedModel = models.only() if body.model is None else models.find(body.model)[0]
        return served.card

    @app.get("/v1/models")
    async def listed() -> Response:
        served = models.all
        described = list(zip(served, await asyncio.gather(*(one.card.description() for one in served)), strict=True))
        entries = [entry(one.name, description) for one, description in described]
        entries += [
            entry(f"{one.name}:{adapter}", description, one.name)
            for one, description in described
            for adapter in adapters_of(description)
        ]
        ids = [each["id"] for each in entries] or [None]
        return JSONResponse(
            {"object": "list", "data": entries, "first_id": ids[0], "last_id": ids[-1], "has_more": False}
        )

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        served, adapter = models.find(name)
        description = await served.card.description()
        if adapter and adapter not in adapters_of(description):
            raise unknown_model(name)
        return JSONResponse(entry(name, description, served.name if adapter else None))

    @app.post("/tokenize")
    async def tokens_of_text(body: TokenizeBody) -> Response:
        card, unused = card_of(body), unused_keys(body, strict)
        return with_warning(JSONResponse(await tokenize(card, body)), unused)

    @app.post("/detokenize")
    async def text_of_tokens(body: DetokenizeBody) -> Response:
        card, unused = card_of(body), unused_keys(body, strict)
        return with_warning(JSONResponse(await detokenize(card, body)), unused)
