"""What a decoder's layers are made of, as plain data: a family (families/) reads it from a checkpoint's config, a block
(blocks/) allocates and computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from paged_backend.errors import EngineError
from paged_backend.models.shard import IN, OUT, Cut, Shard, cuts_of_tensors, even_cut, side_by_side
from paged_kernels.experts import Gate, Routing

WHOLE = Shard()
# a module's name within the layer -> so many of its rows, or columns, share scales and stay together on a rank
GroupOf = Callable[[str], int]
ALL_LAYERS = "all layers"  # the name of the rotary positions of a checkpoint that has only one kind of them


@dataclass(frozen=True)
class AdapterSite:
    """A packed product that adapters may change, and the modules of PEFT that it is made of."""

    modules: tuple[str, ...]  # within the layer, such as self_attn.q_proj
    in_size: int
    out_sizes: tuple[int, ...]  # rows of each module


@dataclass(frozen=True)
class NormSpec:
    """A norm: divided by the root mean square, times a weight (RMSNorm, Zhang and Sennrich, 2019), unless a field says
    otherwise.
    """

    eps: float = 1e-6
    centred: bool = False  # the mean is subtracted first: LayerNorm (Ba et al., 2016)
    bias: bool = False
    plus_one: bool = False  # times 1 + weight, as Gemma stores it


@dataclass(frozen=True)
class Branch:
    """How a block's answer joins the residual stream x: x + multiplier * after(block(before(x)))."""

    before: str | None  # a norm by its name in the checkpoint, within the layer; None: the block reads x itself
    after: str | None = None  # the same; None: the answer as it is
    multiplier: float = 1.0


@dataclass(frozen=True)
class AttentionSpec:
    """Attention over K and V in pages; query heads share KV heads (GQA, Ainslie et al., 2023)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None  # a norm of each query and key head, or of all heads together
    sliding_window: int | None = None  # tokens that a token attends to, itself included; None: all
    # which of Architecture.ropes; None: no positions at all (NoPE, Kazemnejad et al., 2023)
    rope: str | None = ALL_LAYERS
    interleaved: bool = False  # rotated pairs are (2 i, 2 i + 1) instead of (i, i + half)
    query_scale: float | None = None  # of the scores; None: head_dim ** -0.5
    soft_cap: float | None = None  # scores become cap * tanh(scores / cap) (Gemma 2)
    # a learned score for each head that takes its share of the softmax and gives no value (gpt-oss)
    sinks: bool = False
    qkv_names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # in the checkpoint: three, or one with the rows of all
    shard: Shard = WHOLE  # the heads are this rank's
    kv_copies: int = 1  # ranks that have the same KV heads

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def page_shape(self, page_size: int) -> tuple[int, ...]:
        """Of what a layer keeps of a page's tokens."""
        return 2, self.num_kv_heads, page_size, self.head_dim

    def of_rank(self, shard: Shard) -> AttentionSpec:
        """With the rank's query heads and the KV heads that those share. Where there are fewer KV heads than ranks,
        several ranks keep the same.

        Raises:
            EngineError: the heads cannot be divided among so many ranks.
        """
        num_heads = shard.divide(self.num_heads, "num_attention_heads")
        if shard.size <= self.num_kv_heads:
            return replace(
                self,
                num_heads=num_heads,
                num_kv_heads=shard.divide(self.num_kv_heads, "num_key_value_heads"),
                shard=shard,
            )
        if shard.size % self.num_kv_heads:
            raise EngineError(
                f"tensor_parallel_size: {shard.size} ranks cannot have equal parts of num_key_value_heads "
                f"({self.num_kv_heads})"
            )
        return replace(
            self, num_heads=num_heads, num_kv_heads=1, shard=shard, kv_copies=shard.size // self.num_kv_heads
        )

    def cuts(self) -> dict[str, Cut]:
        """The rank's part of each matrix, by the module's name within the layer."""
        q, out = even_cut(self.shard, OUT, self.q_size), even_cut(self.shard, IN, self.q_size)
        kv = Cut(
            OUT,
            self.shard.rank // self.kv_copies * self.kv_size,
            self.kv_size,
            self.shard.size // self.kv_copies * self.kv_size,
        )
        packed = (q, kv, kv) if len(self.qkv_names) > 1 else (side_by_side((q, kv, kv)),)
        found = dict(zip(_modules("self_attn", self.qkv_names), packed, strict=True)) | {"self_attn.o_proj": out}
        return found | {"self_attn.q_norm": q, "self_attn.k_norm": kv} if self.qk_norm == "projection" else found

    def tensor_cuts(self) -> dict[str, Cut]:
        """The rank's part of each tensor of the checkpoint, by its name within the layer."""
        found = cuts_of_tensors(self.cuts())
        return found | {"self_attn.sinks": even_cut(self.shard, OUT, self.num_heads)} if self.sinks else found

    def sites(self, hidden_size: int) -> tuple[AdapterSite, ...]:
        """In the order of the block's linears."""
        sizes = (self.q_size, self.kv_size, self.kv_size)
        qkv = AdapterSite(
            _modules("self_attn", self.qkv_names), hidden_size, sizes if len(self.qkv_names) > 1 else (sum(sizes),)
        )
        return qkv, AdapterSite(("self_attn.o_proj",), self.q_size, (hidden_size,))


