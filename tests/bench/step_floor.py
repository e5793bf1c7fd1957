"""What a decode step cannot be faster than, from a model's own weights as they are stored: their bytes and those of K
and V over a bandwidth, or the products' operations over a rate.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from paged_backend.models.architecture import Architecture
from paged_backend.models.blocks.moe import MoeMlp
from paged_backend.models.layer_spec import AttentionSpec
from paged_backend.models.weights import allocate_weights


def step_floor(
    architecture: Architecture, batch: int, context: int, *, bandwidth: float, rate: float, kv_bytes: int = 2
) -> float:
    """Seconds of a step of `batch` sequences with `context` tokens each. bandwidth: bytes a second; rate: operations a
    second; kv_bytes: of a number in the KV store.

    The larger of two, of the weights' bytes and of the products' operations; the bytes of K and V come on top of
    either. Of experts those are read that some token chose, if each chooses evenly and for itself.
    """
    device = torch.device("meta")
    stored = allocate_weights(architecture, torch.bfloat16, device)
    plain = allocate_weights(replace(architecture, quantization=None), torch.bfloat16, device)
    read, parameters = float(stored.num_bytes), plain.num_bytes / 2
    if stored.head.weight is not stored.embedding:  # of which a step reads a few rows
        read -= stored.embedding.nbytes
        parameters -= plain.embedding.numel()
    kv = 0.0
    for spec, layer, floats in zip(architecture.layers, stored.layers, plain.layers, strict=True):
        if isinstance(layer.mlp, MoeMlp) and isinstance(floats.mlp, MoeMlp):
            share = layer.mlp.experts.routing.top_k / layer.mlp.experts.num_experts
            read -= (1 - share) ** batch * _bytes_of_experts(layer.mlp)
            parameters -= (1 - share) * _bytes_of_experts(floats.mlp) / 2
        attention = spec.attention
        numbers = 2 * attention.num_kv_heads * attention.head_dim
        if not isinstance(attention, AttentionSpec):  # a latent is key and value
            numbers = attention.head_dim
        kv += batch * min(context, attention.sliding_window or context) * numbers * kv_bytes
    return max(read / bandwidth, 2 * parameters * batch / rate) + kv / bandwidth


def _bytes_of_experts(mlp: MoeMlp) -> int:
    return sum(tensor.nbytes for linear in (mlp.experts.gate_up, mlp.experts.down) for tensor in linear.tensors)
