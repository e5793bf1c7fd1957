"""Where a model computes, and in which types."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.architecture import Architecture

_FP8_CAPABILITY = (8, 9)  # Ada and Hopper convert to and from it; the Triton language refuses it on older ones


@dataclass(frozen=True)
class Placement:
    """A device, and the types of what lies there."""

    device: torch.device
    dtype: torch.dtype  # of weights and activations
    kv_dtype: torch.dtype  # of the KV store


def place(config: EngineConfig, architecture: Architecture) -> Placement:
    """Reads `device`, `dtype` and `kv_dtype`.

    Raises:
        EngineError: there is no such device, or it cannot compute in such a type.
    """
    device = _device(config.device)
    return Placement(device, *_dtypes(config, architecture, device))


def name_of(device: torch.device) -> str:
    """As the log spells it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise EngineError(f"device: {name} is asked for, but torch finds no CUDA device")
        device = torch.device(name if ":" in name else "cuda:0")
        if (device.index or 0) >= torch.cuda.device_count():
            raise EngineError(f"device: {name} is asked for, but there are {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def _dtypes(config: EngineConfig, architecture: Architecture, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Types of weights and activations, and of the KV store."""
    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else architecture.dtype  # type: ignore[assignment]
    kv_name = name if config.kv_dtype == "auto" else config.kv_dtype
    if kv_name == "fp8_e4m3" and device.type == "cuda" and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        raise EngineError(f"kv_dtype: fp8_e4m3 needs a GPU of compute capability {'.'.join(map(str, _FP8_CAPABILITY))}; {name_of(device)} has less")
    return getattr(torch, name), torch.float8_e4m3fn if kv_name == "fp8_e4m3" else getattr(torch, kv_name)
