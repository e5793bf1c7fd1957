"""Products with LoRA adapters in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional


class AdapterOps:
    """Adapters (LoRA; runner/adapter_store.py has the picture): row b of `weights` [berths, elements] holds one of rank ranks[b]."""

    def assign_adapters(self, rows: Tensor, query_starts: Tensor, row_berths: Tensor, token_berths: Tensor) -> None:
        """token_berths[t] = row_berths[rows[s]] for the tokens t of each sequence s: [S], [S + 1], [R], [T]. A row of -1 is padding: -1."""
        which = torch.where(rows >= 0, row_berths[rows.clamp(min=0)], -1)
        token_berths.copy_(torch.repeat_interleave(which, query_starts.diff(), output_size=len(token_berths)))

    def num_tiles(self, num_tokens: int, num_berths: int) -> int:
        """Of group_tokens: here one a berth; a kernel cuts smaller ones."""
        return num_berths

    def num_splits(self, num_tokens: int, num_columns: int) -> int:
        """Parts in which adapter_shrink leaves its sums: here one."""
        return 1

    def group_tokens(self, token_berths: Tensor, num_berths: int, order: Tensor, tiles: Tensor) -> None:
        """order [T]: the tokens of berth 0, then of berth 1 ...; tiles [num_berths, 3]: berth, first place in order, number of tokens; berth -1: none.

        Tokens of berth -1 are left out.
        """
        found = [torch.nonzero(token_berths == berth).squeeze(1) for berth in range(num_berths)]
        grouped = torch.cat(found)
        order[: len(grouped)] = grouped
        first = 0
        for berth, tokens in enumerate(found):
            tiles[berth] = torch.tensor([berth if len(tokens) else -1, first, len(tokens)])
            first += len(tokens)

    def adapter_shrink(self, x: Tensor, weights: Tensor, ranks: Tensor, order: Tensor, tiles: Tensor, offset: int, num_parts: int, hidden: Tensor) -> None:
        """hidden[0, i, : parts r] = A x[order[i]] for the places i of each tile, A [parts r, K] lying r * offset elements from its berth's beginning.

        x [T, K], hidden float32 [splits, T, parts * largest rank]: a kernel may leave the sum in as many parts, which count together.
        """
        hidden[1:] = 0
        for berth, rank, first, tokens in _tiles(ranks, order, tiles):
            width = num_parts * rank
            a = weights[berth, rank * offset : rank * offset + width * x.shape[1]].view(width, -1)
            hidden[0, first : first + len(tokens), :width] = functional.linear(x[tokens], a).float()

    def adapter_expand(
        self, hidden: Tensor, weights: Tensor, ranks: Tensor, order: Tensor, tiles: Tensor, offset: int, out_sizes: Sequence[int], out: Tensor
    ) -> None:
        """out[order[i]] += B hidden[:, i].sum(0) for the places i of each tile, B [N, r] lying r * offset elements from its berth's beginning.

        B's rows of part p are multiplied with the p-th r of hidden. out_sizes: rows of each part; out [T, N].
        """
        for berth, rank, first, tokens in _tiles(ranks, order, tiles):
            b = weights[berth, rank * offset : rank * (offset + out.shape[1])].view(-1, rank)
            places = hidden[:, first : first + len(tokens), : len(out_sizes) * rank].sum(0).to(out.dtype)
            parts = zip(places.split(rank, 1), b.split(list(out_sizes)), strict=True)
            out[tokens] += torch.cat([functional.linear(vectors, rows) for vectors, rows in parts], dim=1)


def _tiles(ranks: Tensor, order: Tensor, tiles: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """(berth, rank, first place, tokens) of those that are tiles, with anything in their berths. Asks the device: on CUDA the host waits."""
    known = ranks.tolist()
    for berth, first, count in tiles.tolist():
        if berth >= 0 and known[berth]:
            yield berth, known[berth], first, order[first : first + count]
