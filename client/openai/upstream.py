"""The servers behind the gateway, as its command line names them, and which of their models it serves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from paged_client.async_client import AsyncPagedClient
from paged_client.catalog import Catalog
from paged_client.client import DEFAULT_MODEL
from paged_client.cluster.cluster_client import ClusterClient, check_routing
from paged_client.cluster.servers import Lookups
from paged_client.errors import PagedError, UnreachableError
from paged_client.openai.models import Client, Models

_NO_RETRIES = 0  # the caller's library does that

log = logging.getLogger("paged.openai")


@dataclass(frozen=True)
class Upstream:
    """Servers that have the same models."""

    urls: Sequence[str]
    routing: str = "kv"  # between several
    timeout: float | None = 600.0  # seconds that an answer may take
    tokenizer: str = ""  # of several servers' model: a folder or hub id
    max_connections: int = 0  # to one server over HTTP; 0: no limit

    @property
    def is_cluster(self) -> bool:
        return len(self.urls) > 1 or self.urls[0].startswith(("dns://", "file://"))

    def client(self, model: str) -> Client:
        if self.is_cluster:
            return ClusterClient(
                self.urls, model=model, routing=self.routing, timeout=self.timeout, tokenizer=self.tokenizer
            )
        return AsyncPagedClient(
            self.urls[0], model=model, timeout=self.timeout, retries=_NO_RETRIES, max_connections=self.max_connections
        )

    def models(self, names: Sequence[str], aliases: Sequence[str]) -> Models:
        """
        names: as the servers say; none: all paged models that they have loaded. aliases: as callers say, for the only
            one.

        Raises:
            ValueError: aliases for several models, a URL that is none, or an unknown routing.
            ImportError: the routing needs a package.
        """
        if self.is_cluster:
            check_routing(self.routing)
        if aliases:
            if len(names) > 1:
                raise ValueError(f"--served-name: for one model, and --model-name names {len(names)}")
            name = names[0] if names else DEFAULT_MODEL
            return Models(self.client, dict.fromkeys(aliases, name))
        return Models(self.client, {name: name for name in names}, None if names else Discovery(self.urls))


class Discovery:
    """Asks the servers which models they have."""

    def __init__(self, sources: Sequence[str]) -> None:
        """
        Raises:
            ValueError: a URL is none.
        """
        self._lookups = Lookups(sources)
        self._catalog = Catalog()
        self._warned = False
        self._clients = {
            source: AsyncPagedClient(source, retries=_NO_RETRIES)
            for source in sources
            if not source.startswith(("dns://", "file://"))
        }

    async def names(self) -> Sequence[str]:
        """Of the paged models that are loaded; of servers that do not say, the model's usual name.

        Raises:
            UnreachableError: no server is there.
        """
        urls = await self._lookups.urls()
        for url in self._clients.keys() - set(urls):
            await self._clients.pop(url).close()
        for url in urls:
            self._clients.setdefault(url, AsyncPagedClient(url, retries=_NO_RETRIES))
        try:
            return await self._catalog.look([self._clients[url] for url in urls])
        except UnreachableError:
            raise
        except PagedError as error:
            if not self._warned:
                log.warning("%s: '%s' is served; --model-name names others", error, DEFAULT_MODEL)
                self._warned = True
            return [DEFAULT_MODEL]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()