@dataclass(frozen=True)
class LatentSpec:
    """Attention over latents (MLA; DeepSeek-V2, 2024, section 2.1): a token keeps `rank` numbers, of which every head
    would make a key of nope_dim numbers and a value, and a rotated key of rotary_dim that all heads share.
    """

    num_heads: int
    rank: int
    nope_dim: int  # of a query, those that meet the latent
    rotary_dim: int
    value_dim: int
    scale: float  # of the scores
    q_rank: int | None = None  # queries come from so many normed numbers; None: from the hidden state
    interleaved: bool = True  # rotated pairs are (2 i, 2 i + 1) instead of (i, i + half)
    rope: str = ALL_LAYERS
    num_kv_heads: int = 1  # as which absorbed queries see the latents
    sliding_window: None = None  # a token attends to all before it
    shard: Shard = WHOLE  # the heads are this rank's; latents are whole on every rank

    @property
    def head_dim(self) -> int:
        """Numbers that a token keeps."""
        return self.rank + self.rotary_dim

    @property
    def query_dim(self) -> int:
        return self.nope_dim + self.rotary_dim

    def page_shape(self, page_size: int) -> tuple[int, ...]:
        """Of what a layer keeps of a page's tokens."""
        return page_size, self.head_dim

    def of_rank(self, shard: Shard) -> LatentSpec:
        """With the rank's heads.

        Raises:
            EngineError: the heads cannot be divided among so many ranks.
        """
        return replace(self, num_heads=shard.divide(self.num_heads, "num_attention_heads"), shard=shard)

    def cuts(self) -> dict[str, Cut]:
        """The rank's part of each matrix, by the module's name within the layer."""
        queries = "q_proj" if self.q_rank is None else "q_b_proj"
        return {
            f"self_attn.{queries}": even_cut(self.shard, OUT, self.num_heads * self.query_dim),
            "self_attn.kv_b_proj": even_cut(self.shard, OUT, self.num_heads * (self.nope_dim + self.value_dim)),
            "self_attn.o_proj": even_cut(self.shard, IN, self.num_heads * self.value_dim),
        }

    def tensor_cuts(self) -> dict[str, Cut]:
        """The rank's part of each tensor of the checkpoint, by its name within the layer."""
        return cuts_of_tensors(self.cuts())

    def sites(self, hidden_size: int) -> tuple[AdapterSite, ...]:
        """In the order of the block's linears. No product makes keys and values, so that kv_b_proj is no site."""
        num_queries, out_size = self.num_heads * self.query_dim, self.num_heads * self.value_dim
        first = _modules("self_attn", ("q_proj" if self.q_rank is None else "q_a_proj", "kv_a_proj_with_mqa"))
        sites = [AdapterSite(first, hidden_size, (self.q_rank or num_queries, self.head_dim))]
        if self.q_rank is not None:
            sites.append(AdapterSite(("self_attn.q_b_proj",), self.q_rank, (num_queries,)))
        return *sites, AdapterSite(("self_attn.o_proj",), out_size, (hidden_size,))


