"""The ops that meet other ranks (tensor parallelism), in plain torch: sums of partial products, the embedding, the
choice of tokens.

Each rank has a part of the vocabulary, and logits [M, L] of that part alone. The likeliest token of all is found by
exchanging one number a row: a *key*, int64, with the order of a score in its upper half and the complement of its token
in the lower, so that the greatest key is the best score's, and of equal scores the smallest token's. Logits themselves
are gathered only for what needs all of a row's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paged_kernels.experts import Experts
from paged_kernels.linear import Linear
from paged_kernels.norm_value import Norm
from paged_kernels.reference import Ops

_LAST_TOKEN = 2**31 - 1


class Ranks:
    """What the ranks of a model do together, each in its own process: all call the same operations in the same order,
    and get equal bits. This base is one rank alone; an implementation overrides everything.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, contiguous, which it is written over with."""
        return x

    def add_sum(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + the sum of every rank's x, of one shape, both contiguous and perhaps written over."""
        return residual.add_(self.sum(x))

    def maximum(self, x: Tensor) -> Tensor:
        """The greatest of every rank's x, entry by entry; x, int64 and contiguous, is written over with it."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x, contiguous: [size, *x.shape]."""
        return x[None]

    def share_memory(self, capacity: int, dtype: torch.dtype, device: torch.device) -> str:
        """From now on sums of up to `capacity` numbers of that type go through memory that all ranks' GPUs read, if
        they can. Returns a sentence on it.
        """
        return "one rank has nothing to sum"

    def tell_all(self, sentence: str) -> list[str]:
        """What every rank says, once all have; on the host, for a start."""
        return [sentence]


@dataclass(frozen=True)
class VocabularyPart:
    """The tokens first … first + count of a vocabulary of `whole` are this rank's; logits have `width` columns on every
    rank, those beyond count belong to no token.
    """

    first: int
    count: int
    width: int
    whole: int


