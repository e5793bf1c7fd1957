"""Heads that guess from a model's hidden states: a layer or two that a checkpoint brings, or that were trained for it.

An entry of a head stands at a token's position p. It is made of the model's hidden state of that token and of the token
after it, and gives a state, of which the head guesses the token at p + 2. Further guesses take the head's own state in
the place of the model's. Its K and V lie at p, as the model's do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from paged_backend.models.blocks.attention import plan_attention
from paged_backend.models.blocks.forward_pass import ForwardPass, RopeTensors
from paged_backend.models.step import LayerPages, StepTensors
from paged_kernels.reference import Ops


class ProposalHead(ABC):
    """Owns a head's parameters; keeps no state between steps."""

    taps: tuple[int, ...]  # it reads what so many of the model's layers have made of each token
    dtype: torch.dtype
    hidden_size: int

    def __init__(self, ops: Ops, ropes: Mapping[str | None, RopeTensors]) -> None:
        self._ops, self._ropes = ops, ropes

    @abstractmethod
    def entering(self, tapped: Tensor) -> Tensor:
        """[T, taps * the model's hidden size] -> [T, hidden_size]: the model's states as the head takes them."""

    def forward(self, step: StepTensors, states: Tensor, pages: LayerPages) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]; writes K and V into the pages. step: its input_ids are the tokens after
        those at its positions.
        """
        plan_attention(self._ops, step)
        return self._layer(step.input_ids, states, pages, ForwardPass(self._ops, self._ops, step, self._ropes))

    @abstractmethod
    def _layer(self, token_ids: Tensor, states: Tensor, pages: LayerPages, at: ForwardPass) -> Tensor:
        """As `forward`, whose attention is planned."""

    @abstractmethod
    def guesses(self, states: Tensor) -> Tensor:
        """[k, hidden_size] of `forward` -> the likeliest next token of each, [k] integers, ids of the model's."""
