"""The residual stream around a block: the norm that it reads the stream through, and how its answer joins the
stream.
"""

from __future__ import annotations

from torch import Tensor

from paged_backend.models.blocks.forward_pass import Allocate, ForwardPass
from paged_backend.models.layer_spec import Branch, NormSpec
from paged_kernels.linear import Linear
from paged_kernels.norm_value import Norm


class Residual:
    """x + multiplier * after(block(before(x))): owns both norms, where a branch has them."""

    def __init__(self, branch: Branch, norm: NormSpec, hidden_size: int, empty: Allocate) -> None:
        self._branch = branch
        self.before = None if branch.before is None else allocate_norm(norm, hidden_size, empty)
        self.after = None if branch.after is None else allocate_norm(norm, hidden_size, empty)
        self.is_plain = self.after is None and branch.multiplier == 1  # the answer is added as it is

    def parameters(self) -> dict[str, Tensor]:
        """Name in the checkpoint, within the layer -> the tensor that it fills."""
        found = ((self._branch.before, self.before), (self._branch.after, self.after))
        return {
            name: tensor
            for prefix, norm in found
            if prefix and norm
            for name, tensor in norm_parameters(prefix, norm).items()
        }

    def add_product(self, x: Tensor, linear: Linear, residual: Tensor, at: ForwardPass) -> Tensor:
        """The stream [T, hidden] after the block whose last product is linear(x), x [T, in]. residual, the stream
        before, may be written over.
        """
        if self.is_plain:
            return at.products.add_linear(x, linear, residual)
        return self.add(at.products.linear(x, linear), residual, at)

    def add(self, answer: Tensor, residual: Tensor, at: ForwardPass) -> Tensor:
        """The stream [T, hidden] after a block's answer. residual, the stream before, may be written over."""
        return at.ops.add_scaled(residual, answer, self.after, self._branch.multiplier)


def allocate_norm(spec: NormSpec, size: int, empty: Allocate) -> Norm:
    """A norm of `size` numbers with uninitialised parameters."""
    return Norm(empty(size), spec.eps, empty(size) if spec.bias else None, spec.centred, spec.plus_one)


def norm_parameters(prefix: str, norm: Norm) -> dict[str, Tensor]:
    """Name in the checkpoint -> the tensor that it fills; prefix: the norm's own name there."""
    found = {f"{prefix}.weight": norm.weight}
    return found if norm.bias is None else found | {f"{prefix}.bias": norm.bias}
