"""Checkpoints of NVIDIA's Model Optimizer: config.json's quantization_config, or hf_quant_config.json beside it, which
says the same in other words.

Source: Model Optimizer's documentation of unified Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from paged_backend.errors import EngineError
from paged_backend.models.quantization.float4 import NVFP4_GROUP, Nvfp4
from paged_backend.models.quantization.float8 import BLOCK, Float8
from paged_backend.models.quantization.patterns import any_of, strings_of
from paged_backend.models.quantization.quantization import Quantization, Rule
from paged_backend.models.quantization.scheme import Scheme
from paged_kernels.linear import Rounding

_SCHEMES: dict[str, Scheme] = {
    "FP8": Float8("tensor", Rounding("fp8", static=True)),
    "FP8_PER_CHANNEL_PER_TOKEN": Float8("channel", Rounding("fp8")),
    "FP8_PB_WO": Float8("block", None),
    "NVFP4": Nvfp4(),
    "W4A16_NVFP4": Nvfp4(),
}


def read_modelopt(config: Mapping[str, Any]) -> Quantization:
    """config: quantization_config, or `quantization` of hf_quant_config.json.

    Raises:
        EngineError: it asks for something that is not supported.
    """
    algorithm = config.get("quant_algo") or _algorithm_of_groups(config)
    skipped = strings_of(config.get("exclude_modules") or config.get("ignore"), "exclude_modules")
    rules = [Rule(any_of(skipped), None)]
    if algorithm == "MIXED_PRECISION":
        rules += _rules_of_layers(config.get("quantized_layers"))
    else:
        rules.append(Rule(lambda module: True, _scheme(algorithm, config.get("group_size"))))
    return Quantization(f"modelopt {algorithm}", tuple(rules))


def _scheme(algorithm: Any, group_size: Any) -> Scheme:
    scheme = _SCHEMES.get(str(algorithm))
    if scheme is None:
        raise EngineError(
            f"quantization_config: quant_algo: {str(algorithm)[:80]} is not supported; supported: "
            f"{', '.join(_SCHEMES)}, MIXED_PRECISION"
        )
    allowed = NVFP4_GROUP if isinstance(scheme, Nvfp4) else BLOCK
    if group_size not in (None, allowed):
        raise EngineError(
            f"quantization_config: group_size: {str(group_size)[:80]} is not supported for {algorithm}; "
            f"supported: {allowed}"
        )
    return scheme


def _rules_of_layers(layers: Any) -> list[Rule]:
    """MIXED_PRECISION: modules by name."""
    if not isinstance(layers, Mapping) or not all(isinstance(entry, Mapping) for entry in layers.values()):
        raise EngineError("quantization_config: quantized_layers: expected an object of modules")
    schemes = {name: _scheme(entry.get("quant_algo"), entry.get("group_size")) for name, entry in layers.items()}
    return [
        Rule(_within(frozenset(name for name in schemes if schemes[name] == scheme)), scheme)
        for scheme in dict.fromkeys(schemes.values())
    ]


def _within(names: frozenset[str]) -> Callable[[str], bool]:
    """Whether a module, or one that it lies in, is among the names: there may be tens of thousands."""

    def matches(module: str) -> bool:
        parts = module.split(".")
        return any(".".join(parts[:end]) in names for end in range(len(parts), 0, -1))

    return matches


def _algorithm_of_groups(config: Mapping[str, Any]) -> str:
    """Of a config that has nothing but groups, as compressed-tensors spells them."""
    groups = config.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if isinstance(weights, Mapping) and isinstance(groups, Mapping) and len(groups) == 1:
        found = {("float", 8): "FP8", ("float", 4): "NVFP4"}.get((str(weights.get("type")), weights.get("num_bits", 0)))
        if found is not None:
            return found
    raise EngineError("quantization_config: modelopt: quant_algo is missing")
