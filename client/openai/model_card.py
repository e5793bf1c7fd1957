"""What the gateway knows of a model that it serves: asked of the model itself, once in a while."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from paged_client.answers import Answer
from paged_client.async_client import AsyncStream
from paged_client.cluster.resuming import ClusterStream
from paged_client.errors import InvalidRequestError, PagedError

_ANYTHING = [{"role": "user", "content": "Hello"}]
_END_TOKENS = 32
_MOST_PROMPT_ENDS = 100
_LONGEST_KEY = 1000  # characters of what an end is remembered by: callers write it
_FRESH_SECONDS = 10.0  # a model may be loaded anew, and adapters come and go


class Backend(Protocol):
    """What the gateway needs of AsyncPagedClient, or of ClusterClient."""

    async def takes_requests(self) -> bool: ...
    async def generate(self, prompt: Any = None, **options: Any) -> Answer: ...
    def stream(self, prompt: Any = None, **options: Any) -> AsyncStream | ClusterStream: ...
    async def embed(self, prompt: Any = None, **options: Any) -> Answer: ...
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
        self._prompt_ends: dict[str, str] = {}
        self._tokens: dict[str, int | None] = {}

    async def prompt_end(self, kwargs: Mapping[str, Any] | None) -> str:
        """How the template ends a prompt: it may have begun the answer's reasoning, or ended it. Asked once for each
        kwargs.

        It does not depend on what was said before, in any template known.
        """
        key = json.dumps(kwargs or {}, sort_keys=True)
        if key in self._prompt_ends:
            return self._prompt_ends[key]
        tokens = await self.client.tokenize(messages=_ANYTHING, sampling={"chat_template_kwargs": kwargs or None})
        end = await self.client.detokenize(tokens[-_END_TOKENS:])
        if len(key) <= _LONGEST_KEY:
            if len(self._prompt_ends) >= _MOST_PROMPT_ENDS:
                self._prompt_ends.clear()
            self._prompt_ends[key] = end
        return end

    async def token_of(self, word: str) -> int | None:
        """The id of a word that is one token; None: it is several."""
        if word not in self._tokens:
            tokens = await self.client.tokenize(word, sampling={"add_special_tokens": False})
            self._tokens[word] = tokens[0] if len(tokens) == 1 else None
        return self._tokens[word]

    async def description(self) -> Description:
        """At most some seconds old, as long as the model can be asked."""
        if time.monotonic() - self._asked_at > _FRESH_SECONDS:
            try:
                description = _description_of(await self.client.describe())
                if description != self._description:  # another model under the old name
                    self._prompt_ends.clear()
                    self._tokens.clear()
                self._description = description
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
