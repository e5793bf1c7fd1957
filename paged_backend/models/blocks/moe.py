"""The mixture of experts of a layer: norm, router, the experts that it chooses for each token, and the shared
expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from paged_backend.models.blocks.forward_pass import Allocate, ForwardPass
from paged_backend.models.blocks.residual import Residual
from paged_backend.models.layer_spec import LayerSpec, MoeSpec
from paged_backend.models.quantization.modules import Module, QuantisedModule, StackedExperts
from paged_backend.models.shard import Cut, side_by_side
from paged_kernels.experts import ExpertLinear, Experts
from paged_kernels.linear import Linear

Shapes = Mapping[str, Sequence[int]]  # of a checkpoint's tensors, by their names within the layer
NOTHING: Shapes = MappingProxyType({})
_OUT, _IN = 1, 2  # dimensions of the matrices of all experts, [E, out, in]
_FUSED, _FUSED_DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


class MoeMlp:
    """The second block of a layer. Parameters are uninitialised until `parameters` are filled."""

    def __init__(self, layer: LayerSpec, spec: MoeSpec, hidden_size: int, empty: Allocate) -> None:
        self.spec = spec
        self.residual = Residual(layer.mlp_branch, layer.norm, hidden_size, empty)
        count, size, partial = spec.num_experts, spec.intermediate_size, spec.shard.size > 1
        self._quantization, self._prefix = empty.quantization, empty.prefix
        names, experts = spec.names, range(count)
        of_expert = [f"{names.root}.experts.{expert}" for expert in experts]
        gate_up = [(f"{root}.{names.gate}", f"{root}.{names.up}") for root in of_expert]
        down = [(f"{root}.{names.down}",) for root in of_expert]
        self.experts = Experts(
            router=Linear(empty(count, hidden_size), empty(count) if spec.bias else None),
            correction=empty(count, dtype=torch.float32) if spec.correction else None,
            routing=spec.routing,
            gate_up=empty.experts(gate_up, (size, size), hidden_size, bias=spec.bias),
            gate=spec.gate,
            down=empty.experts(down, (hidden_size,), size, bias=spec.bias and spec.shard.first),
            partial=partial,
        )
        sites = spec.sites(hidden_size)
        self.shared_gate_up = empty.linear(sites[0]) if sites else None
        self.shared_down = empty.linear(sites[1], partial=partial) if sites else None
        self.shared_scale = Linear(empty(1, hidden_size)) if spec.shared_gate else None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Those that adapters may change."""
        return (
            () if self.shared_gate_up is None or self.shared_down is None else (self.shared_gate_up, self.shared_down)
        )

    @property
    def packed(self) -> tuple[ExpertLinear, ...]:
        """The experts' matrices that are stored in few bits."""
        linears = (self.experts.gate_up, self.experts.down)
        return tuple(linear for linear in linears if linear.format.codes != "plain")

    def modules(self, stored: Shapes = NOTHING) -> Iterator[Module]:
        """What fills the packed matrices: of each expert, or of all of them together. stored: as for `parameters`."""
        names, prefix, count = self.spec.names, self._prefix, self.spec.num_experts
        together = self.spec.together or _FUSED in stored
        parts = (
            (self.experts.gate_up, (names.gate, names.up), _FUSED),
            (self.experts.down, (names.down,), _FUSED_DOWN),
        )
        for linear, modules, fused in parts:
            if linear.format.codes == "plain" or self._quantization is None:
                continue
            first = f"{prefix}{names.root}.experts.0.{modules[0]}"
            scheme = self._quantization.scheme_of(first)  # of experts in mxfp4 there is none
            if together:
                transposed = self._is_transposed(fused, stored.get(fused))
                yield StackedExperts(prefix + fused, scheme, linear, transposed, self._cut(fused))
                continue
            assert scheme is not None, f"{first} is packed by no scheme"
            num_rows = linear.num_rows // len(modules)
            for expert in range(count):
                of_expert = linear.of(expert)
                for index, module in enumerate(modules):
                    name = f"{prefix}{names.root}.experts.{expert}.{module}"
                    yield QuantisedModule(name, scheme, of_expert, index * num_rows, num_rows)

    def parameters(self, stored: Shapes = NOTHING) -> dict[str, Tensor]:
        """Name in the checkpoint, within the layer -> the tensor, or the part of a packed one, that it fills; but for
        what `modules` fill.

        stored: the names that the checkpoint has, within the layer, and their shapes: experts lie there one by one,
            unless it has them together.
        """
        fused, names = self.spec.together or not stored or _FUSED in stored, self.spec.names
        root = "mlp" if fused else names.root
        found: dict[str, Tensor | None] = {
            f"{root}.{names.router}.weight": self.experts.router.weight,
            f"{root}.{names.router}.bias": self.experts.router.bias,
            f"{root}.{names.correction}": self.experts.correction,
        }
        found |= self._together(stored) if fused else self._one_by_one()
        if self.shared_gate_up is not None and self.shared_down is not None:
            gate, up = self.shared_gate_up.weight.chunk(2)
            shared = f"{root}.{names.shared}"
            found |= {
                f"{shared}.gate_proj.weight": gate,
                f"{shared}.up_proj.weight": up,
                f"{shared}.down_proj.weight": self.shared_down.weight,
            }
        if self.shared_scale is not None:
            found[f"{root}.{names.shared}_gate.weight"] = self.shared_scale.weight
        return self.residual.parameters() | {name: tensor for name, tensor in found.items() if tensor is not None}

    def cuts(self, stored: Shapes) -> dict[str, Cut]:
        """This rank's part of the tensors that have all experts together, by their names within the layer."""
        gate_up = self._cut(_FUSED)
        if gate_up is None:
            return {}
        found = {f"{_FUSED}_bias": gate_up}  # with its rows; that of down is whole, on one rank
        for name in (_FUSED, _FUSED_DOWN):
            cut = self._cut(name)
            if cut is not None and name in stored:
                found[name] = replace(cut, dim=3 - cut.dim) if self._is_transposed(name, stored[name]) else cut
        return found

    def forward(self, x: Tensor, at: ForwardPass) -> Tensor:
        """[T, hidden] -> [T, hidden], the residual stream before and after; x may be written over."""
        norm, shared = self.residual.before, None
        if self.shared_gate_up is not None:
            shared = at.products.norm_gated_linear(x, norm, self.shared_gate_up, self.spec.gate.activation)
        if shared is not None and self.shared_scale is not None:
            shared = shared * at.ops.norm_linear(x, norm, self.shared_scale).sigmoid()
        if self.residual.is_plain:
            answer = at.ops.norm_add_experts(x, norm, self.experts)
        else:
            normed = x if norm is None else at.ops.norm(x, norm)
            chosen = at.ops.route(normed, self.experts)
            answer = at.ops.add_experts(normed, *chosen, self.experts, torch.zeros_like(x))
        if shared is not None and self.shared_down is not None:
            answer = at.products.add_linear(shared, self.shared_down, answer)
        return answer if self.residual.is_plain else self.residual.add(answer, x, at)

    def _together(self, stored: Shapes) -> dict[str, Tensor | None]:
        found: dict[str, Tensor | None] = {}
        for name, linear in ((_FUSED, self.experts.gate_up), (_FUSED_DOWN, self.experts.down)):
            weight = _plain(linear)
            if weight is not None and self._is_transposed(name, stored.get(name)):
                weight = weight.transpose(1, 2)
            found |= {name: weight, f"{name}_bias": linear.bias}
        return found

    def _cut(self, name: str) -> Cut | None:
        """This rank's part of the matrix [E, out, in] of all experts together; None: all of it."""
        cut = self.spec.cut
        if cut is None or name == _FUSED_DOWN:
            return None if cut is None else replace(cut, dim=_IN)
        if self.spec.gate.interleaved:
            return Cut(_OUT, 2 * cut.start, 2 * cut.count, 2 * cut.whole)
        rows = replace(cut, dim=_OUT)
        return side_by_side((rows, rows))

    def _is_transposed(self, name: str, shape: Sequence[int] | None) -> bool:
        """Whether the checkpoint has a matrix of all experts as [E, in, out]. shape: of its tensor; None: it has none.

        transformers' rule for what may lie either way: as it is, if that fits.
        """
        if not self.spec.either_way:
            return self.spec.together
        linear = self.experts.gate_up if name == _FUSED else self.experts.down
        whole, cut = [self.spec.num_experts, linear.num_rows, linear.num_columns], self._cut(name)
        if cut is not None:
            whole[cut.dim] = cut.whole
        return shape is not None and list(shape) != whole

    def _one_by_one(self) -> dict[str, Tensor | None]:
        names = self.spec.names
        found: dict[str, Tensor | None] = {}
        for expert in range(self.spec.num_experts):
            root = f"{names.root}.experts.{expert}"
            weight = _plain(self.experts.gate_up)
            if weight is not None:
                gate, up = weight[expert].chunk(2)
                found |= {f"{root}.{names.gate}.weight": gate, f"{root}.{names.up}.weight": up}
            down = _plain(self.experts.down)
            if down is not None:
                found[f"{root}.{names.down}.weight"] = down[expert]
        return found


def _plain(linear: ExpertLinear) -> Tensor | None:
    """The weight, unless it is stored in few bits."""
    return linear.weight if linear.format.codes == "plain" else None
