"""An EAGLE-3 head for the demo model as training sees it (Li et al., 2025): what it reads, and its guesses unrolled.

The serving side's words are in paged_backend/models/eagle3.py: an entry at position p is made of what some of the
model's layers have made of token p, and of token p + 1; its state gives the guess at token p + 2. The entry after it is
made of that state in the layers' place, and so on. A training that only ever shows true states makes a head whose
second guess is poor: so the head is unrolled here as it is served ("training-time test").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.demo_model.model import DemoModel, rms_norm, rotary_table, rotated

MOST_GUESSES = 8  # that can be unrolled


@dataclass(frozen=True)
class HeadShape:
    """1.4 million parameters, 2.9 MB in bfloat16, beside a model of 7.1. A third of it is the vocabulary, of which it
    knows the tokens that 98.6 % of what is said is made of.
    """

    hidden_size: int = 256  # the model's
    intermediate_size: int = 512
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 2048
    taps: tuple[int, ...] = (2, 4, 6)  # it reads what so many of the model's layers have made of a token


@dataclass(frozen=True)
class Starts:
    """Where guesses begin, in a batch of rows laid end to end."""

    indices: Tensor  # int64 [S], ascending: of entries that are made of the model's states
    positions: Tensor  # int64 [S]: in their rows
    documents: list[tuple[slice, slice]]  # tokens of a conversation, and which of the starts are its


class DraftHead(nn.Module):
    """Matrices are [1, out, in] each, for the optimizer."""

    def __init__(self, shape: HeadShape, model: DemoModel, token_ids: Tensor) -> None:
        """token_ids: int64 [vocab_size], ascending: the tokens that it may guess. Their rows of the model's embedding,
        which is its head, are what the head begins with.
        """
        super().__init__()
        self.shape = shape
        hidden, inner = shape.hidden_size, shape.intermediate_size
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.fusion = _matrix(hidden, hidden * len(shape.taps))
        self.q = _matrix(queries, 2 * hidden)
        self.k = _matrix(keys, 2 * hidden)
        self.v = _matrix(keys, 2 * hidden)
        self.o = _matrix(hidden, queries)
        self.gate = _matrix(inner, hidden)
        self.up = _matrix(inner, hidden)
        self.down = _matrix(hidden, inner)
        self.token_norm, self.state_norm, self.mlp_norm = (nn.Parameter(torch.ones(hidden)) for _ in range(3))
        self.final_norm = nn.Parameter(model.final_norm.detach().clone())
        self.head = nn.Parameter(model.embedding.detach()[token_ids].clone())
        self.register_buffer("token_ids", token_ids)
        self.register_buffer("embedding", model.embedding.detach(), persistent=False)
        cos, sin = rotary_table(model.shape.max_model_len + MOST_GUESSES, shape.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def matrices(self) -> list[nn.Parameter]:
        return [self.fusion, self.q, self.k, self.v, self.o, self.gate, self.up, self.down]

    def guesses(self, ids: Tensor, answers: list[Tensor], starts: Starts, count: int) -> Iterator[Tensor]:
        """Yields logits [S, vocab_size] `count` times: of the token two after each start, three after, and so on, given
        the text before. ids: int64 [B, T]. answers: what the model's layers have made of them, [B, T, hidden] each.
        """
        text = ids.flatten()
        tapped = torch.cat([answers[after - 1] for after in self.shape.taps], -1).flatten(0, 1)
        states = functional.linear(tapped, self._of(self.fusion, tapped))
        entries = self._entries(text.roll(-1), states)
        keys, values = self._keys(entries, torch.arange(ids.shape[1], device=ids.device).repeat(len(ids)))
        state, entry = states[starts.indices], entries[starts.indices]
        own: list[tuple[Tensor, Tensor]] = []
        for number in range(count):
            positions = starts.positions + number
            if number:
                entry = self._entries(text[(starts.indices + number + 1).clamp(max=len(text) - 1)], state)
                own.append(self._keys(entry, positions))
            queries = self._heads(functional.linear(entry, self._of(self.q, entry)), positions)
            state = self._layer(state, _attended(queries, keys, values, own, starts))
            yield functional.linear(rms_norm(state, self.final_norm), self.head.to(state.dtype))

    def _entries(self, token_ids: Tensor, states: Tensor) -> Tensor:
        """[n], [n, hidden] -> [n, 2 * hidden]"""
        tokens = functional.embedding(token_ids, self.embedding).to(states.dtype)
        return torch.cat((rms_norm(tokens, self.token_norm), rms_norm(states, self.state_norm)), -1)

    def _keys(self, entries: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [n, KV heads, head_dim] each."""
        values = functional.linear(entries, self._of(self.v, entries))
        return (
            self._heads(functional.linear(entries, self._of(self.k, entries)), positions),
            values.unflatten(-1, (-1, self.shape.head_dim)),
        )

    def _heads(self, x: Tensor, positions: Tensor) -> Tensor:
        """[n, heads * head_dim] -> [n, heads, head_dim], rotated."""
        cos, sin = (table[positions, None].to(x.dtype) for table in (self.cos, self.sin))
        return rotated(x.unflatten(-1, (-1, self.shape.head_dim)), cos, sin)

    def _layer(self, states: Tensor, mixed: Tensor) -> Tensor:
        x = states + functional.linear(mixed, self._of(self.o, mixed))
        normed = rms_norm(x, self.mlp_norm)
        gated = functional.silu(functional.linear(normed, self._of(self.gate, x)))
        return x + functional.linear(gated * functional.linear(normed, self._of(self.up, x)), self._of(self.down, x))

    @staticmethod
    def _of(matrix: Tensor, x: Tensor) -> Tensor:
        return matrix[0].to(x.dtype)


def _matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(1, rows, columns) / math.sqrt(columns))


def _attended(
    queries: Tensor, keys: Tensor, values: Tensor, own: list[tuple[Tensor, Tensor]], starts: Starts
) -> Tensor:
    """[S, heads * head_dim]: each start's newest entry attends to the entries of its conversation up to the start, which
    were made of the model's states, and to its own after it. queries: [S, heads, head_dim]; keys, values:
    [tokens, KV heads, head_dim]; own: [S, KV heads, head_dim] each.
    """
    found = []
    for tokens, mine in starts.documents:
        some = queries[mine].unflatten(1, (keys.shape[1], -1))  # [s, KV heads, group, head_dim]
        scores = torch.einsum("skgd,nkd->skgn", some, keys[tokens])
        ends = starts.indices[mine] - tokens.start
        hidden = torch.arange(scores.shape[-1], device=ends.device) > ends[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        later = [(some * k[mine][:, :, None]).sum(-1, keepdim=True) for k, _ in own]
        shares = (torch.cat((scores, *later), -1).float() * queries.shape[-1] ** -0.5).softmax(-1).to(queries.dtype)
        mixed = torch.einsum("skgn,nkd->skgd", shares[..., : scores.shape[-1]], values[tokens])
        for number, (_, v) in enumerate(own):
            mixed = mixed + shares[..., scores.shape[-1] + number, None] * v[mine][:, :, None]
        found.append(mixed.flatten(1))
    return torch.cat(found)
