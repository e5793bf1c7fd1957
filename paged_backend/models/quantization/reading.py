"""How a checkpoint is quantised, from its small files: config.json's quantization_config, hf_quant_config.json, or what
older quantisers wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paged_backend.errors import EngineError
from paged_backend.models.config_file import read_json
from paged_backend.models.quantization.awq import read_awq
from paged_backend.models.quantization.compressed_tensors import read_compressed_tensors
from paged_backend.models.quantization.float8 import read_fp8
from paged_backend.models.quantization.gptq import read_gptq
from paged_backend.models.quantization.modelopt import read_modelopt
from paged_backend.models.quantization.quantization import MXFP4, Quantization

_READERS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {
    "fp8": read_fp8,
    "compressed-tensors": read_compressed_tensors,
    "modelopt": read_modelopt,
    "modelopt_fp4": read_modelopt,
    "awq": read_awq,
    "gptq": read_gptq,
    MXFP4: lambda config: Quantization(MXFP4, ()),  # of experts alone: everything else is plain
}
METHODS = tuple(_READERS)
# AutoGPTQ's and AutoAWQ's, before they wrote into config.json
_OLDER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_quantization(
    folder: Path, config: Mapping[str, Any] | None, place: str = "quantization_config"
) -> Quantization | None:
    """config: what folder's config.json has under `place`. Returns None for a checkpoint that is not quantised.

    Raises:
        EngineError: it is, in a way that is not supported; the sentence names the key.
    """
    if config:
        method = str(config.get("quant_method") or _method_of(config))[:80]
        return _read(method, config, place)
    path = folder / "hf_quant_config.json"
    if path.is_file():
        content = read_json(path).get("quantization")
        if not isinstance(content, Mapping):
            raise EngineError(f"{path.name}: quantization: expected an object")
        return read_modelopt(content) if content.get("quant_algo") else None
    for name, method in _OLDER_FILES.items():
        if (folder / name).is_file():
            return _read(method, read_json(folder / name), name)
    return None


def _read(method: str, config: Mapping[str, Any], place: str) -> Quantization:
    reader = _READERS.get(method)
    if reader is None:
        raise EngineError(f"{place}: quant_method: {method} is not supported; supported: {', '.join(_READERS)}")
    try:
        return reader(config)
    except EngineError as error:
        raise EngineError(str(error).replace("quantization_config", place, 1)) from None


def _method_of(config: Mapping[str, Any]) -> str:
    """Of a config that does not say: some of Model Optimizer's name it as their producer."""
    producer = config.get("producer")
    return str(producer.get("name")) if isinstance(producer, Mapping) and producer.get("name") else "unnamed"
