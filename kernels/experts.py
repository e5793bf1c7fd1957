"""A layer's experts as values that ops take whole: how tokens choose among them, how they are stored, and the gate
between their two products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from paged_kernels.e2m1 import MXFP4_GROUP
from paged_kernels.linear import PLAIN, Format, Linear, empty_linear

Scores = Literal["softmax", "softmax_of_chosen", "sigmoid"]

# gpt-oss's experts: numbers of 4 bits, of which 32 share a power of two that is stored in two parts (words.py)
MXFP4 = Format("fp4", (1, MXFP4_GROUP), row_scales=True, scale_dtype=torch.uint8, order="words")


@dataclass(frozen=True)
class Routing:
    """How the router's logits become a token's experts and their weights (Shazeer et al., 2017; groups and correction:
    DeepSeek-V3, 2024).
    """

    top_k: int
    scores: Scores  # over all experts before the choice, over the chosen ones after it, or each expert's own
    renormalised: bool = False  # the chosen scores are divided by their sum
    num_groups: int = 1  # experts lie in groups of equal size, one after another
    top_groups: int = 1  # only the groups whose best experts score highest together are chosen from
    group_best: Literal[1, 2] = 2  # so many of a group's best experts count
    scale: float = 1.0  # of the weights, in the end


@dataclass(frozen=True)
class Gate:
    """What an expert makes of its gate and up products: activation(gate) * up, or gpt-oss's clamped form, which has a
    limit; or activation(up) of its one product, if it is not gated.

    With a limit: gate is at most `limit`, up between -limit and limit, and the result is gate * sigmoid(alpha * gate) *
        (up + 1).
    """

    limit: float | None = None
    alpha: float = 1.0
    interleaved: bool = False  # rows of gate and up alternate; otherwise all of gate's come first
    activation: str = "silu"  # one of reference_layers.py's ACTIVATIONS; with a limit silu alone
    gated: bool = True

    @property
    def num_products(self) -> int:
        """Rows of the first matrix, for each number that comes out."""
        return 2 if self.gated else 1


@dataclass(frozen=True, eq=False)
class ExpertLinear:
    """One matrix of each expert: x -> x @ W[e].T + bias[e], W[e] as `Linear` has it. Activations are never rounded.

    Everything is contiguous, and an expert's part is what the `Linear` of that expert has.
    """

    weight: Tensor  # [E, out, in], of the activations' type; or as `Linear` has it in its format
    bias: Tensor | None = None  # [E, out], of the activations' type
    format: Format = PLAIN
    scale: Tensor | None = None  # [E, *format.scale_shape], format.scale_dtype
    zero: Tensor | None = None  # uint8, as scale
    row_scale: Tensor | None = None  # float32 [E, out]
    num_padded: int = 0  # as of `Linear`

    @property
    def num_rows(self) -> int:
        return self.weight.shape[1]

    @property
    def num_columns(self) -> int:
        return self.weight.shape[2] * (2 if self.format.nibbles else 1) - self.num_padded

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it consists of."""
        found = (self.weight, self.bias, self.scale, self.zero, self.row_scale)
        return tuple(tensor for tensor in found if tensor is not None)

    def of(self, expert: int) -> Linear:
        """The matrix of one expert, the same memory."""

        def own(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[expert]

        return Linear(
            self.weight[expert],
            own(self.bias),
            self.format,
            own(self.scale),
            own(self.zero),
            own(self.row_scale),
            num_padded=self.num_padded,
        )


def reaches_experts(format: Format) -> bool:
    """Whether kernels read experts of that format (expert_codes.py): groups of a power of two of columns, at least 16,
    or whole rows.
    """
    group = format.block[1]
    if format.order == "words":
        return format == MXFP4
    return group == 0 or (group >= 16 and group & (group - 1) == 0)


def empty_experts(
    num_experts: int,
    num_rows: int,
    num_columns: int,
    format: Format,
    dtype: torch.dtype,
    device: torch.device,
    *,
    bias: bool = False,
) -> ExpertLinear:
    """Uninitialised matrices [num_rows, num_columns]. dtype: of activations.

    Raises ValueError as `empty_linear`.
    """
    one = empty_linear(num_rows, num_columns, format, dtype, torch.device("meta"), bias=bias)

    def empty(like: Tensor | None) -> Tensor | None:
        return None if like is None else torch.empty(num_experts, *like.shape, dtype=like.dtype, device=device)

    weight = torch.empty(num_experts, *one.weight.shape, dtype=one.weight.dtype, device=device)
    return ExpertLinear(
        weight, empty(one.bias), format, empty(one.scale), empty(one.zero), empty(one.row_scale), one.num_padded
    )


@dataclass(frozen=True, eq=False)
class Experts:
    """A router and its experts: y = sum over a token's experts e of weight_e * down_e(gate(gate_up_e(x)))."""

    router: Linear  # [E, hidden]
    correction: Tensor | None  # float32 [E], added to the scores for the choice alone
    routing: Routing
    gate_up: ExpertLinear  # [E, gate.num_products * intermediate, hidden]
    gate: Gate
    down: ExpertLinear  # [E, hidden, intermediate]
    partial: bool = False  # the answer is this rank's part of a sum over ranks (rank_ops.py)

    @property
    def num_experts(self) -> int:
        return len(self.router.weight)

    @property
    def has_words(self) -> bool:
        """Whether one of the matrices is in words."""
        return "words" in (self.gate_up.format.order, self.down.format.order)
