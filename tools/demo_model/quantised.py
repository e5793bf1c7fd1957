"""A model with quantised products, as the engine computes them on a CPU: what a format costs in answers is measured on
it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paged_backend.models.quantization.online import read_online
from paged_kernels.codes import dequantise, quantise, rounded


@torch.no_grad()
def quantise_model(model: PreTrainedModel, name: str) -> None:
    """Rounds the weights of its layers as the tunable quantization=NAME does, and from now on the activations before
    them. name: none, fp8 or int4.
    """
    if name == "none":
        return
    quantization = read_online("fp8" if name == "fp8" else "int4")
    for path, module in model.named_modules():
        scheme = quantization.scheme_of(path) if isinstance(module, torch.nn.Linear) else None
        if scheme is None:
            continue
        linear = quantise(module.weight, scheme.format(module.in_features))
        module.weight.copy_(dequantise(linear))

        def round_input(_: Any, inputs: tuple[Tensor, ...], linear: Any = linear) -> Tensor:
            return rounded(inputs[0].flatten(0, -2), linear).view_as(inputs[0])

        if linear.format.rounding is not None:
            module.register_forward_pre_hook(round_input)
