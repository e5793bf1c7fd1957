"""The demo model as training sees it: Llama in plain torch, the layers' weights stacked, and its files in transformers'
layout.

`test_demo_model.py` compares its logits with LlamaForCausalLM's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig

from tools.demo_model.vocabulary import BOS_ID, EOS_ID, VOCAB_SIZE, for_transformers

_EPS = 1e-5
_THETA = 10_000.0
_EMBEDDING_DEVIATION = 0.04

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


class DemoModel(nn.Module):
    """Matrices of all layers are one parameter, [num_layers, out, in]: one optimizer step for all of them, and `[i]` is
    what transformers calls layer i's.
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
        self.gate = _matrices(layers, inner, hidden)
        self.up = _matrices(layers, inner, hidden)
        self.down = _matrices(layers, hidden, inner, scale=1 / math.sqrt(2 * layers))
        self.attention_norm = nn.Parameter(torch.ones(layers, hidden))
        self.mlp_norm = nn.Parameter(torch.ones(layers, hidden))
        self.final_norm = nn.Parameter(torch.ones(hidden))
        cos, sin = rotary_table(shape.max_model_len, shape.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, attention: Attention, dtype: torch.dtype = torch.float32) -> Tensor:
        """ids: int64 [B, T]. Logits [B, T, vocab] in `dtype`, in which all but the norms is computed."""
        shape, (rows, length) = self.shape, ids.shape
        cos, sin = self.cos[:length].to(dtype), self.sin[:length].to(dtype)
        x = functional.embedding(ids, self.embedding).to(dtype)
        stacked = [
            weights.to(dtype).unbind(0) for weights in (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)
        ]
        gains = (self.attention_norm.unbind(0), self.mlp_norm.unbind(0))
        for q, k, v, o, gate, up, down, attention_gain, mlp_gain in zip(*stacked, *gains, strict=True):
            normed = rms_norm(x, attention_gain)
            heads = [
                functional.linear(normed, weight).view(rows, length, -1, shape.head_dim).transpose(1, 2)
                for weight in (q, k, v)
            ]
            mixed = attention(rotated(heads[0], cos, sin), rotated(heads[1], cos, sin), heads[2])
            x = x + functional.linear(mixed.transpose(1, 2).reshape(rows, length, -1), o)
            normed = rms_norm(x, mlp_gain)
            x = x + functional.linear(
                functional.silu(functional.linear(normed, gate)) * functional.linear(normed, up), down
            )
        return functional.linear(rms_norm(x, self.final_norm), self.embedding.to(dtype))

    @property
    def matrices(self) -> list[nn.Parameter]:
        """[num_layers, out, in] each."""
        return [self.q, self.k, self.v, self.o, self.gate, self.up, self.down]


def _matrices(layers: int, rows: int, columns: int, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(layers, rows, columns) * scale / math.sqrt(columns))


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """As LlamaRMSNorm: the mean of squares in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)).to(x.dtype) * gain.to(x.dtype)


def rotary_table(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, [length, head_dim] each, as LlamaRotaryEmbedding computes them."""
    frequencies = _THETA ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def documents_of(ids: Tensor) -> Tensor:
    """Which conversation of its row each token is of: int64 [B, T]."""
    return (ids == BOS_ID).cumsum(1)


def masked_attention(documents: Tensor) -> Attention:
    """Attention to earlier tokens of the same conversation, by a mask: slow, for the CPU and for validation."""
    is_seen = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=is_seen, enable_gqa=True)

    return attention


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to all earlier tokens of the row: the fast path where flex_attention does not compile. A conversation
    then sees its neighbours, too.
    """
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# ---- files


def hugging_face_config(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_model_len,
        rms_norm_eps=_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": _THETA},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        architectures=["LlamaForCausalLM"],
    )


def hugging_face_weights(model: DemoModel, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The weights by the names that LlamaForCausalLM gives them; the head is the embedding."""
    names = {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj", "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    }  # fmt: skip
    found = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.final_norm}
    for ours, theirs in names.items():
        found |= {f"model.layers.{layer}.{theirs}.weight": weight for layer, weight in enumerate(getattr(model, ours))}
    return {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in found.items()}


def save(model: DemoModel, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes configuration, weights, tokenizer and chat template: all that a server needs."""
    folder.mkdir(parents=True, exist_ok=True)
    config = hugging_face_config(model.shape)
    config.dtype = dtype
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID).save_pretrained(folder)
    part = folder / "model.safetensors.part"  # a run that is cut off leaves the last whole file
    save_file(hugging_face_weights(model, dtype), part, metadata={"format": "pt"})
    part.rename(folder / "model.safetensors")
    for_transformers(tokenizer, model.shape.max_model_len).save_pretrained(folder)
