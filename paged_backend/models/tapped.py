"""Layers whose answers are read from outside: what a head that guesses tokens is made of (proposal_head.py)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from paged_backend.models.blocks.forward_pass import ForwardPass
from paged_backend.models.step import LayerPages


class TappableLayer(Protocol):
    def forward(self, x: Tensor, pages: LayerPages, at: ForwardPass) -> Tensor:
        """[T, hidden] -> [T, hidden], the residual stream before and after."""


class Tapped:
    """A layer whose answer somebody else reads, too, after the next layer has written over it."""

    def __init__(self, layer: TappableLayer, found: Tensor) -> None:
        """found: [max_tokens, hidden]."""
        self._layer, self._found = layer, found

    def forward(self, x: Tensor, pages: LayerPages, at: ForwardPass) -> Tensor:
        x = self._layer.forward(x, pages, at)
        self._found[: len(x)].copy_(x)
        return x