class RankOps(Ops):
    """Ops of one rank of several. `super()` is the reference, or the kernels of cuda_rank_ops.py: here is only what
    ranks have to do with each other.
    """

    def __init__(self, ranks: Ranks, vocabulary: VocabularyPart) -> None:
        self._ranks, self._vocabulary = ranks, vocabulary

    def embedding(self, token_ids: Tensor, table: Tensor, multiplier: float = 1.0) -> Tensor:
        """Ids of the whole vocabulary, this rank's rows of the table: [T], [width, hidden] -> [T, hidden]. One rank
        adds a row, the others zeros.
        """
        at = token_ids.long() - self._vocabulary.first
        mine = (at >= 0) & (at < self._vocabulary.count)
        rows = super().embedding(torch.where(mine, at, 0), table, multiplier)
        return self._ranks.sum(rows.masked_fill_(~mine[:, None], 0))

    def share_of_linear(self, x: Tensor, linear: Linear) -> Tensor:
        return super().linear(x, linear)

    def sum_shares(self, x: Tensor) -> Tensor:
        return self._ranks.sum(x)

    def add_shares(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._ranks.add_sum(x, residual)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        product = super().linear(x, linear)
        return self._ranks.sum(product) if linear.partial else product

    def add_linear(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        return (
            self._ranks.add_sum(super().linear(x, linear), residual)
            if linear.partial
            else super().add_linear(x, linear, residual)
        )

    def add_experts(self, x: Tensor, expert_ids: Tensor, weights: Tensor, experts: Experts, residual: Tensor) -> Tensor:
        if not experts.partial:
            return super().add_experts(x, expert_ids, weights, experts, residual)
        return self._ranks.add_sum(
            super().add_experts(x, expert_ids, weights, experts, torch.zeros_like(residual)), residual
        )

    def norm_add_experts(self, x: Tensor, norm: Norm | None, experts: Experts) -> Tensor:
        """Every rank routes: the router is whole and x the same, so all choose the same experts."""
        if not experts.partial:
            return super().norm_add_experts(x, norm, experts)
        normed = x if norm is None else self.norm(x, norm)
        return self.add_experts(normed, *self.route(normed, experts), experts, x)

    # ---- attention: a norm of all heads together is of all ranks' heads

    def rope_write_kv(
        self,
        qkv: Tensor,
        num_heads: int,
        qk_norm: tuple[Norm, Norm] | None,
        rope_table: Tensor | None,
        positions: Tensor,
        kv_pages: Tensor,
        slot_mapping: Tensor,
        interleaved: bool = False,
        query_factors: Tensor | None = None,
    ) -> Tensor:
        """Where a norm is partial, qkv is written over."""
        if qk_norm is not None and qk_norm[0].partial:
            squares = self.mean_squares(qkv, (len(qk_norm[0].weight), len(qk_norm[1].weight)))
            # every rank has as many numbers, and every KV head is on as many ranks
            qkv, qk_norm = self.norm_parts(qkv, qk_norm, self._ranks.sum(squares) / self._ranks.size), None
        where = positions, kv_pages, slot_mapping
        return super().rope_write_kv(qkv, num_heads, qk_norm, rope_table, *where, interleaved, query_factors)

    def mean_squares(self, x: Tensor, sizes: tuple[int, int]) -> Tensor:
        """Of the first sizes[0] numbers of each row and of the next sizes[1]: [T, n] -> float32 [T, 2]."""
        parts = x[:, : sum(sizes)].float().square().split(sizes, dim=1)
        return torch.stack([part.mean(1) for part in parts], 1)

    def norm_parts(self, x: Tensor, norms: tuple[Norm, Norm], mean_squares: Tensor) -> Tensor:
        """x [T, n], written over: its first numbers after the first norm, the next ones after the second, by mean
        squares [T, 2] that are given. Rounded as `norm` does it.
        """
        begin = 0
        for norm, mean_square in zip(norms, mean_squares.unbind(1), strict=True):
            assert norm.is_plain, "no family has another norm of all heads together"
            part = x[:, begin : begin + len(norm.weight)]
            part.copy_(norm.weight * (part.float() * torch.rsqrt(mean_square[:, None] + norm.eps)).to(x.dtype))
            begin += len(norm.weight)
        return x

    # ---- sampling: logits are this rank's part of the vocabulary, or what gather_logits made of them

    def gather_logits(self, logits: Tensor) -> Tensor:
        return torch.cat(tuple(self._ranks.gather(logits.contiguous())), dim=1)[:, : self._vocabulary.whole]

    def argmax(self, logits: Tensor) -> Tensor:
        if self._is_whole(logits):
            return super().argmax(logits)
        return tokens_of(self._ranks.maximum(self.best_keys(logits)))

    def choose(
        self,
        logits: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        positions: Tensor,
        rows: Tensor,
        truncation: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """A truncation needs gathered logits."""
        if self._is_whole(logits):
            return super().choose(logits, temperature, seeds, positions, rows, truncation)
        assert truncation is None, "what may be drawn depends on all logits of a row"
        return tokens_of(self._ranks.maximum(self.best_draw_keys(logits, temperature, seeds, positions, rows)))

    def best_keys(self, logits: Tensor) -> Tensor:
        """[M, width] -> [M] int64: the key of the likeliest of this rank's tokens."""
        mine = logits[:, : self._vocabulary.count]
        ids = mine.argmax(-1)
        return keys_of(mine.gather(1, ids[:, None]).squeeze(1).float(), ids + self._vocabulary.first)

    def best_draw_keys(
        self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, rows: Tensor
    ) -> Tensor:
        """[M, width] -> [M] int64: the key of the first of this rank's tokens in the race of `reference.sample`, or of
        the likeliest at temperature 0.
        """
        mine = logits[:, : self._vocabulary.count].float()
        heat = temperature[rows]
        draws = heat > 0
        cooled = self.apply_temperature(mine, torch.where(draws, heat, 1.0))
        scores = torch.where(draws[:, None], self.race(cooled, seeds[rows], positions, self._vocabulary.first), mine)
        best = scores.max(-1)
        return keys_of(best.values, best.indices + self._vocabulary.first)

    def _is_whole(self, logits: Tensor) -> bool:
        return logits.shape[1] == self._vocabulary.whole


def keys_of(scores: Tensor, token_ids: Tensor) -> Tensor:
    """float32 [M], integers [M] -> int64 [M]."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: the zeros of both signs are equal scores
    order = bits ^ (bits >> 31 & _LAST_TOKEN)
    return order.long() << 32 | _LAST_TOKEN - token_ids.long()


def tokens_of(keys: Tensor) -> Tensor:
    """int64 [M] -> int64 [M]."""
    return _LAST_TOKEN - (keys & _LAST_TOKEN)
