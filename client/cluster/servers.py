"""The servers behind a gateway: found by name or in a file, watched, and taken out while they do not answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from paged_backend.config import kv_event_addresses
from paged_client.answers import Answer
from paged_client.async_client import AsyncPagedClient, AsyncStream
from paged_client.client import parse_url
from paged_client.errors import InvalidRequestError, PagedError
from paged_client.question import Question

_CHECK_SECONDS = 1.0  # between two looks at a server
_LOOKUP_SECONDS = 2.0  # between two readings of a list or name
# of silence before a server is asked for a sign of life, and then for it: one that vanished is noticed after twice as
# long
KEEPALIVE_SECONDS = 5.0
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_EVERYWHERE = ("*", "0.0.0.0", "[::]")

log = logging.getLogger("paged.cluster")


class Connection(Protocol):
    """What is needed of AsyncPagedClient."""

    def ask(self, question: Question, timeout: float | None = None) -> AsyncStream: ...
    async def takes_requests(self) -> bool: ...
    async def embed(self, prompt: Any = None, **options: Any) -> Answer: ...
    async def tokenize(self, prompt: Any = None, **options: Any) -> tuple[int, ...]: ...
    async def detokenize(self, token_ids: Sequence[int]) -> str: ...
    async def describe(self) -> dict[str, Any]: ...
    async def close(self) -> None: ...


@dataclass(frozen=True)
class Facts:
    """What a server says of itself."""

    model: str = ""  # hub id; "": a folder, or not known
    page_size: int = 0
    num_pages: int = 0
    max_batched_tokens: int = 0
    kv_events: str = ""  # its option


@dataclass
class Server:
    """One of them."""

    url: str
    connection: Connection
    number: int  # its name among routers; never given to another
    ready: bool = False
    facts: Facts | None = None  # None: not asked yet
    num_outstanding: int = 0  # requests of this gateway that it has not answered
    num_asked: int = 0  # requests of this gateway, all in all

    @property
    def kv_addresses(self) -> tuple[str, str] | None:
        """Where it tells what it has cached, and where one asks for what was missed, as seen from here; None: nowhere
        that can be reached.
        """
        addresses = None if self.facts is None else kv_event_addresses(self.facts.kv_events)
        if addresses is None or addresses[0].startswith("ipc://"):
            return addresses
        own_host = host_of(self.url)
        host = addresses[0].removeprefix("tcp://").rpartition(":")[0]
        if host in _LOOPBACK and own_host not in _LOOPBACK:
            return None  # another machine's loopback interface
        seen = own_host if host in _EVERYWHERE else host
        publishing, replaying = (f"tcp://{seen}:{address.rpartition(':')[2]}" for address in addresses)
        return publishing, replaying


def host_of(url: str) -> str:
    _, address = parse_url(url)
    return address.rpartition(":")[0]


@dataclass(frozen=True)
class Lookups:
    """Where servers are found: URLs as they stand; dns://HOST:PORT, every address of a name; file:///PATH, a URL a
    line.
    """

    sources: Sequence[str]

    @property
    def change(self) -> bool:
        return any(source.startswith(("dns://", "file://")) for source in self.sources)

    async def urls(self) -> list[str]:
        """
        Raises:
            ValueError: a source is no URL, or its file cannot be read.
        """
        found: dict[str, None] = {}
        for source in self.sources:
            for url in await self._urls_of(source):
                parse_url(url)
                found[url] = None
        return list(found)

    async def _urls_of(self, source: str) -> list[str]:
        if source.startswith("file://"):
            try:
                lines = Path(urlsplit(source).path).read_text().splitlines()
            except OSError as error:
                raise ValueError(f"{source}: {error.strerror}") from None
            return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not source.startswith("dns://"):
            return [source]
        host, _, port = source.removeprefix("dns://").rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"{source}: expected dns://HOST:PORT")
        try:
            entries = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        except OSError:
            return []  # a headless service without a ready pod has no address
        addresses = sorted({entry[4][0] for entry in entries})
        return [f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses]


@dataclass
class Servers:
    """Owns the list. `watch` keeps it true."""

    lookups: Lookups
    model: str
    timeout: float | None
    connect: Callable[[str], Connection] | None = None  # for tests
    all: list[Server] = field(default_factory=list)
    _count: int = 0
    _listeners: list[Callable[[], Awaitable[None]]] = field(default_factory=list)

    def on_change(self, listener: Callable[[], Awaitable[None]]) -> None:
        """`listener` is awaited after servers came, left, or became ready or not."""
        self._listeners.append(listener)

    def ready(self, but: Sequence[Server] = ()) -> list[Server]:
        return [server for server in self.all if server.ready and server not in but]

    async def look(self) -> None:
        """Reads the list again, and asks every server whether it is ready.

        Raises:
            ValueError: what was given as a server is none.
        """
        await self._take(await self.lookups.urls())
        await asyncio.gather(*(self._check(server) for server in self.all))

    async def watch(self) -> None:
        """For ever: a look now and then."""
        loop = asyncio.get_running_loop()
        next_lookup = loop.time() + _LOOKUP_SECONDS
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            if self.lookups.change and loop.time() >= next_lookup:
                next_lookup = loop.time() + _LOOKUP_SECONDS
                try:
                    await self._take(await self.lookups.urls())
                except ValueError as error:
                    log.warning("the list of servers stays as it was: %s", error)
            await asyncio.gather(*(self._check(server) for server in self.all))

    async def lose(self, server: Server, reason: PagedError) -> None:
        """A request found that it is not there: nobody else need find out."""
        if server.ready:
            log.warning("%s is taken out: %s", server.url, reason)
            server.ready = False
            await self._tell()

    async def close(self) -> None:
        for server in self.all:
            with contextlib.suppress(Exception):  # a connection that is broken already
                await server.connection.close()

    async def _take(self, urls: Sequence[str]) -> None:
        known = {server.url: server for server in self.all}
        left = [server for url, server in known.items() if url not in urls]
        self.all = [known.get(url) or self._new(url) for url in urls]
        for server in left:
            log.warning("%s has left the list of servers", server.url)
            server.ready = False  # its streams go on until they end or break
        if left:
            await self._tell()

    def _new(self, url: str) -> Server:
        self._count += 1
        return Server(url, self.connect(url) if self.connect is not None else self._connection(url), self._count)

    def _connection(self, url: str) -> AsyncPagedClient:
        return AsyncPagedClient(
            url, model=self.model, timeout=self.timeout, retries=0, keepalive_seconds=KEEPALIVE_SECONDS
        )

    async def _check(self, server: Server) -> None:
        ready = await server.connection.takes_requests()
        if ready and (server.facts is None or not server.ready):  # another start may bring other options
            server.facts = await _facts_of(server.connection)
        if ready != server.ready and server in self.all:
            server.ready = ready
            log.warning("%s is %s", server.url, "ready" if ready else "not ready")
            await self._tell()

    async def _tell(self) -> None:
        for listener in self._listeners:
            await listener()


async def _facts_of(connection: Connection) -> Facts:
    try:
        said = await connection.describe()
    except InvalidRequestError:
        return Facts()  # an older release says nothing of itself
    except PagedError as error:
        log.warning("a server does not say what it is: %s", error)
        return Facts()
    return Facts(
        model=said.get("model") or "",
        page_size=said.get("page_size") or 0,
        num_pages=said.get("num_pages") or 0,
        max_batched_tokens=said.get("max_batched_tokens") or 0,
        kv_events=said.get("kv_events") or "",
    )
