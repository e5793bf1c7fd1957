"""The perceptron of a layer: norm, packed gate and up, gate, down product."""

from __future__ import annotations

from torch import Tensor

from paged_backend.models.blocks.forward_pass import Allocate, ForwardPass
from paged_backend.models.blocks.residual import Residual
from paged_backend.models.layer_spec import LayerSpec, MlpSpec
from paged_kernels.linear import Linear


class Mlp:
    """The second block of a layer. Parameters are uninitialised until `parameters` are filled."""

    def __init__(self, layer: LayerSpec, spec: MlpSpec, hidden_size: int, empty: Allocate) -> None:
        self.spec = spec
        self.residual = Residual(layer.mlp_branch, layer.norm, hidden_size, empty)
        gate_up_site, down_site = spec.sites(hidden_size)
        self.gate_up = empty.linear(gate_up_site, spec.bias)
        self.down = empty.linear(down_site, spec.bias and spec.shard.first, partial=spec.shard.size > 1)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.gate_up, self.down

    def parameters(self) -> dict[str, Tensor]:
        """Name in the checkpoint, within the layer -> the tensor, or the rows of a packed one, that it fills."""
        spec = self.spec
        found: dict[str, Tensor | None] = {
            f"mlp.{spec.out_name}.weight": self.down.weight,
            f"mlp.{spec.out_name}.bias": self.down.bias,
        }
        for kind, packed in (("weight", self.gate_up.weight), ("bias", self.gate_up.bias)):
            if packed is not None:
                found |= {
                    f"mlp.{name}.{kind}": part
                    for name, part in zip(spec.in_names, packed.chunk(len(spec.in_names)), strict=True)
                }
        return self.residual.parameters() | {name: tensor for name, tensor in found.items() if tensor is not None}

    def forward(self, x: Tensor, at: ForwardPass, normed: Tensor | None = None) -> Tensor:
        """[T, hidden] -> [T, hidden], the residual stream before and after; x may be written over.
        normed: what the block reads, if that is not the stream after the norm before."""
        before = (x, self.residual.before) if normed is None else (normed, None)
        product = at.products.norm_gated_linear if self.spec.gated else at.products.norm_active_linear
        active = product(*before, self.gate_up, self.spec.activation)
        return self.residual.add_product(active, self.down, x, at)
