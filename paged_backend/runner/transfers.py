"""How steps travel between host and device, through pinned memory: one copy there, laid end to end, and one back, read
when it has landed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paged_backend.arrays import Int64, floats
from paged_backend.batch import Batch, Feature, StepResult
from paged_backend.runner.ask_table import room_of

# ---- to the device

_FIRST_CAPACITY = 16_384  # int32


class _HostBuffer:
    """A piece of host memory, and the moment from which it may be overwritten."""

    def __init__(self, capacity: int, pinned: bool) -> None:
        self.tensor = torch.empty(capacity, dtype=torch.int32, pin_memory=pinned)
        self.array: NDArray[np.int32] = self.tensor.numpy()
        self.copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]


class Staging:
    """Two host buffers take turns, so that the one a copy still reads is never written. On a CPU the tensors are views
    of the buffer itself.
    """

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


# ---- and back


@dataclass(frozen=True)
class Sampled:
    """Tensors on the device, one entry per sampled row, as in StepResult."""

    token_ids: Tensor  # integers [M]
    logprobs: Tensor | None = None  # float32 [M]
    ranks: Tensor | None = None  # int32 [M], with logprobs
    top_ids: Tensor | None = None  # int64 [M, n]
    top_logprobs: Tensor | None = None  # float32 [M, n]
    candidates: Tensor | None = None  # int32 [b, 2 n] of the step's beams: ids, and the bits of their log-probabilities


class _ResultBuffer:
    """Pinned host memory for a step's results, and the moment from which they are there."""

    def __init__(self, capacity: int) -> None:
        self.memory = torch.empty(capacity, dtype=torch.int32, pin_memory=True)
        self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class InFlightStep:
    """A launched step, and where its result will be: int32 matrices in host memory, floats as their bits."""

    batch: Batch
    output_indices: Int64  # [num_sampled] the output of each sampled sequence
    columns: Tensor  # [outputs, columns]: token id, logprob, rank, top ids, top logprobs
    num_tops: int
    found: tuple[Tensor | None, ...]  # for each of the batch's asks, what its room left (asks.py)
    buffer: _ResultBuffer | None  # None: it is there already


class ResultBuffers:
    """Pinned memory is made once: as many landings exist as steps were ever in flight."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._free: list[_ResultBuffer] = []

    def send_back(
        self, batch: Batch, output_indices: Int64, sampled: Sampled, found: tuple[Tensor | None, ...]
    ) -> InFlightStep:
        """Starts the copy. found: for each of the batch's asks, what its room left."""
        columns = [sampled.token_ids.int()[:, None]]
        if sampled.logprobs is not None and sampled.ranks is not None:
            columns += [sampled.logprobs.view(torch.int32)[:, None], sampled.ranks[:, None]]
        num_tops = 0
        if sampled.top_ids is not None and sampled.top_logprobs is not None:
            columns += [sampled.top_ids.int(), sampled.top_logprobs.view(torch.int32)]
            num_tops = sampled.top_ids.shape[1]
        packed = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
        if not self._pinned:
            return InFlightStep(batch, output_indices, packed, num_tops, found, None)
        parts = [packed, *found]
        buffer = self._buffer(sum(part.numel() for part in parts if part is not None))
        hosts: list[Tensor | None] = []
        at = 0
        for part in parts:
            hosts.append(None if part is None else _copy(part, buffer.memory[at:]))
            at += 0 if part is None else part.numel()
        buffer.arrived.record()
        host, *reported = hosts
        assert host is not None
        return InFlightStep(batch, output_indices, host, num_tops, tuple(reported), buffer)

    def receive(self, step: InFlightStep) -> StepResult:
        """Waits until it is there."""
        if step.buffer is not None:
            step.buffer.arrived.synchronize()
            self._free.append(step.buffer)
        columns, n = step.columns.numpy()[step.output_indices], step.num_tops  # a copy: the memory is used again
        wants_tops = bool(step.batch.features & Feature.TOP_LOGPROBS)
        return StepResult(
            token_ids=np.ascontiguousarray(columns[:, 0]),
            logprobs=None if columns.shape[1] == 1 else floats(columns[:, 1]),
            ranks=None if columns.shape[1] == 1 else np.ascontiguousarray(columns[:, 2]),
            top_ids=columns[:, 3 : 3 + n] if wants_tops else None,
            top_logprobs=floats(columns[:, 3 + n :]) if wants_tops else None,
            answers=tuple(
                None if found is None else room_of(ask).answer(ask, found.numpy())
                for ask, found in zip(step.batch.asks, step.found, strict=True)
            ),
        )

    def _buffer(self, size: int) -> _ResultBuffer:
        buffer = self._free.pop() if self._free else _ResultBuffer(size)
        return buffer if buffer.memory.numel() >= size else _ResultBuffer(size)


def _copy(packed: Tensor, memory: Tensor) -> Tensor:
    host = memory[: packed.numel()].view(packed.shape)
    host.copy_(packed, non_blocking=True)
    return host