@dataclass(frozen=True)
class MlpSpec:
    """A perceptron: down(activation(gate(x)) * up(x)) (GLU variants, Shazeer, 2020), or down(activation(in(x))) if it
    is not gated.
    """

    intermediate_size: int
    bias: bool = False
    activation: str = "silu"  # one of kernels/reference_layers.py's ACTIVATIONS
    gated: bool = True
    # in the checkpoint: two, or one with the rows of both; one if it is not gated
    in_names: tuple[str, ...] = ("gate_proj", "up_proj")
    out_name: str = "down_proj"
    shard: Shard = WHOLE
    cut: Cut | None = None  # the rows of gate and up that are this rank's; None: all

    @property
    def in_size(self) -> int:
        """Rows of the first product."""
        return (2 if self.gated else 1) * self.intermediate_size

    def of_rank(self, shard: Shard, group_of: GroupOf) -> MlpSpec:
        """With the rank's part of the intermediate size.

        Raises:
            EngineError: it cannot be divided among so many ranks.
        """
        names = (*self.in_names, self.out_name)
        cut = shard.share(self.intermediate_size, "intermediate_size", _common_group(group_of, _modules("mlp", names)))
        return replace(self, intermediate_size=cut.count, shard=shard, cut=cut)

    def cuts(self) -> dict[str, Cut]:
        """The rank's part of each matrix, by the module's name within the layer."""
        if self.cut is None:
            return {}
        packed = self.gated and len(self.in_names) == 1
        rows = side_by_side((self.cut, self.cut)) if packed else self.cut
        return dict.fromkeys(_modules("mlp", self.in_names), rows) | {f"mlp.{self.out_name}": replace(self.cut, dim=IN)}

    def sites(self, hidden_size: int) -> tuple[AdapterSite, ...]:
        """In the order of the block's linears."""
        parts = len(self.in_names)
        first = AdapterSite(_modules("mlp", self.in_names), hidden_size, (self.in_size // parts,) * parts)
        return first, AdapterSite(_modules("mlp", (self.out_name,)), self.intermediate_size, (hidden_size,))


@dataclass(frozen=True)
class MoeNames:
    """Where a layer's experts lie in a checkpoint that stores them one by one; stored together they have the names that
    transformers 5 gives them.
    """

    root: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"
    correction: str = "gate.e_score_correction_bias"
    shared: str = "shared_expert"


@dataclass(frozen=True)
class MoeSpec:
    """A mixture of experts: each token goes through the few that a router chooses for it, and through the shared one if
    there is one.
    """

    num_experts: int
    intermediate_size: int  # of an expert
    routing: Routing
    gate: Gate = field(default_factory=Gate)
    bias: bool = False  # of the experts' products and the router
    correction: bool = False  # scores are corrected for the choice
    shared_size: int = 0  # of the expert that every token goes through; 0: there is none
    shared_gate: bool = False  # its answer is scaled by a sigmoid of the token
    together: bool = False  # the checkpoint always has the experts together, as [E, in, out], or in mxfp4 (gpt-oss)
    either_way: bool = False  # experts that a checkpoint has together may lie as [E, in, out], too: their shape says it
    names: MoeNames = field(default_factory=MoeNames)
    shard: Shard = WHOLE
    cut: Cut | None = None  # the rows of an expert's gate and up that are this rank's; None: all
    shared_cut: Cut | None = None  # the same of the expert that every token goes through

    def of_rank(self, shard: Shard, group_of: GroupOf) -> MoeSpec:
        """With the router, and the rank's part of every expert: all ranks have as much to do, whichever experts are
        chosen.

        Raises:
            EngineError: the experts cannot be divided among so many ranks.
        """
        names = self.names
        of_first = (f"{names.root}.experts.0.{name}" for name in (names.gate, names.up, names.down))
        cut = shard.share(self.intermediate_size, "moe_intermediate_size", _common_group(group_of, of_first))
        of_shared = (f"{names.root}.{names.shared}.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
        shared_cut = shard.share(
            self.shared_size, "shared_expert_intermediate_size", _common_group(group_of, of_shared)
        )
        return replace(
            self,
            intermediate_size=cut.count,
            shared_size=shared_cut.count,
            shard=shard,
            cut=cut,
            shared_cut=shared_cut,
        )

    def cuts(self) -> dict[str, Cut]:
        """The rank's part of each matrix, by the module's name within the layer, where the checkpoint has experts one
        by one.
        """
        if self.cut is None or self.shared_cut is None:
            return {}
        names = self.names
        found: dict[str, Cut] = {}
        rows, columns = self.cut, replace(self.cut, dim=IN)
        for expert in range(self.num_experts):
            root = f"{names.root}.experts.{expert}"
            found |= {f"{root}.{names.gate}": rows, f"{root}.{names.up}": rows, f"{root}.{names.down}": columns}
        if self.shared_size:
            rows, columns = self.shared_cut, replace(self.shared_cut, dim=IN)
            root = f"{names.root}.{names.shared}"
            found |= {f"{root}.gate_proj": rows, f"{root}.up_proj": rows, f"{root}.down_proj": columns}
        return found

    def sites(self, hidden_size: int) -> tuple[AdapterSite, ...]:
        """In the order of the block's linears: the shared expert's. The others have none."""
        if not self.shared_size:
            return ()
        root = f"{self.names.root}.{self.names.shared}"
        gate_up = AdapterSite((f"{root}.gate_proj", f"{root}.up_proj"), hidden_size, (self.shared_size,) * 2)
        return gate_up, AdapterSite((f"{root}.down_proj",), self.shared_size, (hidden_size,))


@dataclass(frozen=True)
class LayerSpec:
    """A layer adds attention's answer to the residual stream and then the perceptron's."""

    attention: AttentionSpec | LatentSpec
    mlp: MlpSpec | MoeSpec
    norm: NormSpec = NormSpec()  # of every norm of the layer
    attention_branch: Branch = Branch("input_layernorm")
    mlp_branch: Branch = Branch("post_attention_layernorm")
    # the perceptron reads what attention read, instead of what it made of the stream; mlp_branch has no norm before
    parallel: bool = False

    def of_rank(self, shard: Shard, group_of: GroupOf) -> LayerSpec:
        """
        Raises:
            EngineError: a block cannot be divided among so many ranks.
        """
        return replace(self, attention=self.attention.of_rank(shard), mlp=self.mlp.of_rank(shard, group_of))

    def cuts(self) -> dict[str, Cut]:
        """The rank's part of each matrix, by the module's name within the layer; other tensors are whole on every
        rank.
        """
        return self.attention.cuts() | self.mlp.cuts()

    def tensor_cuts(self) -> dict[str, Cut]:
        """The same of each tensor of the checkpoint, by its name within the layer; but for experts that are stored
        together (blocks/moe.py).
        """
        return self.attention.tensor_cuts() | cuts_of_tensors(self.mlp.cuts())


@dataclass(frozen=True)
class MtpForm:
    """Where a family's checkpoints have their layer of multi-token prediction, and how it joins what it reads (mtp.py).
    The defaults are DeepSeek-V3's.
    """

    place: str = "model.layers.{num_layers}."  # of its modules, behind the decoder's layers
    token_norm: str = "enorm"
    state_norm: str = "hnorm"
    join: str = "eh_proj"
    final_norm: str = "shared_head.norm"
    state_first: bool = False  # of the two that are joined
    reads_normed: bool = True  # the model's state after the final norm, and for further guesses its own after its norm


@dataclass(frozen=True)
class EndsSpec:
    """What stands before the first layer and behind the last."""

    norm: NormSpec = NormSpec()  # after the last layer
    embedding_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_soft_cap: float | None = None  # logits become cap * tanh(logits / cap), after the multiplier


def _modules(block: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{block}.{name}" for name in names)


def _common_group(group_of: GroupOf, modules: Iterable[str]) -> int:
    """Rows of the first matrices and columns of the last one, so many of which stay together in all of them."""
    return math.lcm(*map(group_of, modules))
