"""Weights from mapped files to the device, a few tensors at a time.

Memory that is not pinned reaches a GPU through a buffer of the driver's, on one thread that also waits for the file's
pages. Here each of a few threads reads into a pinned buffer of its own, and its copies overlap with the reading of the
others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch import Tensor

_THREADS = 4
_BUFFER_BYTES = 32 * 2**20
_AHEAD = 8  # tensors that were handed over and are not copied yet


def _parts(target: Tensor, source: Tensor, max_numbers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of both that correspond, of at most so many numbers each: stretches of a contiguous target, indices of the
    first dimensions of another.
    """
    if target.is_contiguous():
        yield from zip(
            torch.split(target.view(-1), max_numbers), torch.split(source.reshape(-1), max_numbers), strict=True
        )
    elif target.numel() <= max_numbers:
        yield target, source
    else:
        for to, origin in zip(target, source, strict=True):
            yield from _parts(to, origin, max_numbers)


class Uploads:
    """A context: what was handed over is on the device when it ends. One thread hands over."""

    def __init__(self, device: torch.device, num_threads: int | None = None, buffer_bytes: int = _BUFFER_BYTES) -> None:
        """num_threads: 0 copies at once, on the caller's thread; None: that for a CPU, which needs no buffer, else
        four.
        """
        self._device = device
        self._buffer_bytes = buffer_bytes
        count = (_THREADS if device.type == "cuda" else 0) if num_threads is None else num_threads
        self._threads = ThreadPoolExecutor(count, "upload") if count else None
        self._places = threading.Semaphore(_AHEAD)
        self._own = threading.local()  # of each thread: `buffer`, `stream`
        self._copies: list[Future[None]] = []

    def put(self, target: Tensor, source: Tensor) -> None:
        """Fills `target` from a tensor of as many numbers, perhaps of another float type. A target that is not
        contiguous, such as a transposed matrix, has the source's shape.
        """
        if self._threads is None:
            target.copy_(source)
            return
        self._places.acquire()
        self._copies.append(self._threads.submit(self._copy, target, source))

    def __enter__(self) -> Uploads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for copy in self._copies:
                copy.result()

    @torch.inference_mode()
    def _copy(self, target: Tensor, source: Tensor) -> None:
        try:
            buffer = self._buffer().view(target.dtype)
            with self._stream():
                for to, origin in _parts(target, source, len(buffer)):
                    to.copy_(buffer[: to.numel()].copy_(origin.reshape(-1)).view(to.shape), non_blocking=True)
                    if self._device.type == "cuda":
                        torch.cuda.current_stream(self._device).synchronize()  # before the buffer is written again
        finally:
            self._places.release()

    def _buffer(self) -> Tensor:
        if not hasattr(self._own, "buffer"):
            self._own.buffer = torch.empty(
                self._buffer_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda"
            )
        buffer: Tensor = self._own.buffer
        return buffer

    def _stream(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._own.stream)
