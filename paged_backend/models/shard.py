"""Tensor parallelism's division of a model: which part of each matrix a rank has (Megatron-LM, Shoeybi et al.,
2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
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

    def share(self, count: int, what: str, group: int = 1) -> Cut:
        """A rank's part of `count` rows. group: so many of them, one after another, stay together; where that rules
        equal parts out, some ranks have a group more than others.

        Raises:
            EngineError: a rank would have none, or there are no groups and no equal parts.
        """
        if count % (self.size * group) == 0 or group == 1:
            return even_cut(self, OUT, self.divide(count, what))
        num_groups = -(-count // group)
        if num_groups < self.size:
            raise EngineError(
                f"tensor_parallel_size: {self.size} ranks are too many for {what} ({count}), of which {group} stay "
                "together"
            )
        begin, end = (min(group * -(-rank * num_groups // self.size), count) for rank in (self.rank, self.rank + 1))
        return Cut(OUT, begin, end - begin, count)


@dataclass(frozen=True)
class Cut:
    """A rank's part of a tensor of the checkpoint: entries start … start + count of dimension `dim`, which has `whole`
    of them.
    """

    dim: int
    start: int
    count: int
    whole: int
    # further stretches of the same dimension, where a tensor holds several matrices: where each starts, and its count
    more: tuple[tuple[int, int], ...] = ()

    @property
    def stretches(self) -> tuple[tuple[int, int], ...]:
        """Where each stretch of the part starts and ends, in their order."""
        return tuple((start, start + count) for start, count in ((self.start, self.count), *self.more))

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor, or of a view of its file."""
        parts = [tensor[(slice(None),) * self.dim + (slice(*stretch),)] for stretch in self.stretches]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

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


def side_by_side(cuts: Sequence[Cut]) -> Cut:
    """The part of a tensor that has several matrices one after another, of each of which this is a rank's part."""
    first, offset, more = cuts[0], cuts[0].whole, []
    for cut in cuts[1:]:
        more.append((offset + cut.start, cut.count))
        offset += cut.whole
    return Cut(first.dim, first.start, first.count, offset, tuple(more))


def in_groups(cut: Cut, size: int) -> Cut:
    """The part of a tensor that has one entry for so many of the cut's; it begins and ends with groups."""
    begin, end = cut.start // size, -(-(cut.start + cut.count) // size)
    return Cut(cut.dim, begin, end - begin, -(-cut.whole // size))


def even_cut(shard: Shard, dim: int, count: int) -> Cut:
    """The part of a rank that has `count` entries of `dim`, as every other rank has."""
    return Cut(dim, shard.rank * count, count, shard.size * count)


def cuts_of_tensors(modules: Mapping[str, Cut]) -> dict[str, Cut]:
    """Cuts of matrices, by their modules' names -> those of the modules' tensors: a bias goes with the rows, and is
    whole where columns are cut.
    """
    weights = {f"{module}.weight": cut for module, cut in modules.items()}
    return weights | {f"{module}.bias": cut for module, cut in modules.items() if cut.dim == OUT}
