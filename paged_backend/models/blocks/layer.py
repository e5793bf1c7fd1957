"""A layer: attention and perceptron, one after the other or side by side."""

from __future__ import annotations

from torch import Tensor

from paged_backend.models.blocks.attention import Attention
from paged_backend.models.blocks.forward_pass import Allocate, ForwardPass
from paged_backend.models.blocks.mlp import Mlp
from paged_backend.models.blocks.moe import NOTHING, MoeMlp, Shapes
from paged_backend.models.layer_spec import LayerSpec, MlpSpec
from paged_backend.models.step import LayerPages
from paged_kernels.experts import ExpertLinear
from paged_kernels.linear import Linear


class Layer:
    """The blocks that a LayerSpec names. Parameters are uninitialised until `parameters` are filled."""

    def __init__(self, spec: LayerSpec, hidden_size: int, empty: Allocate) -> None:
        self._parallel = spec.parallel
        self.attention = Attention(spec, hidden_size, empty)
        self.mlp = (
            Mlp(spec, spec.mlp, hidden_size, empty)
            if isinstance(spec.mlp, MlpSpec)
            else MoeMlp(spec, spec.mlp, hidden_size, empty)
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order of AdapterLayout.sites."""
        return *self.attention.linears, *self.mlp.linears

    @property
    def packed_experts(self) -> tuple[ExpertLinear, ...]:
        """The experts' matrices, if they are stored in few bits: those are no parameters, but filled by modules."""
        return self.mlp.packed if isinstance(self.mlp, MoeMlp) else ()

    def parameters(self, stored: Shapes = NOTHING) -> dict[str, Tensor]:
        """Name in the checkpoint, within the layer -> the tensor, or the part of a packed one, that it fills. stored:
        shapes that the checkpoint has, by the names within the layer.
        """
        mlp = self.mlp.parameters(stored) if isinstance(self.mlp, MoeMlp) else self.mlp.parameters()
        return self.attention.parameters() | mlp

    def forward(self, x: Tensor, pages: LayerPages, at: ForwardPass) -> Tensor:
        """[T, hidden] -> [T, hidden], the residual stream before and after; x may be written over. pages: where its K
        and V are.
        """
        if not self._parallel:
            return self.mlp.forward(self.attention.forward(x, pages, at), at)
        norm = self.attention.residual.before
        assert norm is not None and isinstance(self.mlp, Mlp), "blocks side by side read the stream through one norm"
        normed = at.ops.norm(x, norm)
        return self.mlp.forward(self.attention.forward(x, pages, at, normed), at, normed)
