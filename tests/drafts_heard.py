"""What a proposer of an engine on a CPU writes behind which text."""

from __future__ import annotations

from torch import Tensor

from paged_backend.engine.engine import Engine


class Listener:
    """Notes what a proposer writes behind which text."""

    def __init__(self, engine: Engine) -> None:
        self.rows = engine._runner._rows  # type: ignore[attr-defined]
        self._propose = self.rows._propose
        self.rows._propose = self
        self.heard: list[tuple[list[int], list[int]]] = []

    def __call__(self, token_ids: Tensor, lengths: Tensor, rows: Tensor, counts: Tensor) -> None:
        self._propose(token_ids, lengths, rows, counts)
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            length = int(lengths[row])
            text = token_ids[row, : length + count].tolist()
            self.heard.append((text[:length], text[length:]))


def sizes(**options: object) -> dict[str, object]:
    """Of a small engine."""
    return {"max_num_sequences": 8, "num_pages": 64, "page_size": 16, "max_model_len": 256} | options
