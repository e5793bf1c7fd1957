"""Random layers of experts, and what they compute, written out for each token in float64."""

from __future__ import annotations

from dataclasses import replace

import torch

from paged_kernels.codes import dequantise, quantise
from paged_kernels.experts import MXFP4, ExpertLinear, Experts, Gate, Routing
from paged_kernels.linear import Format, Linear

ACTIVATIONS = {  # of float64 numbers, written out
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "relu2": lambda x: x.clamp(min=0) ** 2,
}
# as experts are published, and as they are rounded while they are loaded; groups are smaller, as the layers are
SMALL_FORMATS = {
    "mxfp4": MXFP4,
    "nvfp4": Format("fp4", (1, 16), row_scales=True, scale_dtype=torch.float8_e4m3fn),
    "fp8 block": Format("fp8", (16, 32)),
    "fp8 channel": Format("fp8", (1, 0)),
    "int4 group 64": Format("int4", (1, 64), scale_dtype=torch.float16),
    "int4 group 16": Format("int4", (1, 16)),
    "int4 group 32, zeros": Format("int4", (1, 32), zeros=True, scale_dtype=torch.float16),
    "int4 channel, zeros": Format("int4", (1, 0), zeros=True),
    "int8 channel": Format("int8", (1, 0)),
    "int8 group 32, zeros": Format("int8", (1, 32), zeros=True),
}


def routing_cases(num_experts: int) -> dict[str, Routing]:
    """The published families' ways of choosing: Qwen2-MoE, Qwen3-MoE and Mixtral, gpt-oss, MiniMax-M2, GLM-4.5 (with
    groups, as DeepSeek-V3 has them).
    """
    return {
        "softmax": Routing(3, "softmax"),
        "softmax renormalised": Routing(2, "softmax", renormalised=True),
        "softmax of chosen": Routing(4, "softmax_of_chosen"),
        "sigmoid": Routing(3, "sigmoid", renormalised=True),
        "softmax in groups by their best": Routing(
            3, "softmax", num_groups=num_experts // 4, top_groups=max(num_experts // 8, 1), scale=16.0, group_best=1
        ),
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
            randn(num_experts, gate.num_products * size, hidden, scale=hidden**-0.5),
            randn(num_experts, gate.num_products * size, scale=0.5) if bias else None,
        ),
        gate=gate,
        down=ExpertLinear(
            randn(num_experts, hidden, size, scale=size**-0.5), randn(num_experts, hidden, scale=0.5) if bias else None
        ),
    )


def on(experts: Experts, device: torch.device, dtype: torch.dtype | None = None) -> Experts:
    """On a device, and of a type."""

    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor if tensor is None else tensor.to(device, dtype)

    def linear(given: ExpertLinear) -> ExpertLinear:
        scales = (given.scale, given.zero, given.row_scale)
        scale, zero, row_scale = (None if tensor is None else tensor.to(device) for tensor in scales)
        weight = given.weight.to(device, dtype if given.format.codes == "plain" else None)
        return ExpertLinear(weight, moved(given.bias), given.format, scale, zero, row_scale, given.num_padded)

    router = Linear(experts.router.weight.to(device, dtype), moved(experts.router.bias))
    correction = None if experts.correction is None else experts.correction.to(device)
    return replace(
        experts, router=router, correction=correction, gate_up=linear(experts.gate_up), down=linear(experts.down)
    )


def stack_linears(linears: list[Linear]) -> ExpertLinear:
    """Those of expert 0, 1, …, of one shape and one format, in new memory."""

    def stacked(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        found = [tensor for tensor in tensors if tensor is not None]
        return torch.stack(found) if found else None

    return ExpertLinear(
        torch.stack([linear.weight for linear in linears]),
        stacked([linear.bias for linear in linears]),
        linears[0].format,
        stacked([linear.scale for linear in linears]),
        stacked([linear.zero for linear in linears]),
        stacked([linear.row_scale for linear in linears]),
        linears[0].num_padded,
    )


def quantised(experts: Experts, format: Format) -> Experts:
    """The same weights rounded to a format; zeros, if it has them, are other than the middle."""
    generator = torch.Generator().manual_seed(4)

    def linear(given: ExpertLinear) -> ExpertLinear:
        found = stack_linears([quantise(weight, format) for weight in given.weight])
        if found.zero is not None:
            shift = torch.randint(-2, 3, found.zero.shape, generator=generator)
            found.zero.copy_(found.zero.int() + shift.to(found.zero.device))
        return replace(found, bias=given.bias)

    return replace(experts, gate_up=linear(experts.gate_up), down=linear(experts.down))


def matrix(linear: ExpertLinear, expert: int) -> torch.Tensor:
    """float64 [out, in]."""
    if linear.format.codes == "plain":
        return linear.weight[expert].double()
    return dequantise(linear.of(expert)).double()


def gated(experts: Experts, expert: int, x: torch.Tensor) -> torch.Tensor:
    """float64 [T, hidden] -> [T, intermediate]."""
    product = x @ matrix(experts.gate_up, expert).T
    if experts.gate_up.bias is not None:
        product = product + experts.gate_up.bias[expert].double()
    activation = ACTIVATIONS[experts.gate.activation]
    if not experts.gate.gated:
        return activation(product)
    size = product.shape[1] // 2
    gate, up = (
        (product[:, ::2], product[:, 1::2]) if experts.gate.interleaved else (product[:, :size], product[:, size:])
    )
    if experts.gate.limit is None:
        return activation(gate) * up
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
