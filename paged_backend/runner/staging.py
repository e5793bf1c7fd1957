"""One copy from host to device per step: arrays are laid end to end in pinned memory, copied, and cut apart again on the device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_FIRST_CAPACITY = 16_384  # int32


class _HostBuffer:
    """A piece of host memory, and the moment from which it may be overwritten."""

    def __init__(self, capacity: int, pinned: bool) -> None:
        self.tensor = torch.empty(capacity, dtype=torch.int32, pin_memory=pinned)
        self.array: NDArray[np.int32] = self.tensor.numpy()
        self.copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]


class Staging:
    """Two host buffers take turns, so that the one a copy still reads is never written. On a CPU the tensors are views of the buffer itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._capacity = 0
        self._current = 0
        self._grow(_FIRST_CAPACITY)

    def send(self, sections: Mapping[str, NDArray[np.int32]]) -> dict[str, Tensor]:
        """The arrays as int32 tensors on the device, valid until the next call (in the device's order of work)."""
        total = sum(array.size for array in sections.values())
        if total > self._capacity:
            self._grow(max(total, 2 * self._capacity))
        self._current ^= 1
        host = self._hosts[self._current]
        if host.copied is not None:
            host.copied.synchronize()  # of two steps ago: over, unless the host is far ahead
        end = 0
        for array in sections.values():
            begin, end = end, end + array.size
            host.array[begin:end] = array.reshape(-1)
        if host.copied is None:
            return _cut(host.tensor, sections)
        self._target[:end].copy_(host.tensor[:end], non_blocking=True)
        host.copied.record()
        return _cut(self._target, sections)

    def _grow(self, capacity: int) -> None:
        if self._pinned:
            torch.cuda.synchronize(self._device)  # a copy may still read the old buffers
            self._target = torch.empty(capacity, dtype=torch.int32, device=self._device)
        self._hosts = [_HostBuffer(capacity, self._pinned) for _ in range(2)]
        self._capacity = capacity


def _cut(flat: Tensor, sections: Mapping[str, NDArray[np.int32]]) -> dict[str, Tensor]:
    tensors = {}
    begin = 0
    for name, array in sections.items():
        tensors[name] = flat[begin : begin + array.size].view(array.shape)
        begin += array.size
    return tensors
