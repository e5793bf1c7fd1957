"""The mixture of experts of a layer: norm, router, the experts that it chooses for each token, and the shared
expert.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from paged_backend.errors import EngineError
from paged_backend.models.blocks.forward_pass import Allocate, ForwardPass
from paged_backend.models.blocks.residual import Residual
from paged_backend.models.layer_spec import LayerSpec, MoeSpec
from paged_backend.models.quantization.quantization import MXFP4
from paged_kernels.experts import ExpertLinear, Experts
from paged_kernels.linear import Linear
from paged_kernels.mxfp4 import GROUP, GROUP_BYTES

_FUSED = "mlp.experts.gate_up_proj"


class MoeMlp:
    """The second block of a layer. Parameters are uninitialised until `parameters` are filled."""

    def __init__(self, layer: LayerSpec, spec: MoeSpec, hidden_size: int, empty: Allocate) -> None:
        self.spec = spec
        self.residual = Residual(layer.mlp_branch, layer.norm, hidden_size, empty)
        count, size, partial = spec.num_experts, spec.intermediate_size, spec.shard.size > 1
        self._in_mxfp4 = empty.quantization is not None and empty.quantization.name == MXFP4

        def expert_linear(rows: int, columns: int) -> ExpertLinear:
            bias = empty(count, rows) if spec.bias else None
            if not self._in_mxfp4:
                return ExpertLinear(empty(count, rows, columns), bias)
            if columns % GROUP:
                raise EngineError(
                    f"quantization_config: mxfp4 has groups of {GROUP} numbers, and rows of experts are of {columns}"
                )
            # kernels read scales by fours
            packed, groups = empty(count, rows, columns // 2, dtype=torch.uint8), -(-columns // (4 * GROUP)) * 4
            return ExpertLinear(packed, bias, empty(count, rows, groups, dtype=torch.uint8))

        self.experts = Experts(
            router=Linear(empty(count, hidden_size), empty(count) if spec.bias else None),
            correction=empty(count, dtype=torch.float32) if spec.correction else None,
            routing=spec.routing,
            gate_up=expert_linear(2 * size, hidden_size),
            gate=spec.gate,
            down=expert_linear(hidden_size, size),
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

    def parameters(self, stored: Container[str] = ()) -> dict[str, Tensor]:
        """Name in the checkpoint, within the layer -> the tensor, or the part of a packed one, that it fills.

        stored: the names that the checkpoint has, within the layer: experts lie there one by one, unless it has them
            together.

        Raises:
            EngineError: it has them together, and this rank is to have a part of each.
        """
        if _FUSED in stored and self.spec.shard.size > 1:
            raise EngineError(
                f"tensor_parallel_size: experts that are stored together ({_FUSED}) cannot be divided among ranks"
            )
        fused, names = self.spec.together or not stored or _FUSED in stored, self.spec.names
        root = "mlp" if fused else names.root
        found: dict[str, Tensor | None] = {
            f"{root}.{names.router}.weight": self.experts.router.weight,
            f"{root}.{names.router}.bias": self.experts.router.bias,
            f"{root}.{names.correction}": self.experts.correction,
        }
        if self.spec.together:
            found |= self._transposed("gate_up_proj", self.experts.gate_up) | self._transposed(
                "down_proj", self.experts.down
            )
        else:
            found |= self._together() if fused else self._one_by_one()
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

    def forward(self, x: Tensor, at: ForwardPass) -> Tensor:
        """[T, hidden] -> [T, hidden], the residual stream before and after; x may be written over."""
        norm = self.residual.before
        if self.shared_gate_up is None or self.shared_down is None:
            return at.ops.norm_add_experts(x, norm, self.experts)
        shared = at.products.norm_gated_linear(x, norm, self.shared_gate_up)
        if self.shared_scale is not None:
            shared = shared * at.ops.norm_linear(x, norm, self.shared_scale).sigmoid()
        x = at.ops.norm_add_experts(x, norm, self.experts)
        return at.products.add_linear(shared, self.shared_down, x)

    def _together(self) -> dict[str, Tensor | None]:
        return {_FUSED: self.experts.gate_up.weight, "mlp.experts.down_proj": self.experts.down.weight}

    def _transposed(self, name: str, linear: ExpertLinear) -> dict[str, Tensor | None]:
        """As gpt-oss is published: [E, in, out] and biases, or groups of 32 numbers in 16 bytes and their scales."""
        biases = {f"mlp.experts.{name}_bias": linear.bias}
        if linear.scales is None:
            return biases | {f"mlp.experts.{name}": linear.weight.transpose(1, 2)}
        groups = linear.num_columns // GROUP
        blocks = {f"mlp.experts.{name}_blocks": linear.weight.view(*linear.weight.shape[:2], groups, GROUP_BYTES)}
        return biases | blocks | {f"mlp.experts.{name}_scales": linear.scales[..., :groups]}

    def _one_by_one(self) -> dict[str, Tensor | None]:
        names = self.spec.names
        found: dict[str, Tensor | None] = {}
        for expert in range(self.spec.num_experts):
            gate, up = self.experts.gate_up.weight[expert].chunk(2)
            parts = {names.gate: gate, names.up: up, names.down: self.experts.down.weight[expert]}
            found |= {f"{names.root}.experts.{expert}.{name}.weight": part for name, part in parts.items()}
        return found
