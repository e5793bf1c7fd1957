"""Which models of a Triton Server are paged's: asked of the server's repository index, and told by the inputs that each
declares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from paged_client.errors import PagedError, UnreachableError

# of every paged model; no other backend has them all
INPUTS = frozenset({"text_input", "input_ids", "messages", "sampling_parameters", "task"})


class _Server(Protocol):
    """What is needed of AsyncPagedClient."""

    async def ready_models(self) -> list[str]: ...
    async def inputs_of(self, model: str) -> frozenset[str]: ...


class Catalog:
    """Of servers that have the same models: the first that answers speaks for all."""

    def __init__(self) -> None:
        self._is_paged: dict[str, bool] = {}  # of models that were ready at the last look

    async def look(self, servers: Sequence[_Server]) -> list[str]:
        """Names of the paged models that are loaded.

        Raises:
            PagedError: no server can say.
        """
        failure: PagedError = UnreachableError("no server is there")
        for server in servers:
            try:
                return await self._look(server)
            except PagedError as error:
                failure = error
        raise failure

    async def _look(self, server: _Server) -> list[str]:
        names = await server.ready_models()
        self._is_paged = {
            name: self._is_paged[name] if name in self._is_paged else await server.inputs_of(name) >= INPUTS
            for name in names
        }
        return [name for name, is_paged in self._is_paged.items() if is_paged]
