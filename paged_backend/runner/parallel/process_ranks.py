"""What ranks do together, by torch.distributed: gloo between processes of a CPU, NCCL between GPUs, and a file in the
engine's folder by which they meet.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from paged_backend.errors import EngineError, reason_of
from paged_kernels.device_traits import traits_of
from paged_kernels.peer_sum import PeerBuffers, make_peer_buffers, peer_buffer_bytes, peer_sum
from paged_kernels.rank_ops import Ranks

_MEETING_FILE = "ranks"
# with a rank that reads its weights slowly. One that hangs in a step is noticed by front ends long before
# (engine_hang_seconds)
_PATIENCE = timedelta(hours=1)
# the GPUs of a host share it: a program that ends badly within can put all of them out of service
_NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
_NATIVE_ATOMIC_SUPPORTED = 3  # of the driver's CUdevice_P2PAttribute
# its name until torch 2.12
_all_gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor


class ProcessRanks(Ranks):
    """This process's membership. There is one in a process, for torch.distributed keeps its group in a global."""

    def __init__(self, rank: int, size: int, folder: Path, device: torch.device) -> None:
        """Waits for the others. folder: the engine's, new for each engine; nothing listens beyond the loopback
        interface.
        """
        super().__init__(rank, size)
        for library in ("GLOO", "NCCL"):
            os.environ[f"{library}_SOCKET_IFNAME"] = "lo"
        for switch, position in _NO_MULTICAST.items():
            os.environ.setdefault(switch, position)
        self._store = FileStore(str(folder / _MEETING_FILE), size)
        self._store.set_timeout(_PATIENCE)  # else whoever waits for a rank's weights gives up after five minutes
        gpu = device if device.type == "cuda" else None
        backend = "gloo" if gpu is None else "nccl"
        torch.distributed.init_process_group(
            backend, store=self._store, rank=rank, world_size=size, timeout=_PATIENCE, device_id=gpu
        )
        self._num_tellings = 0
        self._peers: PeerBuffers | None = None  # None: every sum is the library's

    def sum(self, x: Tensor) -> Tensor:
        if self._peers is not None and self._peers.takes(x):
            return peer_sum(x, None, self._peers, launch_pdl=traits_of(x.device).launches_dependents)
        torch.distributed.all_reduce(x)
        return x

    def add_sum(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._peers is not None and self._peers.takes(x) and residual.is_contiguous():
            return peer_sum(x, residual, self._peers, launch_pdl=traits_of(x.device).launches_dependents)
        return super().add_sum(x, residual)

    def share_memory(self, capacity: int, dtype: torch.dtype, device: torch.device) -> str:
        """What a single rank may find wanting comes before they meet, where each waits for all: for an hour for one
        that has given up.
        """
        gpus = self.tell_all(str(device.index))
        failure = self._first_failure(lambda: self._take_memory(capacity, dtype, device, gpus))
        if not failure:
            failure = self._first_failure(lambda: self._meet_in_memory(capacity, dtype, device))
        if failure:
            self._peers = None
            return f"warning: the GPUs cannot read each other's memory, all sums go through NCCL: {failure}"
        return f"sums of up to {capacity} numbers go through memory that all GPUs read, larger ones through NCCL"

    def _first_failure(self, work: Callable[[], None]) -> str:
        """Of all ranks that do this work; empty if there is none."""
        said = ""
        try:
            work()
        except Exception as error:  # torch's own words: no peer access, a driver without the feature, …
            said = reason_of(error)
        failures = (f"rank {rank}: {reason}" for rank, reason in enumerate(self.tell_all(said)) if reason)
        return next(failures, "")

    def _take_memory(self, capacity: int, dtype: torch.dtype, device: torch.device, gpus: Sequence[str]) -> None:
        """gpus: the numbers of all ranks'."""
        import torch.distributed._symmetric_memory as symmetric_memory

        for other in (int(gpu) for gpu in gpus if int(gpu) != device.index):
            if not torch.cuda.can_device_access_peer(device, other):
                raise EngineError(f"GPU {device.index} does not reach GPU {other}")
            if not _has_atomics(device.index, other):
                raise EngineError(f"GPU {device.index} reaches GPU {other} by a link without atomics")
        self._memory = symmetric_memory.empty(
            peer_buffer_bytes(self.size, capacity, dtype), dtype=torch.uint8, device=device
        )
        self._memory.zero_()
        torch.cuda.synchronize(device)

    def _meet_in_memory(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self._met = symmetric_memory.rendezvous(self._memory, _everybody())  # waits for all ranks: their memory is zero
        self._peers = make_peer_buffers(self.rank, self._met.buffer_ptrs, capacity, dtype, device)

    def maximum(self, x: Tensor) -> Tensor:
        torch.distributed.all_reduce(x, op=torch.distributed.ReduceOp.MAX)
        return x

    def gather(self, x: Tensor) -> Tensor:
        every = x.new_empty(self.size, *x.shape)
        _all_gather(every.view(-1), x.view(-1))
        return every

    def tell_all(self, sentence: str) -> list[str]:
        """Through the file: no GPU is needed, and nobody is heard before all have spoken."""
        self._num_tellings += 1
        self._store.set(f"{self._num_tellings}/{self.rank}", sentence)
        return [self._store.get(f"{self._num_tellings}/{rank}").decode() for rank in range(self.size)]


def _has_atomics(gpu: int, other: int) -> bool:
    """Whether a GPU can count in another's memory, as peer_sum.py's flags are set: by NVLink, and rarely by PCIe. Also
    if the driver does not say.
    """
    found = ctypes.c_int(1)
    ctypes.CDLL("libcuda.so.1").cuDeviceGetP2PAttribute(ctypes.byref(found), _NATIVE_ATOMIC_SUPPORTED, gpu, other)
    return bool(found.value)


def _everybody() -> torch.distributed.ProcessGroup:
    group = torch.distributed.group.WORLD
    assert group is not None, "made by __init__"
    return group
