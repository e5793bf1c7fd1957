"""Where a model computes, and in which types."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from paged_backend.config import EngineConfig, gpu_names, spell_shares
from paged_backend.errors import EngineError
from paged_backend.models.architecture import Architecture
from paged_backend.models.layer_spec import LatentSpec
from paged_backend.models.quantization.quantization import MXFP4
from paged_kernels.device_traits import FP8_CAPABILITY, traits_of

_WHO_IS_SEEN = "CUDA_VISIBLE_DEVICES says which are seen"


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


def place_words(config: EngineConfig, device: torch.device) -> str:
    """Where a rank is, with the GPU's number if the model has several."""
    several = device.type == "cuda" and config.replicas * config.tensor_parallel_size > 1
    return f"GPU {device.index}, {name_of(device)}" if several else name_of(device)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_of(config: EngineConfig, rank: int) -> torch.device:
    """Of a rank of this replica, made current. On a CPU all ranks share it.

    Raises:
        EngineError: there is no such device.
    """
    device = devices_of(config)[rank]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def devices_of(config: EngineConfig) -> list[torch.device]:
    """Of this replica's ranks: its share of `gpus`, or of the GPUs from `device` on.

    Raises:
        EngineError: there is no such device, or there are not enough for all replicas.
    """
    name, size = config.device, config.tensor_parallel_size
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() or config.gpus else "cpu"
    if not name.startswith("cuda"):
        return [torch.device("cpu")] * size
    if not torch.cuda.is_available():
        asked = f"gpus: {config.gpus} are" if config.gpus else f"device: {name} is"
        raise EngineError(f"{asked} asked for, but torch finds no CUDA device")
    count, needed = torch.cuda.device_count(), size * config.replicas
    if config.gpus:
        indices = [_index_of(name, count) for name in gpu_names(config.gpus)]
    else:
        first = torch.device(name).index or 0
        if first >= count:
            raise EngineError(f"device: {name} is asked for, but there are {count} CUDA devices")
        indices = list(range(first, count))
        if needed > len(indices):
            option = "tensor_parallel_size" if config.replicas == 1 else "replicas"
            behind = f" from {name} on" if first else ""
            raise EngineError(
                f"{option}: {spell_shares(config.replicas, size)} need a GPU each, there are {len(indices)}{behind} "
                f"({_WHO_IS_SEEN})"
            )
    return [torch.device("cuda", index) for index in indices[config.replica * size : (config.replica + 1) * size]]


def _index_of(name: str, count: int) -> int:
    """Of the GPU with that number or UUID, among those that this process sees."""
    if name.isdecimal() and int(name) < count:
        return int(name)
    uuids = (
        [] if name.isdecimal() else [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)]
    )
    if name in uuids:
        return uuids.index(name)
    seen = f"0 to {count - 1}" if name.isdecimal() else ", ".join(uuids)
    raise EngineError(f"gpus: there is no GPU {name}, there are {count}: {seen} ({_WHO_IS_SEEN})")


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
    if kv_name == "fp8_e4m3" and isinstance(architecture.attention, LatentSpec):
        raise EngineError(
            f"kv_dtype: fp8_e4m3 is not supported for the latents of {architecture.name}; supported: auto, bfloat16, "
            "float16, float32"
        )
    if kv_name == "fp8_e4m3" and not traits_of(device).has_fp8:
        raise EngineError(
            f"kv_dtype: fp8_e4m3 needs a GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))}; "
            f"{name_of(device)} has less"
        )
    return getattr(torch, name), torch.float8_e4m3fn if kv_name == "fp8_e4m3" else getattr(torch, kv_name)
