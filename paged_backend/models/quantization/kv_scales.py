"""Scales of K and V in a checkpoint, for a KV store of 8 bits: keys and values are divided by them before they are
rounded.

No kernel knows of them. A scale is rounded up to a power of two, which costs an 8-bit float nothing, and goes into the
weights around the KV store, where multiplying by it is exact: keys come out of their product, or of their norm, divided
by it and queries multiplied; values divided, and the output product multiplies what is attended to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from paged_backend.errors import EngineError
from paged_backend.models.blocks.attention import Attention
from paged_backend.models.weight_files import OpenTensors, StoredTensor, find_tensors, whole_names
from paged_kernels.linear import Linear

_NAMES = {
    "k": ("self_attn.k_scale", "self_attn.k_proj.k_scale"),
    "v": ("self_attn.v_scale", "self_attn.v_proj.v_scale"),
}


def load_kv_scales(layers: Mapping[str, Attention], folder: Path, renames: Mapping[str, str], *, adapters: bool) -> str:
    """Puts a checkpoint's scales of K and V into the weights of attention blocks, which are loaded. layers: by the
    beginnings of their tensors' names.
    adapters: some may be added to products of keys and values, which would then be of two scales: none are used.
        Returns a sentence, "" without any scales.

    Raises:
        EngineError: a scale is not one positive finite number, or a block has norms that a scale cannot go into.
    """
    stored = whole_names(find_tensors(folder, renames))
    with OpenTensors(stored) as tensors:
        scales = {prefix: [_read(prefix, _NAMES[side], stored, tensors) for side in "kv"] for prefix in layers}
    count = sum(k is not None or v is not None for k, v in scales.values())
    if not count:
        return ""
    if adapters:
        return (
            f"scales of K and V: the checkpoint has them for {count} layers; not used, for adapters are served "
            "(lora_directory)"
        )
    for prefix, attention in layers.items():
        k, v = scales[prefix]
        if k is not None:
            _scale_keys(attention, k)
        if v is not None:
            _scale_values(attention, v)
    return f"scales of K and V: the checkpoint's, of {count} layers, rounded up to powers of two"


def _read(prefix: str, names: Sequence[str], stored: Mapping[str, StoredTensor], tensors: OpenTensors) -> float | None:
    """The scale as a power of two; None: there is none."""
    name = next((prefix + name for name in names if prefix + name in stored), None)
    if name is None:
        return None
    tensor = tensors.read(name).float()
    if tensor.numel() != 1 or not math.isfinite(float(tensor)) or float(tensor) <= 0:
        raise EngineError(
            f"checkpoint: tensor {name} of shape {list(tensor.shape)} is no scale: expected one positive finite number"
        )
    return float(2.0 ** math.ceil(math.log2(float(tensor))))


def _scale_keys(attention: Attention, scale: float) -> None:
    if attention.qk_norm is None:
        q_rows, kv_rows = attention.spec.q_size, attention.spec.kv_size
        _multiply(attention.qkv.rows(0, q_rows), scale)
        _multiply(attention.qkv.rows(q_rows, q_rows + kv_rows), 1 / scale)
        return
    for norm, factor in zip(attention.qk_norm, (scale, 1 / scale), strict=True):
        if norm.plus_one:
            raise EngineError(
                "kv_dtype: fp8_e4m3 with the checkpoint's k_scale is not supported for norms of keys that "
                "multiply by 1 + weight"
            )
        _multiply_tensor(norm.weight, factor)
        _multiply_tensor(norm.bias, factor)


def _scale_values(attention: Attention, scale: float) -> None:
    q_rows, kv_rows = attention.spec.q_size, attention.spec.kv_size
    _multiply(attention.qkv.rows(q_rows + kv_rows, q_rows + 2 * kv_rows), 1 / scale)
    _multiply(attention.out, scale, with_bias=False)
    if attention.out.input_scale is not None:
        attention.out.input_scale.div_(scale)


def _multiply(linear: Linear, factor: float, *, with_bias: bool = True) -> None:
    """What a linear means times a power of two, in place."""
    if linear.row_scale is not None:
        linear.row_scale.mul_(factor)
    else:
        _multiply_tensor(linear.weight if linear.scale is None else linear.scale, factor)
    if with_bias:
        _multiply_tensor(linear.bias, factor)


def _multiply_tensor(tensor: Tensor | None, factor: float) -> None:
    if tensor is not None:
        tensor.mul_(factor)
