"""What the gateway knows of a model that it serves: asked of the model itself, once in a while."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from paged_client.answers import Answer
from paged_client.async_client import AsyncStream
from paged_client.cluster.resuming import ClusterStream
from paged_client.errors import InvalidRequestError, PagedError

_FRESH_SECONDS = 10.0  # a model may be loaded anew, and adapters come and go


class Backend(Protocol):
    """What the gateway needs of AsyncPagedClient, or of ClusterClient."""

    async def takes_requests(self) -> bool: ...
    async def generate(self, prompt: Any = None, **options: Any) -> Answer: ...
    def stream(self, prompt: Any = None, **options: Any) -> AsyncStream | ClusterStream: ...
    async def tokenize(self, prompt: Any = None, **options: Any) -> tuple[int, ...]: ...
    async def detokenize(self, token_ids: Any) -> str: ...
    async def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Description:
    """A model of an older release says nothing of itself: then nothing is known."""

    max_model_len: int | None = None
    special_words: frozenset[str] = frozenset()
    chat_templates: dict[str, str] = field(default_factory=dict)
    response_template: dict[str, Any] | None = None
    adapters: tuple[str, ...] = ()


class ModelCard:
    """One model behind the gateway."""

    def __init__(self, client: Backend) -> None:
        self.client = client
        self._description = Description()
        self._asked_at = float("-inf")

    async def description(self) -> Description:
        """At most some seconds old, as long as the model can be asked."""
        if time.monotonic() - self._asked_at > _FRESH_SECONDS:
            try:
                self._description = _description_of(await self.client.describe())
            except InvalidRequestError:
                self._description = Description()
            except PagedError:  # it is away for a while, and is as it was until it says otherwise
                return self._description
            self._asked_at = time.monotonic()
        return self._description


def _description_of(said: dict[str, Any]) -> Description:
    return Description(
        max_model_len=said.get("max_model_len"),
        special_words=frozenset(said.get("special_words") or ()),
        chat_templates=said.get("chat_templates") or {},
        response_template=said.get("response_template"),
        adapters=tuple(said.get("adapters") or ()),
    )
