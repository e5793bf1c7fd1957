"""A layer of experts in plain torch: routing, and the products of each expert with the tokens that chose it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from paged_kernels.codes import dequantise
from paged_kernels.experts import ExpertLinear, Experts, Gate, Routing
from paged_kernels.norm_value import Norm
from paged_kernels.reference_layers import ACTIVATIONS, LayerOps


class ExpertOps(LayerOps):
    """What a mixture of experts computes. k: experts of a token; E: experts of the layer."""

    def route(self, x: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
        """The experts of each token, [T, hidden] -> int32 [T, k], the best first, and their weights, float32 [T, k].

        Logits and scores are float32 whatever the type of x: near a tie the choice hangs on the last bits.
        """
        bias = experts.router.bias
        logits = functional.linear(x.float(), experts.router.weight.float(), None if bias is None else bias.float())
        return choose_experts(logits, experts.correction, experts.routing)

    def add_experts(self, x: Tensor, expert_ids: Tensor, weights: Tensor, experts: Experts, residual: Tensor) -> Tensor:
        """residual + the weighted sum of what a token's experts make of it: [T, hidden], [T, k], [T, k], [T, hidden] ->
        [T, hidden].

        Tokens are grouped by expert, so that each chosen expert multiplies once. A kernel may write over residual. Asks
        the device how many chose whom.
        """
        num_tokens, top_k = expert_ids.shape
        order = expert_ids.flatten().argsort(stable=True)
        counts = torch.bincount(expert_ids.flatten(), minlength=experts.num_experts).tolist()
        found = torch.empty(num_tokens * top_k, x.shape[1], dtype=torch.float32, device=x.device)
        for expert, places in enumerate(order.split(counts)):
            if len(places):
                gated = apply_gate(_multiply(x[places // top_k], experts.gate_up, expert), experts.gate)
                found[places] = _multiply(gated, experts.down, expert).float()
        total = (found.view(num_tokens, top_k, x.shape[1]) * weights[..., None]).sum(1)
        return residual + total.to(residual.dtype)

    def norm_add_experts(self, x: Tensor, norm: Norm | None, experts: Experts) -> Tensor:
        """x + the experts' answer to norm(x): [T, hidden] -> [T, hidden]; None: no norm. A kernel may write over x."""
        normed = x if norm is None else self.norm(x, norm)
        return self.add_experts(normed, *self.route(normed, experts), experts, x)


def choose_experts(logits: Tensor, correction: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """float32 [T, E], [E] -> int32 [T, k] and float32 [T, k]."""
    if routing.scores == "softmax_of_chosen":
        chosen, expert_ids = logits.topk(routing.top_k, dim=-1)
        return expert_ids.int(), chosen.softmax(-1) * routing.scale
    scores = logits.softmax(-1) if routing.scores == "softmax" else logits.sigmoid()
    ranked = scores if correction is None else scores + correction
    if routing.num_groups > 1:
        ranked = _within_best_groups(ranked, routing)
    expert_ids = ranked.topk(routing.top_k, dim=-1).indices
    weights = scores.gather(-1, expert_ids)
    if routing.renormalised:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
    return expert_ids.int(), weights * routing.scale


def apply_gate(gate_up: Tensor, gate: Gate) -> Tensor:
    """[T, 2 n] -> [T, n], or [T, n] -> [T, n] if it is not gated."""
    activation = ACTIVATIONS[gate.activation]
    if not gate.gated:
        return activation(gate_up)
    first, up = (gate_up[:, ::2], gate_up[:, 1::2]) if gate.interleaved else gate_up.chunk(2, dim=-1)
    if gate.limit is None:
        return activation(first) * up
    first, up = first.clamp(max=gate.limit), up.clamp(-gate.limit, gate.limit)
    return first * torch.sigmoid(gate.alpha * first) * (up + 1)


def _multiply(x: Tensor, linear: ExpertLinear, expert: int) -> Tensor:
    """[n, in] -> [n, out]. Of a packed weight only this expert's is unpacked."""
    of_expert = linear.of(expert)
    weight = of_expert.weight if linear.format.codes == "plain" else dequantise(of_expert).to(x.dtype)
    return functional.linear(x, weight, of_expert.bias)


def _within_best_groups(ranked: Tensor, routing: Routing) -> Tensor:
    """-inf for experts outside the best groups; a group counts as much as its best experts together."""
    groups = ranked.view(len(ranked), routing.num_groups, -1)
    best = (
        groups.topk(min(routing.group_best, groups.shape[2]), dim=-1)
        .values.sum(-1)
        .topk(routing.top_groups, dim=-1)
        .indices
    )
    outside = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, False)
    return groups.masked_fill(outside[..., None], -torch.inf).view_as(ranked)
