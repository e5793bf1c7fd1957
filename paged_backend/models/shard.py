"""Tensor parallelism's division of a model: which part of each matrix a rank has (Megatron-LM, Shoeybi et al.,
2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from paged_backend.errors import EngineError

OUT, IN = 0, 1  # dimensions of a matrix [out, in]


@dataclass(frozen=True)
class Shard:
    """One rank of those that share a model."""

    rank: int = 0
    size: int = 1  # ranks

    @property
    def first(self) -> bool:
        """The rank that adds what must be added once, such as the bias behind a sum over ranks."""
        return self.rank == 0

    def divide(self, count: int, what: str) -> int:
        """A rank's part of `count`, the same for every rank. what: as config.json calls it.

        Raises:
            EngineError: the ranks cannot have equal parts.
        """
        if count % self.size:
            raise EngineError(f"tensor_parallel_size: {self.size} ranks cannot have equal parts of {what} ({count})")
        return count // self.size


@dataclass(frozen=True)
class Cut:
    """A rank's part of a tensor of the checkpoint: entries start … start + count of dimension `dim`, which has `whole`
    of them.
    """

    dim: int
    start: int
    count: int
    whole: int

    @property
    def slices(self) -> tuple[slice, ...]:
        """An index of the tensor, or of a view of its file, that gives the part."""
        return (*(slice(None),) * self.dim, slice(self.start, self.start + self.count))

    def whole_shape(self, part: Tensor) -> list[int]:
        """The shape of the tensor that `part` is cut from."""
        return [self.whole if dim == self.dim else size for dim, size in enumerate(part.shape)]


def vocabulary_cut(shard: Shard, vocab_size: int) -> Cut:
    """Rows of the embedding and of the head. Every rank has room for as many rows; where the vocabulary does not
    divide, the last rank's are not all used.

    Raises:
        EngineError: a rank would have none.
    """
    rows = padded_rows(shard, vocab_size)
    start = shard.rank * rows
    if (shard.size - 1) * rows >= vocab_size:
        raise EngineError(f"tensor_parallel_size: {shard.size} ranks are too many for vocab_size {vocab_size}")
    return Cut(OUT, start, min(rows, vocab_size - start), vocab_size)


def padded_rows(shard: Shard, vocab_size: int) -> int:
    """Rows of the embedding that every rank has room for."""
    return -(-vocab_size // shard.size)


def even_cut(shard: Shard, dim: int, count: int) -> Cut:
    """The part of a rank that has `count` entries of `dim`, as every other rank has."""
    return Cut(dim, shard.rank * count, count, shard.size * count)


def cuts_of_tensors(modules: Mapping[str, Cut]) -> dict[str, Cut]:
    """Cuts of matrices, by their modules' names -> those of the modules' tensors: a bias goes with the rows, and is
    whole where columns are cut.
    """
    weights = {f"{module}.weight": cut for module, cut in modules.items()}
    return weights | {f"{module}.bias": cut for module, cut in modules.items() if cut.dim == OUT}
