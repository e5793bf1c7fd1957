"""The ops of one rank of several, by kernels: those of cuda_ops.py, and the exchange of rank_ops.py with its keys from
one launch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from paged_kernels import norm_shares
from paged_kernels.cuda_ops import CudaOps
from paged_kernels.norm_value import Norm
from paged_kernels.rank_ops import RankOps, Ranks, VocabularyPart
from paged_kernels.shard_sampling import best_draw_keys, best_keys


class CudaRankOps(RankOps, CudaOps):
    """Gathered logits go through CudaOps, which is made for the whole vocabulary."""

    def __init__(self, ranks: Ranks, vocabulary: VocabularyPart, **of_cuda_ops: Any) -> None:
        """of_cuda_ops: the arguments of CudaOps."""
        CudaOps.__init__(self, **of_cuda_ops)
        RankOps.__init__(self, ranks, vocabulary)

    def mean_squares(self, x: Tensor, sizes: tuple[int, int]) -> Tensor:
        return norm_shares.mean_squares(x, sizes, launch_pdl=self._pdl)

    def norm_parts(self, x: Tensor, norms: tuple[Norm, Norm], mean_squares: Tensor) -> Tensor:
        return norm_shares.norm_parts(x, norms, mean_squares, launch_pdl=self._pdl)

    def best_keys(self, logits: Tensor) -> Tensor:
        return best_keys(logits[:, : self._vocabulary.count], self._vocabulary.first)

    def best_draw_keys(
        self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, rows: Tensor
    ) -> Tensor:
        """Rows of -1 are padding: their key stands for no token."""
        return best_draw_keys(
            logits[:, : self._vocabulary.count], self._vocabulary.first, temperature, seeds, positions, rows
        )
