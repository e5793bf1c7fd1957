"""What a decoder's layers are made of, as plain data: a family (families/) reads it from a checkpoint's config, a block (blocks/) allocates and computes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterSite:
    """A packed product that adapters may change, and the modules of PEFT that it is made of."""

    modules: tuple[str, ...]  # within the layer, such as self_attn.q_proj
    in_size: int
    out_sizes: tuple[int, ...]  # rows of each module


@dataclass(frozen=True)
class AttentionSpec:
    """Attention with rotary positions over K and V in pages; query heads share KV heads (GQA, Ainslie et al., 2023)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # an RMS norm of each query and key head
    sliding_window: int | None = None  # tokens that a token attends to, itself included; None: all

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def sites(self, hidden_size: int) -> tuple[AdapterSite, ...]:
        """In the order of the block's linears."""
        qkv = AdapterSite(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), hidden_size, (self.q_size, self.kv_size, self.kv_size))
        return qkv, AdapterSite(("self_attn.o_proj",), self.q_size, (hidden_size,))


@dataclass(frozen=True)
class MlpSpec:
    """A gated perceptron: down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer, 2020)."""

    intermediate_size: int
    bias: bool = False

    def sites(self, hidden_size: int) -> tuple[AdapterSite, ...]:
        """In the order of the block's linears."""
        gate_up = AdapterSite(("mlp.gate_proj", "mlp.up_proj"), hidden_size, (self.intermediate_size,) * 2)
        return gate_up, AdapterSite(("mlp.down_proj",), self.intermediate_size, (hidden_size,))


@dataclass(frozen=True)
class LayerSpec:
    """A layer adds attention's and then the perceptron's answer to the residual stream, each of its RMS norm of the stream."""

    attention: AttentionSpec
    mlp: MlpSpec
