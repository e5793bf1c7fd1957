"""What has come of an answer."""

from __future__ import annotations

from typing import Any

from paged_client.answers import Answer, Delta, Usage, delta_of


class Progress:
    """Gathers the responses of one request."""

    def __init__(self) -> None:
        self.over = False
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._finish_reason: str | None = None
        self._usage = Usage()

    @property
    def begun(self) -> bool:
        return bool(self._token_ids or self._texts)

    @property
    def answer(self) -> Answer:
        return Answer("".join(self._texts), tuple(self._token_ids), self._finish_reason, self._usage)

    def take(self, outputs: dict[str, list[Any]], final: bool) -> Delta | None:
        """A response as a Delta; None if it has nothing to say."""
        self.over = final
        if not outputs:
            return None
        delta = delta_of(outputs, len(self._token_ids))
        if not (delta.text or delta.token_ids or delta.finish_reason):
            return None
        if delta.text:
            self._texts.append(delta.text)
        self._token_ids += delta.token_ids
        self._finish_reason, self._usage = delta.finish_reason, delta.usage
        return delta
