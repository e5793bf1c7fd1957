"""Responses that later ones may go on from: in memory, the oldest forgotten first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from paged_client.openai.errors import RefusalError


@dataclass(frozen=True)
class StoredResponse:
    response: dict[str, Any]
    items: list[dict[str, Any]]  # the conversation before it, each with an id, without instructions

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """Everything that a later response goes on from."""
        return [*self.items, *self.response["output"]]


class ResponseStore:
    def __init__(self, max_responses: int, max_bytes: int) -> None:
        """max_responses: 0: nothing is kept. max_bytes: of all, as JSON, which is how they are kept."""
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._stored: OrderedDict[str, bytes] = OrderedDict()

    @property
    def keeps(self) -> bool:
        return self._max_responses > 0

    def put(self, response: dict[str, Any], items: list[dict[str, Any]]) -> None:
        stored = msgspec.json.encode(StoredResponse(response, items))
        if not self.keeps or len(stored) > self._max_bytes:
            return
        self._forget(response["id"])
        self._stored[response["id"]] = stored
        self._num_bytes += len(stored)
        while len(self._stored) > self._max_responses or self._num_bytes > self._max_bytes:
            self._forget(next(iter(self._stored)))

    def get(self, response_id: str, param: str | None = None) -> StoredResponse:
        """
        Raises:
            RefusalError: it is not kept, or not any more.
        """
        if param is not None and not self.keeps:
            raise RefusalError(
                f"{param}: responses are not kept here (--max-stored-responses 0)",
                param=param,
                code="unsupported_parameter",
            )
        if response_id not in self._stored:
            name = response_id[:80]
            raise RefusalError(
                f"there is no response '{name}', or not any more", 404, param=param, code="response_not_found"
            )
        self._stored.move_to_end(response_id)
        return msgspec.json.decode(self._stored[response_id], type=StoredResponse)

    def delete(self, response_id: str) -> None:
        """
        Raises:
            RefusalError: it is not kept.
        """
        self.get(response_id)
        self._forget(response_id)

    def _forget(self, response_id: str) -> None:
        self._num_bytes -= len(self._stored.pop(response_id, b""))
