"""`AsyncPagedClient`: `PagedClient` for asyncio."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol

from paged_client.answers import Answer, Delta, Outputs
from paged_client.async_grpc_transport import AsyncGrpcTransport
from paged_client.client import DEFAULT_MODEL, DEFAULT_URL, parse_url
from paged_client.errors import InvalidRequestError, PagedError
from paged_client.http_transport import AsyncHttpTransport
from paged_client.progress import Progress
from paged_client.question import HEALTH_QUESTION, Messages, Prompt, Question, question_of, task_question
from paged_client.retry_policy import Limits, RetryPolicy

_HEALTH_SECONDS = 5.0  # a model that needs longer to say that it takes requests takes none


class _Call(Protocol):
    async def next(self, seconds: float | None) -> tuple[Outputs, bool]: ...
    def cancel(self) -> None: ...


class _Transport(Protocol):
    def ask(self, question: Question) -> _Call: ...
    async def is_ready(self) -> bool: ...
    async def ready_models(self) -> list[str]: ...
    async def inputs_of(self, model: str) -> frozenset[str]: ...
    async def close(self) -> None: ...


class AsyncPagedClient:
    """For one event loop. Arguments and errors are those of `PagedClient`.

    async with AsyncPagedClient("localhost:8001") as client:
        answer = await client.generate("Once upon a time", max_tokens=40)
        async for delta in client.stream("Once upon a time"):
            print(delta.text, end="", flush=True)
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str = DEFAULT_MODEL,
        timeout: float | None = 600.0,
        delta_timeout: float | None = None,
        retries: int = 2,
        max_connections: int = 0,
        keepalive_seconds: float | None = None,
    ) -> None:
        """See PagedClient.

        max_connections: to an http URL at once, others wait for one; 0: no limit. gRPC has one.
        keepalive_seconds: a gRPC server that says nothing for so long is asked whether it is there, and is gone if it
        does not answer for as long again. Only for a client that asks something at least every minute: Triton Server
        takes pings with nothing between them for an attack. None: it is not asked.
        """
        scheme, address = parse_url(url)
        self._limits = Limits(timeout, delta_timeout, retries)
        self._transport: _Transport = (
            AsyncHttpTransport(f"{scheme}://{address}", model, max_connections)
            if scheme.startswith("http")
            else AsyncGrpcTransport(address, model, scheme == "grpcs", keepalive_seconds)
        )

    async def __aenter__(self) -> AsyncPagedClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._transport.close()

    async def is_ready(self) -> bool:
        """Whether the server is there and has loaded the model."""
        return await self._transport.is_ready()

    async def takes_requests(self) -> bool:
        """Whether the model itself says so. Triton Server before 26.03 calls a model ready that has lost its engine for
        good.
        """
        if not await self._transport.is_ready():
            return False
        call = self._transport.ask(HEALTH_QUESTION)
        try:
            await call.next(_HEALTH_SECONDS)
        except InvalidRequestError:  # an older model, which does not know the question and reads requests
            return True
        except (PagedError, TimeoutError):
            return False
        finally:
            call.cancel()
        return True

    async def ready_models(self) -> list[str]:
        """Names of all models that the server has loaded, whoever's they are.

        Raises:
            PagedError: it cannot be asked, or does not say.
        """
        return await self._transport.ready_models()

    async def inputs_of(self, model: str) -> frozenset[str]:
        """The names of the inputs that a model of the server declares. Raises: as `ready_models`."""
        return await self._transport.inputs_of(model)

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        cache_salt: str = "",
        request_id: str = "",
        **sampling: Any,
    ) -> Answer:
        """See PagedClient.generate."""
        question = question_of(
            prompt,
            sampling,
            stream=False,
            messages=messages,
            tools=tools,
            continue_final_message=continue_final_message,
            cache_salt=cache_salt,
            request_id=request_id,
        )
        async with AsyncStream(self._transport, question, self._limits) as stream:
            async for _ in stream:
                pass
        return stream.answer

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        cache_salt: str = "",
        request_id: str = "",
        **sampling: Any,
    ) -> AsyncStream:
        """See PagedClient.stream."""
        question = question_of(
            prompt,
            sampling,
            stream=True,
            messages=messages,
            tools=tools,
            continue_final_message=continue_final_message,
            cache_salt=cache_salt,
            request_id=request_id,
        )
        return self.ask(question)

    def ask(self, question: Question, timeout: float | None = None) -> AsyncStream:
        """The answer to a question that has been put together already. timeout: seconds for it; None: the client's."""
        return AsyncStream(
            self._transport, question, self._limits if timeout is None else replace(self._limits, timeout=timeout)
        )

    async def tokenize(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sampling: Mapping[str, Any] | None = None,
        **switches: bool | None,
    ) -> tuple[int, ...]:
        """The prompt's token ids.

        sampling: add_special_tokens, truncate_prompt_tokens, chat_template_kwargs. switches: add_generation_prompt,
        continue_final_message.
        """
        chat = None if messages is None else {"messages": messages, "tools": tools, **switches}
        return (await self._task(task_question("tokenize", prompt, chat, sampling))).token_ids

    async def embed(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        cache_salt: str = "",
        request_id: str = "",
        **sampling: Any,
    ) -> Answer:
        """See PagedClient.embed."""
        question = task_question(
            "embed", prompt, None if messages is None else {"messages": messages}, sampling, cache_salt, request_id
        )
        return await self._task(question)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Their text, special tokens included."""
        return (await self._task(task_question("detokenize", list(token_ids)))).text

    async def describe(self) -> dict[str, Any]:
        """What the model says of itself: max_model_len, vocab_size, chat_templates, adapters …"""
        described: dict[str, Any] = json.loads((await self._task(task_question("describe"))).text)
        return described

    async def _task(self, question: Question) -> Answer:
        async with AsyncStream(self._transport, question, self._limits) as stream:
            async for _ in stream:
                pass
        return stream.answer


class AsyncStream:
    """An answer on its way: an asynchronous iterator of `Delta`. Also a context manager; leaving it or `close` cancels
    what is not over.
    """

    def __init__(self, transport: _Transport, question: Question, limits: Limits) -> None:
        self._call: _Call | None = None
        self._transport = transport
        self._question = question
        self._retry_policy = RetryPolicy(limits)
        self._progress = Progress()
        self._arrived: deque[Delta] = deque()

    @property
    def answer(self) -> Answer:
        """Everything that has come so far."""
        return self._progress.answer

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Delta:
        while not self._arrived and not self._progress.over:
            try:
                await self._listen()
            except BaseException:
                self.close()
                raise
        if self._arrived:
            return self._arrived.popleft()
        raise StopAsyncIteration

    async def _listen(self) -> None:
        """Takes the next response, or pauses before another attempt."""
        try:
            if self._call is None:
                self._call = self._transport.ask(self._question)
            outputs, final = await self._call.next(self._retry_policy.seconds())
        except PagedError as error:
            pause = self._retry_policy.pause(error, begun=self._progress.begun)
            if pause is None:
                raise
            self._leave()
            await asyncio.sleep(pause)
            return
        except TimeoutError:
            raise self._retry_policy.over() from None
        self._arrived.extend(self._progress.take(outputs, final))
        if final:
            self._leave()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._leave()

    def close(self) -> None:
        """Ends the iteration; a request that is not over is cancelled on the server. Needs no `await`."""
        self._progress.over = True
        self._arrived.clear()
        self._leave()

    def _leave(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()
