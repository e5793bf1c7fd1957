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
    messages: list[dict[str, Any]]  # the conversation, this answer included, without instructions
    num_bytes: int


class ResponseStore:
    def __init__(self, max_responses: int, max_bytes: int) -> None:
        """max_responses: 0: nothing is kept."""
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()

    @property
    def keeps(self) -> bool:
        return self._max_responses > 0

    def put(self, response: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        num_bytes = len(msgspec.json.encode([response, messages]))
        if not self.keeps or num_bytes > self._max_bytes:
            return
        self._forget(response["id"])
        self._stored[response["id"]] = StoredResponse(response, messages, num_bytes)
        self._num_bytes += num_bytes
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
        return self._stored[response_id]

    def delete(self, response_id: str) -> None:
        """
        Raises:
            RefusalError: it is not kept.
        """
        self.get(response_id)
        self._forget(response_id)

    def _forget(self, response_id: str) -> None:
        found = self._stored.pop(response_id, None)
        if found is not None:
            self._num_bytes -= found.num_bytes
