"""The application: OpenAI's paths, each question put to the server by AsyncPagedClient."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from paged_backend.tracing import Tracing
from paged_client.answers import Answer, Delta, Usage
from paged_client.errors import PagedError
from paged_client.merging import cancelled, merged
from paged_client.openai.answer_forms import FormOptions, chat_form, constrained, within_budget
from paged_client.openai.chat_source import Chunks
from paged_client.openai.disconnect import CallerLeftError, EventStream, unless_left
from paged_client.openai.embeddings_api import EmbeddingSource, add_embedding_paths
from paged_client.openai.errors import RefusalError, refusal_of, refusal_of_body
from paged_client.openai.limits import Bodies, BodyLimits
from paged_client.openai.messages_api import add_message_paths
from paged_client.openai.metrics import GatewayMetrics
from paged_client.openai.middleware import REQUEST_ID, GatewayMiddleware, response_of
from paged_client.openai.model_card import Backend, ModelCard
from paged_client.openai.model_paths import add_model_paths
from paged_client.openai.models import Models, ServedModel
from paged_client.openai.parsed_chat import ParsedChatReply
from paged_client.openai.protocol import Body, ChatBody, CompletionBody, StreamOptions
from paged_client.openai.ranking_api import add_ranking_paths
from paged_client.openai.response_store import ResponseStore
from paged_client.openai.responses import ChatReply, CompletionReply
from paged_client.openai.responses_api import add_response_paths
from paged_client.openai.status_paths import add_status_paths
from paged_client.openai.tokens import with_echo
from paged_client.openai.tools import tool_wishes
from paged_client.openai.tracing import TraceMiddleware
from paged_client.openai.translation import Asked, asked_of_chat, asked_of_completion, with_adapter
from paged_client.openai.unknown_keys import refuse_if_strict, unused_keys, with_warning
from paged_client.question import Prompt

_CALLER_LEFT = 499  # nginx's status for it; nobody reads it
_DONE = b"data: [DONE]\n\n"
_MAX_STORED_BYTES = 64 * 2**20
_THIS_MACHINE = "localhost"  # as an origin: pages that any port of this machine serves
_ORIGINS_HERE = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


@dataclass(frozen=True)
class Offer:
    """What the gateway says it serves, and to whom."""

    # of the only model, where the gateway is given one; by any of them, and MODEL:ADAPTER with the server's adapters
    model_names: tuple[str, ...] = ()
    api_key: str = ""  # "": everybody may ask
    bodies: BodyLimits = field(default_factory=BodyLimits)
    origins: tuple[str, ...] = ()  # of web pages whose scripts may ask
    prompts_at_once: int = 256  # of one request; its others wait
    strict: bool = False  # unknown keys are refused, not ignored
    server_metrics: str = ""  # URL of Triton Server's metrics
    list_adapters: bool = True
    forms: FormOptions = field(default_factory=FormOptions)
    max_stored_responses: int = 1000  # 0: none
    scoring: str = "cosine"  # of /v1/score and /v1/rerank, where a body does not say: one of SCORINGS


ENDPOINTS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/health",
    "/v1/health",
    "/ping",
    "/version",
    "/metrics",
)

Reply = CompletionReply | ChatReply
Pieces = AsyncGenerator[tuple[int, Delta], None]


def make_app(
    served: Models | Backend, offer: Offer, metrics: GatewayMetrics | None = None, tracing: Tracing | None = None
) -> FastAPI:
    """
    served: models, or the client of one that is called as the offer says. metrics: created with ENDPOINTS; None: of the
    application's own.
    tracing: where the spans of requests go; None: nowhere.
    """
    app = FastAPI(title="paged openai", docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    metrics = metrics or GatewayMetrics(ENDPOINTS)
    models = served if isinstance(served, Models) else Models.of_one(served, offer.model_names)
    gateway = _Gateway(models, offer, metrics)
    chat = _Chat(gateway, offer.forms)
    bodies = Bodies(offer.bodies)
    metrics.body_bytes.set_function(lambda: bodies.bytes_in_flight)
    add_status_paths(app, models, metrics)
    add_model_paths(app, models, offer.strict, offer.list_adapters)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        unused = unused_keys(body, offer.strict)
        model, asked = gateway.choose(body, asked_of_completion(body))
        if body.echo:
            asked = await with_echo(model.card, asked, body.logprobs is not None)
        reply = CompletionReply(body.model, asked, body.request_id)
        return with_warning(await gateway.answer(request, body, asked, reply), unused)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        unused = unused_keys(body, offer.strict)
        asked, reply = await chat.asked(body)
        refuse_if_strict(asked.left_out, offer.strict)
        return with_warning(await gateway.answer(request, body, asked, reply), [*unused, *asked.left_out])

    add_message_paths(app, chat, offer.strict)
    add_response_paths(app, chat, ResponseStore(offer.max_stored_responses, _MAX_STORED_BYTES), offer.strict)

    embeddings = EmbeddingSource(models, metrics, offer.prompts_at_once)
    add_embedding_paths(app, embeddings, offer.strict)
    add_ranking_paths(app, embeddings, offer.strict, offer.scoring)

    _say_errors_in_openais_words(app)
    app.add_middleware(GatewayMiddleware, api_key=offer.api_key, bodies=bodies, metrics=metrics)
    app.add_middleware(TraceMiddleware, tracing=tracing, endpoints=ENDPOINTS)
    if offer.origins:
        named = [origin for origin in offer.origins if origin != _THIS_MACHINE]
        here = _ORIGINS_HERE if _THIS_MACHINE in offer.origins else None
        app.add_middleware(
            CORSMiddleware, allow_origins=named, allow_origin_regex=here, allow_methods=["*"], allow_headers=["*"]
        )
    return app


async def chat_of(card: ModelCard, options: FormOptions, body: ChatBody, asked: Asked) -> tuple[Asked, ChatReply]:
    """What the server is asked, and how its answer is read.

    Raises:
        RefusalError: what is said of tools cannot be followed.
    """
    wishes = tool_wishes(body)
    try:
        form = await chat_form(card, options, body, wishes)
    except PagedError as error:
        raise refusal_of(error, asked.params) from None
    asked = within_budget(constrained(asked, wishes, form), body, form)
    if form.answer.is_plain:
        return asked, ChatReply(body.model, asked, body.request_id)
    return asked, ParsedChatReply(body.model, asked, form, body.request_id)


def _say_errors_in_openais_words(app: FastAPI) -> None:
    @app.exception_handler(RefusalError)
    async def refused(request: Request, refusal: RefusalError) -> Response:
        return response_of(refusal, request.scope)

    @app.exception_handler(CallerLeftError)
    async def left(request: Request, error: CallerLeftError) -> Response:
        return Response(status_code=_CALLER_LEFT)

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> Response:
        return response_of(refusal_of_body(error.errors()), request.scope)

    @app.exception_handler(HTTPException)
    async def astray(request: Request, error: HTTPException) -> Response:
        broken = error.status_code == 400  # other than by a syntax error: bytes that are no text, nesting without end
        reason = "the body is not valid JSON" if broken else f"{request.method} {request.url.path}: {error.detail}"
        response = response_of(RefusalError(reason, error.status_code), request.scope)
        response.headers.update(error.headers or {})  # what is allowed instead
        return response


class _Gateway:
    def __init__(self, models: Models, offer: Offer, metrics: GatewayMetrics) -> None:
        self._models = models
        self._offer = offer
        self._metrics = metrics

    def choose(self, body: Body, asked: Asked) -> tuple[ServedModel, Asked]:
        """The model that a body names, and what it is asked: with the adapter that the name asks for.

        Raises:
            RefusalError: the model is not served.
        """
        model, adapter = self._models.find(body.model)
        return model, with_adapter(asked, adapter)

    async def answer(self, request: Request, body: Body, asked: Asked, reply: Reply) -> Response:
        """
        Raises:
            RefusalError: nothing has been answered.
            CallerLeftError: nobody waits for it any more.
        """
        if not body.stream:
            return JSONResponse(await self.whole(request, body, asked, reply))
        chunks, pieces = await self.chunks(request, body, asked, reply)
        return EventStream(_events(chunks), pieces)

    async def whole(self, request: Request, body: Body, asked: Asked, reply: Reply) -> dict[str, Any]:
        """As `answer`."""
        asked = replace(asked, request_id=body.request_id or request.scope.get(REQUEST_ID, ""))
        client = self._models.find(body.model)[0].client
        try:
            answers = await unless_left(request.receive, self._whole(client, asked))
        except PagedError as error:
            raise refusal_of(error, asked.params) from None
        for answer in answers:
            self._metrics.count(answer.usage)
        return reply.whole(answers)

    async def chunks(self, request: Request, body: Body, asked: Asked, reply: Reply) -> tuple[Chunks, Pieces]:
        """As `answer`; once there is a first piece: while there is none, the status can say why."""
        asked = replace(asked, request_id=body.request_id or request.scope.get(REQUEST_ID, ""))
        pieces = self._pieces(self._models.find(body.model)[0].client, asked)
        begun = False
        try:
            first = await unless_left(request.receive, _first(pieces))
            begun = True
        except PagedError as error:
            raise refusal_of(error, asked.params) from None
        finally:
            if not begun:  # the first piece may have come in the very moment in which nobody waited any more
                await pieces.aclose()
        return self._chunks(first, pieces, reply, asked.params, body.stream_options or StreamOptions()), pieces

    async def _whole(self, client: Backend, asked: Asked) -> list[Answer]:
        places = asyncio.Semaphore(self._offer.prompts_at_once)

        async def generate(prompt: Prompt | None) -> Answer:
            async with places:
                with self._metrics.adapter(asked.sampling.get("lora_name")):
                    return await client.generate(prompt, **_options(asked))

        tasks = [asyncio.ensure_future(generate(prompt)) for prompt in asked.prompts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            await cancelled(tasks)

    async def _pieces(self, client: Backend, asked: Asked) -> Pieces:
        """(which prompt, piece) of all prompts. Closing it cancels what is not over."""
        streams = [partial(client.stream, prompt, **_options(asked)) for prompt in asked.prompts]
        with self._metrics.adapter(asked.sampling.get("lora_name")):
            if len(streams) > 1:
                async with aclosing(merged(streams, self._offer.prompts_at_once)) as arriving:
                    async for piece in arriving:
                        yield piece
                return
            async with streams[0]() as stream:
                async for delta in stream:
                    yield 0, delta

    async def _chunks(
        self,
        first: tuple[int, Delta] | None,
        pieces: Pieces,
        reply: Reply,
        params: Mapping[str, str],
        options: StreamOptions,
    ) -> Chunks:
        """Pieces, of which `first` has come already, as OpenAI's chunks. An error is the last."""
        usages: dict[int, Usage] = {}

        def chunks_of(number: int, delta: Delta) -> list[dict[str, Any]]:
            usages[number] = delta.usage
            chunks = list(reply.chunks(number, delta))
            if options.include_usage:
                for chunk in chunks:
                    chunk["usage"] = reply.usage(usages.values()) if options.continuous_usage_stats else None
            return chunks

        try:
            if first is not None:
                yield chunks_of(*first)
            async for number, delta in pieces:
                yield chunks_of(number, delta)
            if options.include_usage:
                yield [reply.usage_chunk(usages.values())]
        except PagedError as error:
            yield [refusal_of(error, params).body()]
        finally:
            for usage in usages.values():
                self._metrics.count(usage)


