"""Muon for the matrices, AdamW for the rest.

Muon (Keller Jordan, 2024: https://kellerjordan.github.io/posts/muon/) makes every update of a matrix orthogonal:
momentum, then five Newton-Schulz steps. The matrices of all layers are one tensor here, so a step is a few batched
products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, from the reference
_NUM_STEPS = 5


@dataclass(frozen=True)
class Rates:
    """Peak learning rates and what goes with them."""

    matrix_rate: float = 0.02
    matrix_momentum: float = 0.95
    matrix_decay: float = 0.05
    other_rate: float = 3e-3
    max_gradient_norm: float = 1.0


def orthogonal(update: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, rows, columns]: matrices with the singular vectors of `update` and singular values near 1."""
    tall = update.shape[1] > update.shape[2]
    x = update.to(dtype)
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_NUM_STEPS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if tall else x).to(update.dtype)


class HasMatrices(Protocol):
    """An nn.Module, some of whose parameters are stacked matrices."""

    @property
    def matrices(self) -> list[nn.Parameter]:
        """[n, out, in] each."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class Optimizer:
    """Steps all parameters of a model. `state` and `load` carry it over to the next command."""

    def __init__(self, model: HasMatrices, rates: Rates, dtype: torch.dtype) -> None:
        """dtype: in which updates are made orthogonal."""
        self._rates = rates
        self._matrices = model.matrices
        self._momenta = [torch.zeros_like(matrix) for matrix in self._matrices]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = [names[id(matrix)] for matrix in self._matrices]
        owned = {id(matrix) for matrix in self._matrices}
        self._others = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in owned}
        on_cuda = self._matrices[0].is_cuda
        self._adam = torch.optim.AdamW(
            self._others.values(), lr=rates.other_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=on_cuda
        )
        self._dtype = dtype

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One step at this share of the peak rates, from the parameters' gradients, which are dropped."""
        rates = self._rates
        nn.utils.clip_grad_norm_(list(self._others.values()), rates.max_gradient_norm)
        for group in self._adam.param_groups:
            group["lr"] = rates.other_rate * share
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        for matrix, momentum in zip(self._matrices, self._momenta, strict=True):
            assert matrix.grad is not None
            momentum.lerp_(matrix.grad, 1 - rates.matrix_momentum)
            update = orthogonal(matrix.grad.lerp(momentum, rates.matrix_momentum), self._dtype)
            scale = max(1.0, matrix.shape[1] / matrix.shape[2]) ** 0.5
            matrix.mul_(1 - rates.matrix_rate * share * rates.matrix_decay).add_(
                update, alpha=-rates.matrix_rate * share * scale
            )
            matrix.grad = None

    def state(self) -> dict[str, Tensor]:
        """Moments by name, in bfloat16: half the bytes, and the next steps forget the rounding."""
        found = {f"momentum.{name}": momentum for name, momentum in zip(self._names, self._momenta, strict=True)}
        for name, parameter in self._others.items():
            moments = self._adam.state[parameter]
            found |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        return {name: moment.to("cpu", torch.bfloat16) for name, moment in found.items()}

    def load(self, state: dict[str, Tensor], num_steps: int) -> None:
        for name, momentum in zip(self._names, self._momenta, strict=True):
            momentum.copy_(state[f"momentum.{name}"])
        for name, parameter in self._others.items():
            self._adam.state[parameter] = {
                "step": torch.tensor(float(num_steps), device=parameter.device if parameter.is_cuda else "cpu"),
                "exp_avg": state[f"exp_avg.{name}"].to(parameter),
                "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(parameter),
            }
