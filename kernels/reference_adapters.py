"""Products with LoRA adapters in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional


class AdapterOps:
    """Adapters (LoRA; runner/adapter_store.py has the picture): row b of `weights` [adapters, elements] holds one of
    rank ranks[b].
    """

    def assign_adapters(self, rows: Tensor, query_starts: Tensor, row_adapters: Tensor, token_adapters: Tensor) -> None:
        """token_adapters[t] = row_adapters[rows[s]] for the tokens t of each sequence s: [S], [S + 1], [R], [T]. A row
        of -1 is padding: -1.
        """
        which = torch.where(rows >= 0, row_adapters[rows.clamp(min=0)], -1)
        token_adapters.copy_(torch.repeat_interleave(which, query_starts.diff(), output_size=len(token_adapters)))

    def num_tiles(self, num_tokens: int, num_adapters: int) -> int:
        """Of group_tokens: here one an adapter; a kernel cuts smaller ones."""
        return num_adapters

    def num_splits(self, num_tokens: int, num_columns: int) -> int:
        """Parts in which adapter_shrink leaves its sums: here one."""
        return 1

    def group_tokens(self, token_adapters: Tensor, num_adapters: int, order: Tensor, tiles: Tensor) -> None:
        """order [T]: the tokens of adapter 0, then of adapter 1 ...; tiles [num_adapters, 3]: adapter, first place in
        order, number of tokens; -1: none.

        Tokens of adapter -1 are left out.
        """
        found = [torch.nonzero(token_adapters == adapter).squeeze(1) for adapter in range(num_adapters)]
        grouped = torch.cat(found)
        order[: len(grouped)] = grouped
        first = 0
        for adapter, tokens in enumerate(found):
            tiles[adapter] = torch.tensor([adapter if len(tokens) else -1, first, len(tokens)])
            first += len(tokens)

    def adapter_shrink(
        self,
        x: Tensor,
        weights: Tensor,
        ranks: Tensor,
        order: Tensor,
        tiles: Tensor,
        offset: int,
        num_parts: int,
        hidden: Tensor,
    ) -> None:
        """hidden[0, i, : parts r] = A x[order[i]] for the places i of each tile, A [parts r, K] lying r * offset
        elements from its adapter's beginning.

        x [T, K], hidden float32 [splits, T, parts * largest rank]: a kernel may leave the sum in as many parts, which
        count together.
        """
        hidden[1:] = 0
        for adapter, rank, first, tokens in _tiles(ranks, order, tiles):
            width = num_parts * rank
            a = weights[adapter, rank * offset : rank * offset + width * x.shape[1]].view(width, -1)
            hidden[0, first : first + len(tokens), :width] = functional.linear(x[tokens], a).float()

    def adapter_expand(
        self,
        hidden: Tensor,
        weights: Tensor,
        ranks: Tensor,
        order: Tensor,
        tiles: Tensor,
        offset: int,
        out_sizes: Sequence[int],
        out: Tensor,
    ) -> None:
        """out[order[i]] += B hidden[:, i].sum(0) for the places i of each tile, B [N, r] lying r * offset elements from
        its adapter's beginning.

        B's rows of part p are multiplied with the p-th r of hidden. out_sizes: rows of each part; out [T, N].
        """
        for adapter, rank, first, tokens in _tiles(ranks, order, tiles):
            b = weights[adapter, rank * offset : rank * (offset + out.shape[1])].view(-1, rank)
            places = hidden[:, first : first + len(tokens), : len(out_sizes) * rank].sum(0).to(out.dtype)
            parts = zip(places.split(rank, 1), b.split(list(out_sizes)), strict=True)
            out[tokens] += torch.cat([functional.linear(vectors, rows) for vectors, rows in parts], dim=1)


def _tiles(ranks: Tensor, order: Tensor, tiles: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """(adapter, rank, first place, tokens) of those that are tiles, with anything in their adapter slots. Asks the
    device: on CUDA the host waits.
    """
    known = ranks.tolist()
    for adapter, first, count in tiles.tolist():
        if adapter >= 0 and known[adapter]:
            yield adapter, known[adapter], first, order[first : first + count]
