"""The memory behind the pages: K and V of all layers, and how many pages fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.architecture import Architecture
from paged_backend.models.kv_groups import KVGroups, group_layers
from paged_backend.models.layer_spec import AttentionSpec, LatentSpec
from paged_backend.units import spell_bytes

_DEFAULT_FRACTION = {"cuda": 0.9, "cpu": 0.25}
# a step of many tokens takes a CPU too long to be run for its bytes alone; the pool's memory is taken when it is first
# used
_CPU_STEP_DIVISOR = 10


@dataclass(frozen=True)
class MemoryNeeds:
    """What is not taken yet of a device's memory, and is not for the pool. In bytes."""

    weights: int = 0
    step: int = 0  # as measured (measured_memory.py); on a CPU nothing is
    graphs: int = 0


@dataclass(frozen=True)
class PoolSize:
    """How large the pool is, and which option made it so."""

    num_pages: int
    page_bytes: int  # K and V of one page in all layers of a KV group, and in those of a draft model
    max_model_len: int  # tokens; not more than the pool holds
    decided_by: str  # sentences for the operator
    groups: KVGroups
    free_bytes: int = 0  # of the device, once the weights are there


def allocate_kv_store(
    num_pages: int,
    attention: AttentionSpec | LatentSpec,
    num_layers: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """One tensor [num_pages, 2, num_kv_heads, page_size, head_dim], or of latents [num_pages, page_size, rank +
    rotary_dim], for each of a page's layers, whichever KV group's the pages are; zeros, so that what was never written
    is finite.

    Raises:
        EngineError: the device has not that much memory after all.
    """
    shape = (num_pages, *attention.page_shape(page_size))
    try:
        return [_zeros(shape, dtype, device) for _ in range(num_layers)]
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        raise EngineError(
            f"the pool of {spell_bytes(num_pages * page_bytes_of(attention, num_layers, page_size, dtype))} does not "
            f"fit: {str(error).splitlines()[0]}"
        ) from None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU of memory that the operating system gives, as zeros, when it is first written: a start neither fills the
    pool nor takes what is never used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def size_pool(
    config: EngineConfig,
    architecture: Architecture,
    kv_dtype: torch.dtype,
    device: torch.device,
    needs: MemoryNeeds,
    proposer_bytes: int = 0,
) -> PoolSize:
    """Decides num_pages and max_model_len. With `needs` as they were measured it shares out what is free once the
    weights are in memory. With nothing but the bytes of the weights, before they are there, it refuses what cannot fit
    in any case.

    num_pages and pool_bytes are taken as given if they fit; else the pool takes its fraction of the memory left after
    weights and steps, but not more than max_num_sequences sequences of max_model_len tokens can use. proposer_bytes: of
    a page, what a draft model keeps beside the target's K and V.

    Raises:
        EngineError: the pool asked for does not fit, or not even one page does, or max_model_len is beyond what the
            checkpoint allows.
    """
    max_model_len = _wanted_length(config, architecture)
    groups = group_layers(architecture.sliding_windows, max_model_len)
    num_groups = len(groups.groups)
    page_bytes = page_bytes_of(architecture.attention, groups.num_layers, config.page_size, kv_dtype) + proposer_bytes
    # engines and ranks on one machine's memory
    num_sharing = architecture.shard.size * config.replicas if device.type == "cpu" else 1
    free = max(free_bytes(device) // num_sharing - needs.weights, 0)
    available, detail = _available(free, device, needs)
    num_pages, reason = _decide(config, page_bytes, available, max_model_len, num_groups, device)
    if num_pages < 1:
        raise EngineError(
            f"the pool has no room for one page of {spell_bytes(page_bytes)} ({config.page_size} tokens): "
            f"{reason}; {detail}"
        )
    if num_pages * page_bytes > available:
        raise EngineError(
            f"the pool does not fit: {num_pages} pages of {spell_bytes(page_bytes)} are "
            f"{spell_bytes(num_pages * page_bytes)} ({reason}); {detail}"
        )
    if num_pages < num_groups:
        raise EngineError(
            f"the pool has {num_pages} pages, and each of the {num_groups} KV groups needs one: {reason}; {detail}"
        )
    num_tokens = num_pages // num_groups * config.page_size
    shrunk = ""
    if num_tokens < max_model_len:
        shrunk = f"; max_model_len is {num_tokens} instead of {max_model_len}, the pool holds no more"
        max_model_len = num_tokens
    pages_of_one = sum(pages_kept(window, max_model_len, config.page_size) for window in groups.windows)
    shared = f" in each of {num_groups} groups of layers ({groups.words})" if num_groups > 1 else ""
    beside = f", {spell_bytes(num_pages * proposer_bytes)} of it for the model that guesses" if proposer_bytes else ""
    decided_by = (
        f"pool: {num_pages} pages of {config.page_size} tokens = {num_tokens} tokens{shared}, "
        f"{spell_bytes(num_pages * page_bytes)}{beside}, "
        f"room for {num_pages // pages_of_one} sequences of {max_model_len} tokens; decided by {reason} "
        f"({detail}){shrunk}"
    )
    return PoolSize(num_pages, page_bytes, max_model_len, decided_by, groups, free)


def pages_kept(window: int | None, num_tokens: int, page_size: int) -> int:
    """Pages that a group has of a sequence of so many tokens, once its window has left the others behind."""
    whole = -(-num_tokens // page_size)
    return whole if window is None else min(-(-(window - 1) // page_size) + 1, whole)


def of_smallest(size: PoolSize, rooms: Sequence[int], page_size: int) -> PoolSize:
    """`size` with no more pages than every rank has room for. rooms: pages, by rank."""
    num_pages = min(rooms)
    if num_pages == size.num_pages:
        return size
    max_model_len = min(size.max_model_len, num_pages // len(size.groups.groups) * page_size)
    decided_by = (
        f"{size.decided_by}; rank {rooms.index(num_pages)} has room for {num_pages} pages, and so have all, "
        f"max_model_len is {max_model_len}"
    )
    return replace(size, num_pages=num_pages, max_model_len=max_model_len, decided_by=decided_by)


def _available(free: int, device: torch.device, needs: MemoryNeeds) -> tuple[int, str]:
    """Bytes that the pool may take, and how that comes, in words."""
    detail = f"{spell_bytes(free)} free after the weights"
    if device.type == "cpu":
        kept = free // _CPU_STEP_DIVISOR
        return free - kept, f"{detail}, of which a tenth, {spell_bytes(kept)}, is left for steps"
    if needs.step:
        detail += f", of which the largest step takes {spell_bytes(needs.step)}"
    if needs.graphs:
        detail += f" and the captured steps {spell_bytes(needs.graphs)}"
    return max(free - needs.step - needs.graphs, 0), detail


def page_bytes_of(attention: AttentionSpec | LatentSpec, num_layers: int, page_size: int, kv_dtype: torch.dtype) -> int:
    """K and V, or latents, of page_size tokens in so many layers."""
    return num_layers * math.prod(attention.page_shape(page_size)) * kv_dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated on the device now. On a CPU the container's limit counts as well as the machine's
    memory.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    rooms = [_meminfo_available(), *_cgroup_rooms()]
    return min((room for room in rooms if room is not None), default=0)


def _wanted_length(config: EngineConfig, architecture: Architecture) -> int:
    allowed = architecture.max_len
    if config.max_model_len > allowed:
        raise EngineError(f"max_model_len: {config.max_model_len} is more than the checkpoint allows ({allowed})")
    return config.max_model_len or allowed


def _decide(
    config: EngineConfig, page_bytes: int, available: int, max_model_len: int, num_groups: int, device: torch.device
) -> tuple[int, str]:
    if config.num_pages > 0:
        return config.num_pages, "num_pages"
    if config.pool_bytes > 0:
        return config.pool_bytes // page_bytes, f"pool_bytes = {spell_bytes(config.pool_bytes)}"
    fraction = config.pool_memory_fraction or _DEFAULT_FRACTION[device.type]
    num_pages = int(available * fraction) // page_bytes
    most = config.max_num_sequences or math.inf
    useful = most * num_groups * -(-max_model_len // config.page_size)
    if num_pages > useful:
        return (
            int(useful),
            f"max_num_sequences ({config.max_num_sequences}) sequences of max_model_len ({max_model_len}) "
            "tokens, more is of no use",
        )
    return num_pages, f"pool_memory_fraction = {fraction:g}"


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None


def _cgroup_rooms() -> list[int | None]:
    """Room under this process's control groups. Versions 2 and 1 differ in the names of folders and files; a container
    sees its own group as the root.
    """
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    roots = [
        (Path("/sys/fs/cgroup") / controllers, path.lstrip("/"))
        for _, controllers, path in groups
        if controllers in ("", "memory")
    ]
    return [_room(folder) for root, path in roots for folder in {root / path, root}]


def _room(folder: Path) -> int | None:
    """Bytes below a control group's limit, file pages that can be dropped counted as free; None if it has no limit."""
    for limit_name, usage_name, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, usage = (folder / limit_name).read_text().strip(), int((folder / usage_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        return None if limit == "max" else max(int(limit) - usage + int(stat.get(droppable, 0)), 0)
    return None
