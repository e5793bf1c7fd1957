"""The gated perceptron of a layer: norm, packed gate and up, gate, down product."""

from __future__ import annotations

from torch import Tensor

from paged_backend.models.blocks.forward_pass import Allocate, ForwardPass
from paged_backend.models.layer_spec import MlpSpec
from paged_kernels.linear import Linear


class Mlp:
    """The second block of a layer. Parameters are uninitialised until `parameters` are filled."""

    def __init__(self, spec: MlpSpec, hidden_size: int, norm_eps: float, empty: Allocate) -> None:
        self._eps = norm_eps
        gate_up_site, down_site = spec.sites(hidden_size)
        self.norm = empty(hidden_size)
        self.gate_up = empty.linear(gate_up_site, spec.bias)
        self.down = empty.linear(down_site, spec.bias and spec.shard.first, partial=spec.shard.size > 1)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.gate_up, self.down

    def parameters(self) -> dict[str, Tensor]:
        """Name in the checkpoint, within the layer -> the tensor, or the rows of a packed one, that it fills."""
        found: dict[str, Tensor | None] = {
            "post_attention_layernorm.weight": self.norm,
            "mlp.down_proj.weight": self.down.weight,
            "mlp.down_proj.bias": self.down.bias,
        }
        for kind, packed in (("weight", self.gate_up.weight), ("bias", self.gate_up.bias)):
            if packed is not None:
                found |= {f"mlp.{side}_proj.{kind}": part for side, part in zip(("gate", "up"), packed.chunk(2), strict=True)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def forward(self, x: Tensor, at: ForwardPass) -> Tensor:
        """[T, hidden] -> [T, hidden], the residual stream before and after; x may be written over."""
        gated = at.products.norm_gated_linear(x, self.norm, self._eps, self.gate_up)
        return at.products.add_linear(gated, self.down, x)
