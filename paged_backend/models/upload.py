"""Weights from mapped files to the device, a few tensors at a time.

Memory that is not pinned reaches a GPU through a buffer of the driver's, on one thread that also waits for the file's pages. Here each of a few threads
reads into a pinned buffer of its own, and its copies overlap with the reading of the others.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch import Tensor

_THREADS = 4
_BUFFER_BYTES = 32 * 2**20
_AHEAD = 8  # tensors that were handed over and are not copied yet


class Uploads:
    """A context: what was handed over is on the device when it ends. One thread hands over."""

    def __init__(self, device: torch.device, num_threads: int | None = None, buffer_bytes: int = _BUFFER_BYTES) -> None:
        """num_threads: 0 copies at once, on the caller's thread; None: that for a CPU, which needs no buffer, else four."""
        self._device = device
        self._buffer_bytes = buffer_bytes
        count = (_THREADS if device.type == "cuda" else 0) if num_threads is None else num_threads
        self._threads = ThreadPoolExecutor(count, "upload") if count else None
        self._places = threading.Semaphore(_AHEAD)
        self._own = threading.local()  # of each thread: `buffer`, `stream`
        self._copies: list[Future[None]] = []

    def put(self, target: Tensor, source: Tensor) -> None:
        """Fills `target`, contiguous, from a tensor of as many numbers, perhaps of another float type."""
        if self._threads is None:
            target.copy_(source)
            return
        self._places.acquire()
        self._copies.append(self._threads.submit(self._copy, target, source))

    def __enter__(self) -> Uploads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for copy in self._copies:
                copy.result()

    @torch.inference_mode()
    def _copy(self, target: Tensor, source: Tensor) -> None:
        try:
            buffer = self._buffer().view(target.dtype)
            to, origin = target.view(-1), source.reshape(-1)
            with self._stream():
                for start in range(0, len(to), len(buffer)):
                    part = buffer[: len(to) - start].copy_(origin[start : start + len(buffer)])
                    to[start : start + len(buffer)].copy_(part, non_blocking=True)
                    if self._device.type == "cuda":
                        torch.cuda.current_stream(self._device).synchronize()  # before the buffer is written again
        finally:
            self._places.release()

    def _buffer(self) -> Tensor:
        if not hasattr(self._own, "buffer"):
            self._own.buffer = torch.empty(self._buffer_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        buffer: Tensor = self._own.buffer
        return buffer

    def _stream(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._own.stream)