class _Chat:
    """What other APIs need of the chat (ChatSource)."""

    def __init__(self, gateway: _Gateway, forms: FormOptions) -> None:
        self._gateway = gateway
        self._forms = forms

    async def asked(self, body: ChatBody) -> tuple[Asked, ChatReply]:
        model, asked = self._gateway.choose(body, asked_of_chat(body))
        return await chat_of(model.card, self._forms, body, asked)

    async def whole(self, request: Request, body: ChatBody) -> dict[str, Any]:
        return await self._gateway.whole(request, body, *await self.asked(body))

    async def chunks(self, request: Request, body: ChatBody) -> tuple[Chunks, Pieces]:
        return await self._gateway.chunks(request, body, *await self.asked(body))

    async def num_prompt_tokens(self, body: ChatBody) -> int:
        model, _ = self._gateway.choose(body, asked_of_chat(body))
        asked, _ = await self.asked(body)
        sampling = {"chat_template_kwargs": asked.sampling.get("chat_template_kwargs")}
        try:
            continued = {"continue_final_message": True, "add_generation_prompt": False}
            tokens = await model.client.tokenize(
                messages=asked.messages,
                tools=asked.tools,
                sampling=sampling,
                **(continued if asked.continue_final_message else {}),
            )
            return len(tokens)
        except PagedError as error:
            raise refusal_of(error, asked.params) from None


async def _events(chunks: Chunks) -> AsyncGenerator[bytes, None]:
    async with aclosing(chunks):
        async for of_piece in chunks:
            if of_piece:
                yield b"".join([b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in of_piece])
    yield _DONE


def _options(asked: Asked) -> dict[str, Any]:
    return {
        "messages": asked.messages,
        "tools": asked.tools,
        "continue_final_message": asked.continue_final_message,
        "cache_salt": asked.cache_salt,
        "request_id": asked.request_id,
        **asked.sampling,
    }


async def _first(pieces: Pieces) -> tuple[int, Delta] | None:
    """None: there is none."""
    return await anext(pieces, None)
