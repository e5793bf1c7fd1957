"""Random layers of experts, and what they compute, written out for each token in float64."""

from __future__ import annotations

from dataclasses import replace

import torch

from paged_kernels.experts import ExpertLinear, Experts, Gate, Routing
from paged_kernels.linear import Linear
from paged_kernels.mxfp4 import dequantise


def routing_cases(num_experts: int) -> dict[str, Routing]:
    """The published families' ways of choosing: Qwen2-MoE, Qwen3-MoE and Mixtral, gpt-oss, MiniMax-M2, GLM-4.5 (with
    groups, as DeepSeek-V3 has them).
    """
    return {
        "softmax": Routing(3, "softmax"),
        "softmax renormalised": Routing(2, "softmax", renormalised=True),
        "softmax of chosen": Routing(4, "softmax_of_chosen"),
        "sigmoid": Routing(3, "sigmoid", renormalised=True),
        "sigmoid in groups": Routing(
            3, "sigmoid", renormalised=True, num_groups=num_experts // 2, top_groups=num_experts // 4, scale=2.5
        ),
    }


def expert_layer(
    num_experts: int,
    hidden: int,
    size: int,
    routing: Routing,
    gate: Gate,
    *,
    bias: bool,
    correction: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Experts:
    """On the CPU; the same numbers for the same arguments."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    return Experts(
        router=Linear(randn(num_experts, hidden, scale=hidden**-0.5), randn(num_experts, scale=0.5) if bias else None),
        correction=randn(num_experts, scale=0.3).float() if correction else None,
        routing=routing,
        gate_up=ExpertLinear(
            randn(num_experts, 2 * size, hidden, scale=hidden**-0.5),
            randn(num_experts, 2 * size, scale=0.5) if bias else None,
        ),
        gate=gate,
        down=ExpertLinear(
            randn(num_experts, hidden, size, scale=size**-0.5), randn(num_experts, hidden, scale=0.5) if bias else None
        ),
    )


def on(experts: Experts, device: torch.device, dtype: torch.dtype | None = None) -> Experts:
    """On a device, and of a type."""

    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor if tensor is None else tensor.to(device, dtype if tensor.is_floating_point() else None)

    def linear(given: ExpertLinear) -> ExpertLinear:
        return ExpertLinear(
            given.weight.to(device, dtype if given.scales is None else None), moved(given.bias), moved(given.scales)
        )

    router = Linear(experts.router.weight.to(device, dtype), moved(experts.router.bias))
    correction = None if experts.correction is None else experts.correction.to(device)
    return replace(
        experts, router=router, correction=correction, gate_up=linear(experts.gate_up), down=linear(experts.down)
    )


def quantised(experts: Experts, seed: int = 4) -> Experts:
    """The same shapes in mxfp4, of random bytes; rows of scales are longer than they need to be."""
    generator = torch.Generator().manual_seed(seed)

    def linear(given: ExpertLinear) -> ExpertLinear:
        count, rows, columns = given.weight.shape
        packed = torch.randint(0, 256, (count, rows, columns // 2), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 124, (count, rows, -(-columns // 128) * 4), generator=generator, dtype=torch.uint8)
        scales[..., columns // 32 :] = 255
        return ExpertLinear(packed, given.bias, scales)

    return replace(experts, gate_up=linear(experts.gate_up), down=linear(experts.down))


def matrix(linear: ExpertLinear, expert: int) -> torch.Tensor:
    """float64 [out, in]."""
    if linear.scales is None:
        return linear.weight[expert].double()
    return dequantise(linear.weight[expert], linear.scales[expert], torch.float64)


def gated(experts: Experts, expert: int, x: torch.Tensor) -> torch.Tensor:
    """float64 [T, hidden] -> [T, intermediate]."""
    product = x @ matrix(experts.gate_up, expert).T
    if experts.gate_up.bias is not None:
        product = product + experts.gate_up.bias[expert].double()
    size = product.shape[1] // 2
    gate, up = (
        (product[:, ::2], product[:, 1::2]) if experts.gate.interleaved else (product[:, :size], product[:, size:])
    )
    if experts.gate.limit is None:
        return gate / (1 + torch.exp(-gate)) * up
    gate, up = gate.clamp(max=experts.gate.limit), up.clamp(min=-experts.gate.limit, max=experts.gate.limit)
    return gate / (1 + torch.exp(-experts.gate.alpha * gate)) * (up + 1)


def written_out(x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, experts: Experts) -> torch.Tensor:
    """float64 [T, hidden]: one token after another, one of its experts after another."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for expert, weight in zip(expert_ids[token].tolist(), weights[token].tolist(), strict=True):
            answer = gated(experts, expert, x[token : token + 1].double()) @ matrix(experts.down, expert).T
            if experts.down.bias is not None:
                answer = answer + experts.down.bias[expert].double()
            out[token] += weight * answer[0]
    return out
