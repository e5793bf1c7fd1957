"""Checkpoints of the library compressed-tensors (llm-compressor writes them): groups of modules, a scheme each.

Source: compressed-tensors' QuantizationConfig, QuantizationScheme and QuantizationArgs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paged_backend.errors import EngineError
from paged_backend.models.quantization.float4 import NVFP4_GROUP, Mxfp4, Nvfp4
from paged_backend.models.quantization.float8 import BLOCK, Float8
from paged_backend.models.quantization.integers import Int8, Packed
from paged_backend.models.quantization.patterns import any_of, strings_of
from paged_backend.models.quantization.quantization import Quantization, Rule
from paged_backend.models.quantization.scheme import Scheme
from paged_kernels.e2m1 import MXFP4_GROUP
from paged_kernels.linear import Rounding

_FORMATS = "float-quantized, int-quantized, naive-quantized, pack-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized"


def read_compressed_tensors(config: Mapping[str, Any]) -> Quantization:
    """quant_method "compressed-tensors".

    Raises:
        EngineError: it asks for something that is not supported; the sentence names the group.
    """
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise EngineError(
            f"quantization_config: sparsity_config: {str(sparsity)[:80]} is not supported; supported: dense"
        )
    if config.get("transform_config"):
        raise EngineError("quantization_config: transform_config: transforms of activations are not supported")
    groups = config.get("config_groups")
    if (
        not isinstance(groups, Mapping)
        or not groups
        or not all(isinstance(group, Mapping) for group in groups.values())
    ):
        raise EngineError("quantization_config: config_groups: expected an object of groups")
    skipped = strings_of(config.get("ignore"), "ignore")
    rules, last = [Rule(any_of(skipped), None)], []
    for name, group in groups.items():
        scheme = _scheme(f"quantization_config: {name[:80]}", group, str(group.get("format") or config.get("format")))
        targets = strings_of(group.get("targets"), f"{name}.targets")
        named = [target for target in targets if target != "Linear"]
        rules.append(Rule(any_of(named), scheme))
        if len(named) < len(targets):  # the class of all modules: names come first
            last.append(Rule(lambda module: True, scheme))
    return Quantization("compressed-tensors", (*rules, *last))


def _scheme(place: str, group: Mapping[str, Any], format: str) -> Scheme:
    weights, activations = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        raise EngineError(f"{place}: groups without quantised weights are not supported")
    if group.get("output_activations"):
        raise EngineError(f"{place}.output_activations: quantised outputs are not supported")
    if weights.get("actorder") in ("group", "dynamic", True):
        raise EngineError(
            f"{place}.weights.actorder: {weights['actorder']} is not supported: its columns are in the order of "
            "their activations"
        )
    kind, bits, size = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("group_size")
    strategy: Any = weights.get("strategy") or ("tensor" if size is None else "group")
    if format == "pack-quantized" and kind == "int" and bits in (4, 8) and strategy in ("group", "channel"):
        if activations:
            raise EngineError(f"{place}.input_activations: quantised activations of packed weights are not supported")
        if strategy == "group" and (not isinstance(size, int) or size < 16 or size % 16):
            raise EngineError(
                f"{place}.weights.group_size: {str(size)[:80]} is not supported; supported: multiples of 16"
            )
        return Packed(bits, size if strategy == "group" and size else 0, bool(weights.get("symmetric", True)))
    if kind == "float" and bits == 4 and (format, size) == ("nvfp4-pack-quantized", NVFP4_GROUP):
        return Nvfp4("weight_packed", "weight_global_scale", divided=True)
    if kind == "float" and bits == 4 and (format, size) == ("mxfp4-pack-quantized", MXFP4_GROUP):
        return Mxfp4()
    if not weights.get("symmetric", True):
        raise EngineError(f"{place}.weights.symmetric: false is not supported for {format[:80]}")
    if (
        format in ("float-quantized", "naive-quantized")
        and kind == "float"
        and bits == 8
        and strategy in ("tensor", "channel", "block")
    ):
        if strategy == "block" and weights.get("block_structure") not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
            raise EngineError(
                f"{place}.weights.block_structure: {str(weights.get('block_structure'))[:80]} is not supported; "
                f"supported: [{BLOCK}, {BLOCK}]"
            )
        return Float8(strategy, _rounding(place, activations, "fp8"))
    if (
        format in ("int-quantized", "naive-quantized")
        and kind == "int"
        and bits == 8
        and strategy in ("tensor", "channel")
    ):
        return Int8(strategy == "tensor", _rounding(place, activations, "int8"))
    what = (
        f"format {format[:80]} with {str(kind)[:20]} weights of {str(bits)[:20]} bits, strategy "
        f"{str(strategy)[:20]}, group_size {str(size)[:20]}"
    )
    raise EngineError(f"{place}: {what} is not supported; supported formats: {_FORMATS}")


def _rounding(place: str, activations: Any, codes: str) -> Rounding | None:
    if not activations:
        return None
    place = f"{place}.input_activations"
    kind, bits = activations.get("type", "int"), activations.get("num_bits", 8)
    dynamic, strategy, size = (
        activations.get("dynamic", False),
        activations.get("strategy", "tensor"),
        activations.get("group_size"),
    )
    if (kind, bits) != ("float" if codes == "fp8" else "int", 8):
        raise EngineError(
            f"{place}: {str(kind)[:20]} activations of {str(bits)[:20]} bits are not supported beside {codes} weights"
        )
    if not activations.get("symmetric", True):
        raise EngineError(f"{place}.symmetric: false is not supported; supported: true")
    if dynamic is True and strategy == "token":
        return Rounding("fp8" if codes == "fp8" else "int8")
    if dynamic is True and strategy in ("group", "tensor_group") and size == BLOCK:
        return Rounding("fp8" if codes == "fp8" else "int8", BLOCK)
    if dynamic is False and strategy == "tensor":
        return Rounding("fp8" if codes == "fp8" else "int8", static=True)
    what = f"{'dynamic' if dynamic else 'static'} scales of strategy {str(strategy)[:20]}"
    raise EngineError(
        f"{place}: {what} are not supported; supported: static of strategy tensor, dynamic of strategy token or "
        f"group ({BLOCK})"
    )
