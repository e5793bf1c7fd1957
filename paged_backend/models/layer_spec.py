"""What a decoder's layers are made of, as plain data: a family (families/) reads it from a checkpoint's config, a block (blocks/) allocates and computes it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from paged_backend.errors import EngineError
from paged_backend.models.shard import IN, OUT, Cut, Shard, even_cut
from paged_kernels.experts import Gate, Routing

WHOLE = Shard()


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
    shard: Shard = WHOLE  # the heads are this rank's
    kv_copies: int = 1  # ranks that have the same KV heads

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def of_rank(self, shard: Shard) -> AttentionSpec:
        """With the rank's query heads and the KV heads that those share. Where there are fewer KV heads than ranks, several ranks keep the same.

        Raises:
            EngineError: the heads cannot be divided among so many ranks.
        """
        num_heads = shard.divide(self.num_heads, "num_attention_heads")
        if shard.size <= self.num_kv_heads:
            return replace(self, num_heads=num_heads, num_kv_heads=shard.divide(self.num_kv_heads, "num_key_value_heads"), shard=shard)
        if shard.size % self.num_kv_heads:
            raise EngineError(f"tensor_parallel_size: {shard.size} ranks cannot have equal parts of num_key_value_heads ({self.num_kv_heads})")
        return replace(self, num_heads=num_heads, num_kv_heads=1, shard=shard, kv_copies=shard.size // self.num_kv_heads)

    def cuts(self) -> dict[str, Cut]:
        """The rank's part of each matrix, by the module's name within the layer."""
        q, out = even_cut(self.shard, OUT, self.q_size), even_cut(self.shard, IN, self.q_size)
        kv = Cut(OUT, self.shard.rank // self.kv_copies * self.kv_size, self.kv_size, self.shard.size // self.kv_copies * self.kv_size)
        return {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv, "self_attn.o_proj": out}

    def sites(self, hidden_size: int) -> tuple[AdapterSite, ...]:
        """In the order of the block's linears."""
        qkv = AdapterSite(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), hidden_size, (self.q_size, self.kv_size, self.kv_size))
        return qkv, AdapterSite(("self_attn.o_proj",), self.q_size, (hidden_size,))


@dataclass(frozen=True)
class MlpSpec:
    """A gated perceptron: down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer, 2020)."""

    intermediate_size: int
    bias: bool = False
    shard: Shard = WHOLE  # the intermediate size is this rank's

    def of_rank(self, shard: Shard) -> MlpSpec:
        """With the rank's part of the intermediate size.

        Raises:
            EngineError: it cannot be divided among so many ranks.
        """
        return replace(self, intermediate_size=shard.divide(self.intermediate_size, "intermediate_size"), shard=shard)

    def cuts(self) -> dict[str, Cut]:
        """The rank's part of each matrix, by the module's name within the layer."""
        rows, columns = (even_cut(self.shard, dim, self.intermediate_size) for dim in (OUT, IN))
        return {"mlp.gate_proj": rows, "mlp.up_proj": rows, "mlp.down_proj": columns}

    def sites(self, hidden_size: int) -> tuple[AdapterSite, ...]:
        """In the order of the block's linears."""
        gate_up = AdapterSite(("mlp.gate_proj", "mlp.up_proj"), hidden_size, (self.intermediate_size,) * 2)
        return gate_up, AdapterSite(("mlp.down_proj",), self.intermediate_size, (hidden_size,))


@dataclass(frozen=True)
class MoeNames:
    """Where a layer's experts lie in a checkpoint that stores them one by one; stored together they have the names that transformers 5 gives them."""

    root: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"
    correction: str = "gate.e_score_correction_bias"
    shared: str = "shared_expert"


@dataclass(frozen=True)
class MoeSpec:
    """A mixture of experts: each token goes through the few that a router chooses for it, and through the shared one if there is one."""

    num_experts: int
    intermediate_size: int  # of an expert
    routing: Routing
    gate: Gate = field(default_factory=Gate)
    bias: bool = False  # of the experts' products and the router
    correction: bool = False  # scores are corrected for the choice
    shared_size: int = 0  # of the expert that every token goes through; 0: there is none
    shared_gate: bool = False  # its answer is scaled by a sigmoid of the token
    names: MoeNames = field(default_factory=MoeNames)

    def of_rank(self, shard: Shard) -> MoeSpec:
        """
        Raises:
            EngineError: there is more than one rank.
        """
        if shard.size > 1:
            raise EngineError(f"tensor_parallel_size: {shard.size} is not supported for layers of experts; supported: 1")
        return self

    def cuts(self) -> dict[str, Cut]:
        """None: a rank has all experts."""
        return {}

    def sites(self, hidden_size: int) -> tuple[AdapterSite, ...]:
        """In the order of the block's linears: the shared expert's. The others have none."""
        if not self.shared_size:
            return ()
        root = f"{self.names.root}.{self.names.shared}"
        gate_up = AdapterSite((f"{root}.gate_proj", f"{root}.up_proj"), hidden_size, (self.shared_size,) * 2)
        return gate_up, AdapterSite((f"{root}.down_proj",), self.shared_size, (hidden_size,))


@dataclass(frozen=True)
class LayerSpec:
    """A layer adds attention's and then the perceptron's answer to the residual stream, each of its RMS norm of the stream."""

    attention: AttentionSpec
    mlp: MlpSpec | MoeSpec

    def of_rank(self, shard: Shard) -> LayerSpec:
        """
        Raises:
            EngineError: a block cannot be divided among so many ranks.
        """
        return LayerSpec(self.attention.of_rank(shard), self.mlp.of_rank(shard))

    def cuts(self) -> dict[str, Cut]:
        """The rank's part of each matrix, by the module's name within the layer; other tensors are whole on every rank."""
        return self.attention.cuts() | self.mlp.cuts()
