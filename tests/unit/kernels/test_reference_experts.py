"""Routing and experts in plain torch, against the sums written out for each token in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paged_kernels.experts import Experts, Gate, Routing
from paged_kernels.norm_value import Norm
from paged_kernels.reference import reference
from tests.expert_cases import expert_layer, gated, routing_cases, written_out

HIDDEN, SIZE, EXPERTS = 16, 12, 8
GATES = {
    "swiglu": Gate(),
    "clamped": Gate(limit=0.5, alpha=1.702, interleaved=True),
    "geglu": Gate(activation="gelu"),
    "geglu with tanh": Gate(activation="gelu_tanh"),
    "relu2": Gate(activation="relu2"),
    "relu2 without a gate": Gate(activation="relu2", gated=False),
}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("routing", routing_cases(EXPERTS).values(), ids=routing_cases(EXPERTS))
def test_the_layer_is_the_weighted_sum_over_each_tokens_experts(routing: Routing, gate: Gate, x: torch.Tensor) -> None:
    experts = expert_layer(EXPERTS, HIDDEN, SIZE, routing, gate, bias=True, correction=routing.scores == "sigmoid")
    norm = torch.rand(HIDDEN, generator=torch.Generator().manual_seed(2)) + 0.5
    found = reference.norm_add_experts(x.clone(), Norm(norm, 1e-5), experts)
    normed = reference.norm(x, Norm(norm, 1e-5))
    expected = x.double() + written_out(normed, *reference.route(normed, experts), experts)
    assert (found.double() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("routing", routing_cases(EXPERTS).values(), ids=routing_cases(EXPERTS))
def test_the_chosen_are_the_best_and_their_weights_what_the_scores_say(routing: Routing, x: torch.Tensor) -> None:
    experts = expert_layer(EXPERTS, HIDDEN, SIZE, routing, Gate(), bias=False, correction=routing.scores == "sigmoid")
    expert_ids, weights = reference.route(x, experts)
    assert expert_ids.dtype == torch.int32 and weights.dtype == torch.float32
    logits = x.double() @ experts.router.weight.double().T
    for token in range(len(x)):
        scores = logits[token].sigmoid() if routing.scores == "sigmoid" else logits[token].softmax(-1)
        ranked = scores + (0 if experts.correction is None else experts.correction.double())
        groups = ranked.view(routing.num_groups, -1)
        best = groups.topk(routing.group_best).values.sum(-1).topk(routing.top_groups).indices.tolist()
        allowed = [expert for expert in range(EXPERTS) if expert // groups.shape[1] in best]
        expected = sorted(allowed, key=lambda expert: -float(ranked[expert]))[: routing.top_k]
        assert expert_ids[token].tolist() == expected
        chosen = scores[expected]
        if routing.renormalised or routing.scores == "softmax_of_chosen":
            chosen = chosen / chosen.sum()
        torch.testing.assert_close(weights[token].double(), chosen * routing.scale, rtol=1e-5, atol=1e-7)


def test_one_expert_may_get_all_tokens_and_the_others_none(x: torch.Tensor) -> None:
    experts = expert_layer(EXPERTS, HIDDEN, SIZE, Routing(1, "softmax"), Gate(), bias=False)
    expert_ids, weights = torch.full((len(x), 1), 5, dtype=torch.int32), torch.full((len(x), 1), 0.5)
    untouched = torch.full_like(experts.down.weight, torch.nan)
    untouched[5] = experts.down.weight[5]
    experts = replace(experts, down=replace(experts.down, weight=untouched))
    found = reference.add_experts(x, expert_ids, weights, experts, torch.zeros_like(x))
    expected = 0.5 * gated(experts, 5, x.double()) @ experts.down.weight[5].double().T
    assert (found.double() - expected).norm() <= 1e-6 * expected.norm()


def test_no_token_makes_no_answer() -> None:
    experts: Experts = expert_layer(EXPERTS, HIDDEN, SIZE, Routing(2, "softmax"), Gate(), bias=False)
    assert reference.norm_add_experts(torch.empty(0, HIDDEN), Norm(torch.ones(HIDDEN), 1e-5), experts).shape == (
        0,
        HIDDEN,
    )
