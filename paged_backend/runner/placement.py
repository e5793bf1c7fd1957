"""Where a model computes, and in which types."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.architecture import Architecture
from paged_backend.models.quantization.quantization import MXFP4

FP8_CAPABILITY = (8, 9)  # Ada and Hopper convert to and from it; the Triton language refuses it on older ones


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
    device = device_of(config, architecture.shard.rank)
    return Placement(device, *_dtypes(config, architecture, device))


def name_of(device: torch.device) -> str:
    """As the log spells it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_of(config: EngineConfig, rank: int) -> torch.device:
    """`device` is rank 0's, the others have the GPUs after it. On a CPU all ranks share it.

    Raises:
        EngineError: there is no such device.
    """
    name, size = config.device, config.tensor_parallel_size
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EngineError(f"device: {name} is asked for, but torch finds no CUDA device")
    first, count = torch.device(name).index or 0, torch.cuda.device_count()
    if first >= count:
        raise EngineError(f"device: {name} is asked for, but there are {count} CUDA devices")
    if first + size > count:
        behind = f" from {name} on" if first else ""
        raise EngineError(
            f"tensor_parallel_size: {size} ranks need a GPU each, there are {count - first}{behind} "
            "(CUDA_VISIBLE_DEVICES says which are seen)"
        )
    device = torch.device("cuda", first + rank)
    torch.cuda.set_device(device)
    return device


def devices_of_all(device: torch.device, rank: int, size: int) -> list[torch.device]:
    """Of every rank, where the rank of that number has `device`."""
    return (
        [torch.device("cuda", (device.index or 0) - rank + other) for other in range(size)]
        if device.type == "cuda"
        else [device]
    )


def leave_a_core(environment: Mapping[str, str], num_ranks: int = 1) -> None:
    """Takes torch's threads of this process down to one less than there are processors, or a rank's share of that,
    unless OMP_NUM_THREADS says otherwise.

    The server, its front ends and clients need a processor too, and threads that wait for one another at every op stand
    still while one of them has none: on two busy cores the demo model's stream ran at 7 tokens/s with two threads and
    at 70 with one.
    """
    if "OMP_NUM_THREADS" not in environment:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) - 1) // num_ranks))


def _dtypes(config: EngineConfig, architecture: Architecture, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Types of weights and activations, and of the KV store."""
    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else architecture.dtype  # type: ignore[assignment]
    if (
        name == "float32"
        and device.type == "cuda"
        and architecture.quantization is not None
        and architecture.quantization.name == MXFP4
    ):
        raise EngineError("dtype: float32 is not supported for experts in mxfp4 on a GPU; supported: bfloat16, float16")
    kv_name = name if config.kv_dtype == "auto" else config.kv_dtype
    if kv_name == "fp8_e4m3" and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise EngineError(
            f"kv_dtype: fp8_e4m3 needs a GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))}; "
            f"{name_of(device)} has less"
        )
    return getattr(torch, name), torch.float8_e4m3fn if kv_name == "fp8_e4m3" else getattr(torch, kv_name)
