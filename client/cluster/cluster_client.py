"""`ClusterClient`: several servers, asked as AsyncPagedClient asks one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from itertools import count
from types import TracebackType
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from paged_client.answers import Answer
from paged_client.cluster.resuming import ClusterStream, Way, whole
from paged_client.cluster.routing import KvAware, LeastOutstanding, RoundRobin, Router, load_selection
from paged_client.cluster.servers import Connection, Lookups, Servers
from paged_client.cluster.tokens import GatewayTokenizer, ServerTokenizer
from paged_client.errors import PagedError, UnavailableError, UnreachableError
from paged_client.question import Prompt, question_of

Result = TypeVar("Result")

SESSION_HEADER = "x-session-id"
_NOT_SAMPLING = ("messages", "tools", "continue_final_message", "cache_salt", "request_id")
ROUTERS = ("kv", "least", "turns")

log = logging.getLogger("paged.cluster")

_session: ContextVar[str] = ContextVar("session", default="")


class SessionHeader:
    """ASGI middleware: a request's session, by its header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            _session.set(Headers(scope=scope).get(SESSION_HEADER, "")[:256])
        await self._app(scope, receive, send)


class ClusterClient:
    """For one event loop; `async with` finds the servers and watches them."""

    def __init__(
        self,
        sources: Sequence[str],
        *,
        model: str,
        routing: str = "kv",
        timeout: float | None = 600.0,
        tokenizer: str = "",
        connect: Callable[[str], Connection] | None = None,
    ) -> None:
        """
        sources: see Lookups. routing: one of ROUTERS. timeout: seconds that an answer may take. tokenizer: folder or
        hub id; "": that of the servers' model.
        connect: makes a connection to a URL, for tests.

        Raises:
            ImportError: routing is "kv", and NVIDIA Dynamo's runtime is not installed.
        """
        self.servers = Servers(Lookups(sources), model, timeout, connect)
        self.router = _router(routing, self.servers)
        tokenises = routing == "kv"
        self._way = Way(self.servers, self.router, ServerTokenizer(self.servers) if tokenises else None, timeout)
        self._tokenizer_name = tokenizer
        self._tokenises = tokenises
        self._tasks: list[asyncio.Task[None]] = []
        self._embeddings = count()

    async def __aenter__(self) -> ClusterClient:
        await self.servers.look()
        self._tasks = [asyncio.ensure_future(self.servers.watch())]
        if self._tokenises:
            self._tasks.append(asyncio.ensure_future(self._load_tokenizer()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.servers.close()
        if isinstance(self.router, KvAware):
            self.router.close()
        if isinstance(self._way.tokenizer, GatewayTokenizer):
            self._way.tokenizer.close()

    @property
    def num_resumed(self) -> int:
        """Answers that went on in another server."""
        return self._way.num_resumed

    @property
    def num_asked_anew(self) -> int:
        """Requests that another server was asked before their first token."""
        return self._way.num_asked_anew

    async def _load_tokenizer(self) -> None:
        """Once a server says what model it has; until then servers are asked to tokenise."""
        name = self._tokenizer_name
        while not name:
            facts = next((server.facts for server in self.servers.all if server.facts is not None), None)
            if facts is not None and not facts.model:
                log.warning(
                    "the servers' model is a folder of theirs: they are asked to tokenise; --tokenizer names one here"
                )
                return
            name = "" if facts is None else facts.model
            if not name:
                await asyncio.sleep(0.2)
        self._way.tokenizer = await asyncio.to_thread(GatewayTokenizer.load, name) or self._way.tokenizer

    async def takes_requests(self) -> bool:
        """Whether a request could be answered."""
        return bool(self.servers.ready())

    async def tokenize(self, prompt: Prompt | None = None, **options: Any) -> tuple[int, ...]:
        """See AsyncPagedClient.tokenize."""
        return await self._of_any(lambda connection: connection.tokenize(prompt, **options))

    async def embed(self, prompt: Prompt | None = None, **options: Any) -> Answer:
        """See AsyncPagedClient.embed. Servers are asked in turn: no answer goes on for long, and most prompts have
        nothing in common.
        """
        first = next(self._embeddings)
        return await self._of_any(lambda connection: connection.embed(prompt, **options), first)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """See AsyncPagedClient.detokenize."""
        return await self._of_any(lambda connection: connection.detokenize(token_ids))

    async def describe(self) -> dict[str, Any]:
        """See AsyncPagedClient.describe."""
        return await self._of_any(lambda connection: connection.describe())

    async def _of_any(self, ask: Callable[[Connection], Awaitable[Result]], first: int = 0) -> Result:
        """What a server says that can, beginning with the `first`: they all have the same model."""
        failure: PagedError = UnreachableError("no server is ready")
        ready = self.servers.ready()
        first %= max(1, len(ready))
        for server in [*ready[first:], *ready[:first]]:
            try:
                return await ask(server.connection)
            except UnavailableError as error:
                failure = error
        raise failure

    async def generate(self, prompt: Prompt | None = None, **options: Any) -> Answer:
        """See PagedClient.generate."""
        return await whole(self._ask(prompt, options, stream=False))

    def stream(self, prompt: Prompt | None = None, **options: Any) -> ClusterStream:
        """See PagedClient.stream."""
        return self._ask(prompt, options, stream=True)

    def _ask(self, prompt: Prompt | None, options: dict[str, Any], *, stream: bool) -> ClusterStream:
        named = {name: options.pop(name) for name in _NOT_SAMPLING if name in options}
        return ClusterStream(self._way, question_of(prompt, options, stream=stream, **named), _session.get())


def check_routing(routing: str) -> None:
    """
    Raises:
        ImportError: routing is "kv", and NVIDIA Dynamo's runtime is not installed.
        ValueError: there is no such routing.
    """
    if routing not in ROUTERS:
        raise ValueError(f"routing: '{routing}' is none of {', '.join(ROUTERS)}")
    if routing == "kv":
        load_selection()


def _router(routing: str, servers: Servers) -> Router:
    check_routing(routing)
    if routing == "kv":
        return KvAware(servers)
    return LeastOutstanding() if routing == "least" else RoundRobin()
