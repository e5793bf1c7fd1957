"""The demo model as training sees it: Llama in plain torch, or with experts Qwen3-MoE, the layers' weights stacked.

`test_demo_model.py` compares its logits with LlamaForCausalLM's and Qwen3MoeForCausalLM's. model_files.py has its
files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.demo_model.vocabulary import BOS_ID, VOCAB_SIZE

EPS = 1e-5
THETA = 10_000.0
_EMBEDDING_DEVIATION = 0.04
_ROUTER_DEVIATION = 0.02

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, H, T, D], k and v [B, KV, T, D] -> [B, H, T, D]


@dataclass(frozen=True)
class Shape:
    """7.1 million parameters, 14.3 MB in bfloat16. Few layers, because on a CPU a layer costs more than its arithmetic;
    many heads, to look things up.
    """

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 256
    intermediate_size: int = 896
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    max_model_len: int = 2048
    num_experts: int = 0  # 0: dense. Else intermediate_size is one expert's, and queries and keys are normed per head
    top_k: int = 2

    @staticmethod
    def of_experts(num_experts: int, top_k: int) -> Shape:
        """Fewer layers and narrower: with 8 experts 5.5 million parameters, half of them at work for a token."""
        return Shape(intermediate_size=128, num_layers=4, num_experts=num_experts, top_k=top_k)


class DemoModel(nn.Module):
    """Matrices of all layers are one parameter, [num_layers, out, in]: one optimizer step for all of them, and `[i]` is
    what transformers calls layer i's. Experts' are [num_layers * num_experts, out, in].
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        layers, hidden, inner = shape.num_layers, shape.hidden_size, shape.intermediate_size
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.embedding = nn.Parameter(torch.randn(shape.vocab_size, hidden) * _EMBEDDING_DEVIATION)
        self.q = _matrices(layers, queries, hidden)
        self.k = _matrices(layers, keys, hidden)
        self.v = _matrices(layers, keys, hidden)
        # what the residual adds up, layer by layer
        self.o = _matrices(layers, hidden, queries, scale=1 / math.sqrt(2 * layers))
        blocks = layers * max(1, shape.num_experts)
        self.gate = _matrices(blocks, inner, hidden)
        self.up = _matrices(blocks, inner, hidden)
        self.down = _matrices(blocks, hidden, inner, scale=1 / math.sqrt(2 * layers))
        if shape.num_experts:
            self.router = nn.Parameter(torch.randn(layers, shape.num_experts, hidden) * _ROUTER_DEVIATION)
            self.q_norm = nn.Parameter(torch.ones(layers, shape.head_dim))
            self.k_norm = nn.Parameter(torch.ones(layers, shape.head_dim))
        self.attention_norm = nn.Parameter(torch.ones(layers, hidden))
        self.mlp_norm = nn.Parameter(torch.ones(layers, hidden))
        self.final_norm = nn.Parameter(torch.ones(hidden))
        cos, sin = rotary_table(shape.max_model_len, shape.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, attention: Attention, dtype: torch.dtype = torch.float32) -> Tensor:
        """ids: int64 [B, T]. Logits [B, T, vocab] in `dtype`, in which all but the norms is computed."""
        return self.with_balance(ids, attention, dtype)[0]

    def with_balance(
        self, ids: Tensor, attention: Attention, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, and how unevenly the experts were used: a scalar, 1 if evenly, 0 without experts."""
        x, uneven = self.states(ids, attention, dtype)
        return self.head(x), uneven

    def head(self, x: Tensor) -> Tensor:
        """Logits [..., vocab] from last states [..., hidden], in their type."""
        return functional.linear(x, self.embedding.to(x.dtype))

    def states(
        self, ids: Tensor, attention: Attention, dtype: torch.dtype, answers: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the head reads, [B, T, hidden] in `dtype`, and how unevenly the experts were used. answers: gets what
        each layer has made of the tokens, [B, T, hidden].
        """
        shape, (rows, length) = self.shape, ids.shape
        cos, sin = self.cos[:length].to(dtype), self.sin[:length].to(dtype)
        x = functional.embedding(ids, self.embedding).to(dtype)
        stacked = [weights.to(dtype).unbind(0) for weights in (self.q, self.k, self.v, self.o)]
        mlp = [weights.unbind(0) for weights in self._perceptrons(dtype)]
        gains = (self.attention_norm.unbind(0), self.mlp_norm.unbind(0))
        uneven = torch.zeros((), device=ids.device)
        layers = zip(*stacked, *mlp, *gains, strict=True)
        for layer, (q, k, v, o, gate, up, down, attention_gain, mlp_gain) in enumerate(layers):
            normed = rms_norm(x, attention_gain)
            heads = [functional.linear(normed, weight).view(rows, length, -1, shape.head_dim) for weight in (q, k, v)]
            if shape.num_experts:
                heads[0], heads[1] = rms_norm(heads[0], self.q_norm[layer]), rms_norm(heads[1], self.k_norm[layer])
            heads = [head.transpose(1, 2) for head in heads]
            mixed = attention(rotated(heads[0], cos, sin), rotated(heads[1], cos, sin), heads[2])
            x = x + functional.linear(mixed.transpose(1, 2).reshape(rows, length, -1), o)
            normed = rms_norm(x, mlp_gain)
            inner = functional.silu(functional.linear(normed, gate)) * functional.linear(normed, up)
            if shape.num_experts:
                shares, unevenness = routed(functional.linear(normed, self.router[layer].to(dtype)), shape.top_k)
                inner = (inner.unflatten(-1, (shape.num_experts, -1)) * shares[..., None].to(dtype)).flatten(-2)
                uneven = uneven + unevenness / shape.num_layers
            x = x + functional.linear(inner, down)
            if answers is not None:
                answers.append(x)
        return rms_norm(x, self.final_norm), uneven

    def _perceptrons(self, dtype: torch.dtype) -> list[Tensor]:
        """gate, up and down, one of each a layer: with experts all of a layer's side by side. To compute all of them
        and weigh most with nothing costs more arithmetic than grouping tokens would, and no grouping.
        """
        weights = [matrices.to(dtype) for matrices in (self.gate, self.up, self.down)]
        if not self.shape.num_experts:
            return weights
        gate, up, down = (matrices.unflatten(0, (-1, self.shape.num_experts)) for matrices in weights)
        return [gate.flatten(1, 2), up.flatten(1, 2), down.transpose(1, 2).flatten(2)]

    @property
    def matrices(self) -> list[nn.Parameter]:
        """[num_layers, out, in] each."""
        return [self.q, self.k, self.v, self.o, self.gate, self.up, self.down]


def _matrices(layers: int, rows: int, columns: int, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(layers, rows, columns) * scale / math.sqrt(columns))


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """As LlamaRMSNorm: the mean of squares in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * gain.to(x.dtype)


def routed(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Each expert's share in each token: the softmax's top k, which add up to 1, and 0 for the others. logits:
    [B, T, experts]. And how unevenly experts are used: Switch Transformers' balance loss, 1 at its best.
    """
    likely = logits.float().softmax(-1)
    values, chosen = likely.topk(top_k, -1)
    shares = torch.zeros_like(likely).scatter(-1, chosen, values / values.sum(-1, keepdim=True))
    used = (shares > 0).float().mean((0, 1)) / top_k
    return shares, logits.shape[-1] * (used * likely.mean((0, 1))).sum()


def rotary_table(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, [length, head_dim] each, as LlamaRotaryEmbedding computes them."""
    frequencies = THETA ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def documents_of(ids: Tensor) -> Tensor:
    """Which conversation of its row each token is of: int64 [B, T]."""
    return (ids == BOS_ID).cumsum(1)


def masked_attention(documents: Tensor) -> Attention:
    """Attention to earlier tokens of the same conversation, by a mask: slow, for validation on a GPU."""
    is_seen = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=is_seen, enable_gqa=True)

    return attention


def attention_by_document(documents: Tensor) -> Attention:
    """As `masked_attention`, each conversation by itself: on a CPU three times as fast forwards and backwards."""
    lengths = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in documents]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [
            torch.cat(
                [_attention_of_one(*one) for one in zip(*(x[row].split(found, 1) for x in (q, k, v)), strict=True)], 1
            )
            for row, found in enumerate(lengths)
        ]
        return torch.stack(rows)

    return attention


def _attention_of_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal. q: [heads, n, head_dim]; k, v: [KV heads, n, head_dim]."""
    if not torch.is_grad_enabled():  # torch's own is faster forwards, and slower backwards
        return functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    (heads, length, head_dim), groups = q.shape, k.shape[0]
    scores = q.reshape(groups, -1, head_dim) @ k.transpose(1, 2)
    scores = scores.view(groups, -1, length, length).float() * head_dim**-0.5
    scores = scores + torch.full((length, length), -torch.inf).triu(1)
    mixed = scores.softmax(-1).to(v.dtype).view(groups, -1, length) @ v
    return mixed.view(heads, length, head_dim)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to all earlier tokens of the row: the fast path where flex_attention does not compile. A conversation
    then sees its neighbours, too.
    """
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
