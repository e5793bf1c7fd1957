"""What a forward pass is given: the shape of a step, and its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerPages:
    """Where a layer keeps K and V."""

    # [num_pages, 2, num_kv_heads, page_size, head_dim], or of latents [num_pages, page_size, rank + rotary_dim]; layers
    # of other KV groups may have other pages of it
    tensor: Tensor
    group: int = 0  # which of the KV groups has the layer (kv_groups.py)


@dataclass(frozen=True)
class GroupTensors:
    """Where a step's K and V lie in one KV group."""

    slot_mapping: Tensor  # int64 [T] page_id * page_size + offset; -1 for padding
    page_table: Tensor  # int32 [S, pages of the longest sequence]


@dataclass(frozen=True)
class StepTensors:
    """One step for the decoder, laid out by step_plan.py: D decodes, then prefills, S sequences in all; T tokens, M of
    them with logits.
    """

    shape: StepShape
    plan: Mapping[str, Tensor]  # int32, the arrays of a plan (runner/step_plan.py)
    input_ids: Tensor  # int32 [T]
    positions: Tensor  # int64 [T]
    groups: tuple[GroupTensors, ...]  # of each KV group
    seq_lens: Tensor  # int32 [S] after this step; 0 for padding
    max_decode_len: int  # no decode is longer, after this step
    max_query_len: int  # no prefill computes more tokens
    prefill_lens: tuple[tuple[int, int], ...]  # (query_len, seq_len) of each prefill, where the host knows them

    @property
    def query_starts(self) -> Tensor:
        """int32 [S + 1]: first token of each sequence, and T."""
        return self.plan["query_starts"]

    @property
    def logit_indices(self) -> Tensor | None:
        """int32 [M]: tokens whose successors may be sampled; None: all."""
        return self.plan["logit_indices"] if self.shape.num_prefills else None


@dataclass(frozen=True)
class StepShape:
    """Room for a step: decodes with a token each, and prefills with so many tokens in all."""

    num_decodes: int
    num_prefills: int = 0
    num_prefill_tokens: int = 0
    adapted: bool = False  # for sequences with adapters, and others beside them
    drafts: bool = False  # some decodes are drafts, right behind their rows' newest tokens

    @property
    def num_outputs(self) -> int:
        """Sequences that may be sampled."""
        return self.num_decodes + self.num_prefills

    @property
    def num_sequences(self) -> int:
        """Those, and the one that takes the tokens that are left."""
        return self.num_outputs + 1

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_prefill_tokens

    @property
    def is_lone(self) -> bool:
        """Whether there is room for one decode and nothing else."""
        return self.num_decodes == self.num_tokens == 1 and not self.drafts
