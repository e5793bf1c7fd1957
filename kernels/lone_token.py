"""What attention of a step with one decoding token is told, as values that ops take whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from paged_kernels.norm_value import Norm


@dataclass(frozen=True, eq=False)
class HeadRules:
    """What becomes of the heads of a QKV product before attention: `Ops.rope_write_kv` has each in words."""

    num_heads: int  # of queries
    qk_norm: tuple[Norm, Norm] | None = None
    rope_table: Tensor | None = None  # float32 [max_len, R]
    interleaved: bool = False
    query_factors: Tensor | None = None  # float32 [max_len]


@dataclass(frozen=True, eq=False)
class LoneToken:
    """The only token of a step: its position, where its K and V go, and its sequence, which ends with it."""

    position: Tensor  # integer [1]
    slot: Tensor  # integer [1]: page_id * page_size + offset; -1 for padding
    page_table: Tensor  # int32 [1, P]
    seq_len: Tensor  # int32 [1], this token included; 0 for padding
    max_seq_len: int  # seq_len is not greater
