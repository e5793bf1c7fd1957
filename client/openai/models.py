"""The models behind one gateway: named by the operator, or all paged models that the servers have loaded, as they come
and go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from paged_client.async_client import AsyncPagedClient
from paged_client.cluster.cluster_client import ClusterClient
from paged_client.errors import PagedError
from paged_client.openai.errors import RefusalError, unknown_model
from paged_client.openai.model_card import Backend, ModelCard

_LOOK_SECONDS = 2.0  # between two looks at what the servers have loaded

Client = AsyncPagedClient | ClusterClient
Connect = Callable[[str], Client]

log = logging.getLogger("paged.openai")


class Discovery(Protocol):
    async def names(self) -> Sequence[str]:
        """Of the models that are to be served.

        Raises:
            PagedError: nobody can say.
        """

    async def close(self) -> None: ...


@dataclass(frozen=True)
class ServedModel:
    """A model, by one of the names that callers use."""

    name: str
    server_name: str  # what Triton Server calls it
    card: ModelCard

    @property
    def client(self) -> Backend:
        return self.card.client


class Models:
    """Owns the clients; each model has its own. `async with` enters them, and watches what comes and goes."""

    def __init__(self, connect: Connect, names: Mapping[str, str], discovery: Discovery | None = None) -> None:
        """connect: makes a model's client. names: what callers say → what Triton Server says. discovery: of models
        beside these, asked now and then.
        """
        self._connect = connect
        self._discovery = discovery
        # by Triton Server's name; one that is not served any more may be asked by its last callers
        self._clients: dict[str, Client] = {}
        self._cards: dict[str, ModelCard] = {}
        self._fixed = {name: self._served(name, server_name) for name, server_name in names.items()}
        # ever: one that is unloaded may be on its way back, and who asks for it is told to come again
        self._found: dict[str, ServedModel] = {}
        self._loaded: list[str] = []  # of those
        self._stack = AsyncExitStack()
        self._looking = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    def of_one(cls, client: Backend, names: Sequence[str]) -> Models:
        """One model by several names, whose client somebody else owns."""
        models = cls(lambda _: AsyncPagedClient(), {})
        card = ModelCard(client)
        models._fixed = {name: ServedModel(name, names[0], card) for name in names}
        return models

    async def __aenter__(self) -> Models:
        for client in self._clients.values():
            await self._stack.enter_async_context(client)
        if self._discovery is not None:
            self._watching = asyncio.ensure_future(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._stack.aclose()
        if self._discovery is not None:
            await self._discovery.close()

    @property
    def all(self) -> list[ServedModel]:
        """Those that are to be listed."""
        return [*self._fixed.values(), *(self._found[name] for name in self._loaded)]

    @property
    def clusters(self) -> dict[str, ClusterClient]:
        """Of the models with several servers, by Triton Server's names."""
        return {name: client for name, client in self._clients.items() if isinstance(client, ClusterClient)}

    def server_names(self) -> list[str]:
        return list(dict.fromkeys(model.server_name for model in self.all))

    def find(self, name: str) -> tuple[ServedModel, str]:
        """The model, and the adapter that the name asks for ("" if none), as in MODEL:ADAPTER. Whether there is such an
        adapter, the server knows.

        Raises:
            RefusalError: no such model was ever served.
        """
        served = {**self._found, **self._fixed}
        if name in served:
            return served[name], ""
        for model in served:
            if name.startswith(f"{model}:") and name != f"{model}:":
                return served[model], name.removeprefix(f"{model}:")
        raise unknown_model(name)

    def only(self) -> ServedModel:
        """The model of a request that names none.

        Raises:
            RefusalError: there are several.
        """
        if len(self.server_names()) == 1:
            return self.all[0]
        if not self.all and len(self._found) == 1:
            return next(iter(self._found.values()))
        raise RefusalError(
            f"model: missing; {len(self.all)} are served: /v1/models names them",
            param="model",
            code="missing_required_parameter",
        )

    async def takes_requests(self) -> bool:
        """Whether any of them would be answered."""
        clients = {id(model.client): model.client for model in self.all}
        return any(await asyncio.gather(*(client.takes_requests() for client in clients.values())))

    async def look(self) -> None:
        """Learns which models are there; no effect if they were named.

        Raises:
            PagedError: nobody can say.
        """
        if self._discovery is None:
            return
        async with self._looking:
            names = await self._discovery.names()
            for name in names:
                if name not in self._found:
                    served = self._served(name, name)
                    await self._stack.enter_async_context(self._clients[name])
                    self._found[name] = served
            for name in {*names} ^ {*self._loaded}:
                log.warning("the model '%s' is %s", name, "there" if name in names else "not there any more")
            self._loaded = list(names)

    def _served(self, name: str, server_name: str) -> ServedModel:
        if server_name not in self._clients:
            self._clients[server_name] = self._connect(server_name)
            self._cards[server_name] = ModelCard(self._clients[server_name])
        return ServedModel(name, server_name, self._cards[server_name])

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self.look()
            except (PagedError, ValueError) as error:  # ValueError: of a list of servers that somebody is writing
                log.debug("the list of models stays as it was: %s", error)
