"""A layer's experts as values that ops take whole: how tokens choose among them, how they are stored, and the gate
between their two products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from paged_kernels.linear import Linear

Scores = Literal["softmax", "softmax_of_chosen", "sigmoid"]


@dataclass(frozen=True)
class Routing:
    """How the router's logits become a token's experts and their weights (Shazeer et al., 2017; groups and correction:
    DeepSeek-V3, 2024).
    """

    top_k: int
    scores: Scores  # over all experts before the choice, over the chosen ones after it, or each expert's own
    renormalised: bool = False  # the chosen scores are divided by their sum
    num_groups: int = 1  # experts lie in groups of equal size, one after another
    top_groups: int = 1  # only the groups whose two best experts score highest are chosen from
    scale: float = 1.0  # of the weights, in the end


@dataclass(frozen=True)
class Gate:
    """What an expert makes of its gate and up products: silu(gate) * up, or gpt-oss's clamped form, which has a limit.

    With a limit: gate is at most `limit`, up between -limit and limit, and the result is gate * sigmoid(alpha * gate) *
        (up + 1).
    """

    limit: float | None = None
    alpha: float = 1.0
    interleaved: bool = False  # rows of gate and up alternate; otherwise all of gate's come first


@dataclass(frozen=True, eq=False)
class ExpertLinear:
    """One matrix of each expert: x -> x @ weight[e].T + bias[e]. With scales the weight is in mxfp4
    (kernels/mxfp4.py).
    """

    weight: Tensor  # [E, out, in], of the activations' type; or uint8 [E, out, in / 2]; contiguous
    bias: Tensor | None = None  # [E, out], of the activations' type
    # uint8 [E, out, at least in / 32], contiguous; what is beyond is not read as a scale of anything
    scales: Tensor | None = None

    @property
    def num_columns(self) -> int:
        return self.weight.shape[2] * (1 if self.scales is None else 2)


@dataclass(frozen=True, eq=False)
class Experts:
    """A router and its experts: y = sum over a token's experts e of weight_e * down_e(gate(gate_up_e(x)))."""

    router: Linear  # [E, hidden]
    correction: Tensor | None  # float32 [E], added to the scores for the choice alone
    routing: Routing
    gate_up: ExpertLinear  # [E, 2 intermediate, hidden]
    gate: Gate
    down: ExpertLinear  # [E, hidden, intermediate]
    partial: bool = False  # the answer is this rank's part of a sum over ranks (rank_ops.py)

    @property
    def num_experts(self) -> int:
        return len(self.router.weight)
