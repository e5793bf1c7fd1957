"""Ranks as threads of one process: what they do together goes through a list, so that a model's shards can be added up
without processes or sockets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from paged_kernels.rank_ops import Ranks

T = TypeVar("T")
_PATIENCE_SECONDS = 60.0


class ThreadRanks(Ranks):
    """One rank of those that share `parts` and `barrier`."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, parts: list[Tensor]) -> None:
        super().__init__(rank, size)
        self._barrier, self._parts = barrier, parts
        self.num_gathers = 0

    def sum(self, x: Tensor) -> Tensor:
        return x.copy_(self._exchange(x).sum(0))

    def maximum(self, x: Tensor) -> Tensor:
        return x.copy_(self._exchange(x).amax(0))

    def gather(self, x: Tensor) -> Tensor:
        self.num_gathers += 1
        return self._exchange(x)

    def tell_all(self, sentence: str) -> list[str]:
        letters = torch.zeros(1000, dtype=torch.uint8)
        letters[: len(sentence)] = torch.frombuffer(bytearray(sentence.encode("ascii") + b"\0"), dtype=torch.uint8)[:-1]
        return [bytes(said.tolist()).rstrip(b"\0").decode() for said in self._exchange(letters)]

    def _exchange(self, x: Tensor) -> Tensor:
        assert x.is_contiguous()
        self._parts[self.rank] = x
        self._barrier.wait(_PATIENCE_SECONDS)
        every = torch.stack(self._parts)
        self._barrier.wait(_PATIENCE_SECONDS)  # nobody's part is written over before all have read it
        return every


def on_every_rank(size: int, work: Callable[[ThreadRanks], T]) -> list[T]:
    """What `work` returns on each of so many ranks."""
    barrier, parts = threading.Barrier(size), [torch.empty(0)] * size

    def one(rank: int) -> T:
        try:
            return work(ThreadRanks(rank, size, barrier, parts))
        except BaseException:
            barrier.abort()  # the others do not wait for a rank that has failed
            raise

    with ThreadPoolExecutor(size) as threads:
        results = [threads.submit(one, rank) for rank in range(size)]
    failures = [
        result.exception()
        for result in results
        if not isinstance(result.exception(), (threading.BrokenBarrierError, type(None)))
    ]
    if failures:
        raise failures[0]
    return [result.result() for result in results]
