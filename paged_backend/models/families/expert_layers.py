"""What the families with experts have in common: which layers have them, and what a router can be asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedConfig

from paged_backend.errors import EngineError
from paged_backend.models.layer_spec import LayerSpec, MlpSpec, MoeSpec


def with_experts(layers: Sequence[LayerSpec], moe: MoeSpec, sparse: Sequence[bool]) -> tuple[LayerSpec, ...]:
    """The layers, with experts in the place of the dense perceptron where `sparse` says so; they have its activation.

    Raises:
        EngineError: the router is asked for more experts, or more groups of them, than there are; or a clamped gate has
            another activation than silu.
    """
    _check_routing(moe)
    for layer in layers:
        if isinstance(layer.mlp, MlpSpec):
            moe = replace(moe, gate=replace(moe.gate, activation=layer.mlp.activation))
    if moe.gate.limit is not None and moe.gate.activation != "silu":
        raise EngineError(f"hidden_act: {moe.gate.activation} is not supported for a clamped gate; supported: silu")
    return tuple(
        replace(layer, mlp=moe) if has_experts else layer for layer, has_experts in zip(layers, sparse, strict=True)
    )


def refuse_other_values(config: PreTrainedConfig, supported: Mapping[str, object]) -> None:
    """
    Raises:
        EngineError: config.json gives one of the keys another value than the one that is computed.
    """
    for key, value in supported.items():
        given = getattr(config, key, value)
        if given != value:
            raise EngineError(f"{key}: {str(given)[:80]} is not supported; supported: {value}")


def sparse_by_step(config: PreTrainedConfig) -> list[bool]:
    """Qwen's rule: every decoder_sparse_step-th layer has experts, but for those of mlp_only_layers."""
    dense = set(config.mlp_only_layers or ())
    return [
        index not in dense and (index + 1) % config.decoder_sparse_step == 0
        for index in range(config.num_hidden_layers)
    ]


def _check_routing(moe: MoeSpec) -> None:
    routing, count = moe.routing, moe.num_experts
    if routing.num_groups > 1 and count % routing.num_groups:
        raise EngineError(f"n_group: {routing.num_groups} groups of equal size cannot be made of {count} experts")
    if not 1 <= routing.top_groups <= routing.num_groups:
        raise EngineError(f"topk_group: {routing.top_groups} is not between 1 and n_group ({routing.num_groups})")
    choice = count // routing.num_groups * routing.top_groups
    if routing.top_k > choice:
        raise EngineError(
            f"num_experts_per_tok: {routing.top_k} is more than the {choice} experts that a token may choose from"
        )
