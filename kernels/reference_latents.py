"""Attention over latents in plain torch (MLA; DeepSeek-V2, 2024, section 2.1): what a token keeps, absorbed queries,
and what heads make of their sums.

A token keeps R + E numbers in a layer, whatever the number of heads: a latent of R, of which every head would make its
key and its value by a matrix of its own, and a rotated key of E that all heads share. A head's score with a token is

    q . (key_weight latent) + e . key  =  (q key_weight) . latent + e . key

so that queries are multiplied with key_weight once, and heads then attend to what lies in the pages; and the weighted
sum of latents is multiplied with value_weight once, afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paged_kernels.norm_value import Norm
from paged_kernels.reference_layers import LayerOps

_SCORE_BYTES = 64 * 2**20  # of float32 scores at once


class LatentOps(LayerOps):
    """One layer's store of latents is `latent_pages` [num_pages, page_size, R + E]; N numbers of a query meet the
    latent, H heads.
    """

    def absorb_write_latents(
        self,
        q: Tensor,
        latents: Tensor,
        norm: Norm,
        key_weight: Tensor,
        rope_table: Tensor,
        positions: Tensor,
        latent_pages: Tensor,
        slot_mapping: Tensor,
        interleaved: bool,
    ) -> Tensor:
        """Norms the first R numbers of latents [T, R + E], rotates the others and stores both at their slots (-1: not);
        returns the absorbed queries [T, H, R + E] of q [T, H, N + E]: q's first N numbers times key_weight [H, N, R],
        and the others rotated.

        rope_table [max_len, E] and interleaved: as of apply_rope; slot_mapping: as of write_kv.
        """
        rank, rotary = key_weight.shape[2], rope_table.shape[1]
        queries = q.new_empty(*q.shape[:2], rank + rotary)
        of_latent, rotated = q.split([q.shape[2] - rotary, rotary], dim=2)
        queries[..., :rank] = self.multiply_heads(of_latent, key_weight.transpose(1, 2))
        queries[..., rank:] = self.apply_rope(rotated, rope_table, positions, interleaved)
        latent, key = latents.split([rank, rotary], dim=1)
        key = self.apply_rope(key[:, None], rope_table, positions, interleaved)[:, 0]
        stored = slot_mapping >= 0
        kept = torch.cat((self.norm(latent, norm), key), dim=1)[stored]
        latent_pages.view(-1, rank + rotary)[slot_mapping[stored].long()] = kept.to(latent_pages.dtype)
        return queries

    def multiply_heads(self, x: Tensor, weight: Tensor) -> Tensor:
        """[T, H, in], [H, out, in] -> [T, H, out]: each head by its own matrix, which may be strided."""
        return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)

    def latent_decode_attention(
        self, q: Tensor, latent_pages: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float, rank: int
    ) -> Tensor:
        """The newest token of each sequence attends to all of the sequence's. q [S, H, R + E], absorbed; page_table [S,
        P]; seq_lens [S] (0: an empty row, its result is 0) -> weighted sums of latents, [S, H, R]. Asks the device for
        the lengths.
        """
        lens = [(min(length, 1), length) for length in seq_lens.tolist()]
        filled = [row for row, (query_len, _) in enumerate(lens) if query_len]
        out = q.new_zeros(*q.shape[:2], rank)
        out[filled] = self.latent_prefill_attention(
            q[filled], latent_pages, page_table[filled], [lens[row] for row in filled], scale, rank
        )
        return out

    def latent_prefill_attention(
        self,
        q: Tensor,
        latent_pages: Tensor,
        page_table: Tensor,
        lens: Sequence[tuple[int, int]],
        scale: float,
        rank: int,
    ) -> Tensor:
        """The newest tokens of each sequence attend to the tokens before them and to themselves. q [T, H, R + E],
        absorbed, sequence after sequence; page_table [S, P]; lens: (query_len, seq_len) of each sequence, on the host
        -> weighted sums of latents, [T, H, R]. Latents of the query tokens are already in the store.
        """
        num_heads, page_size = q.shape[1], latent_pages.shape[1]
        out = q.new_empty(len(q), num_heads, rank)
        at = 0
        for pages, (query_len, seq_len) in zip(page_table, lens, strict=True):
            kept = latent_pages[pages[: -(-seq_len // page_size)].long()].flatten(0, 1)[:seq_len].float()
            rows = max(1, _SCORE_BYTES // (4 * num_heads * max(seq_len, 1)))
            for begin in range(0, query_len, rows):
                end = min(begin + rows, query_len)
                first = seq_len - query_len + begin  # the position of the first of these queries
                seen = first + end - begin  # by the last of them
                scores = q[at + begin : at + end].float() @ kept[:seen].T * scale
                hidden = torch.ones(end - begin, seen, dtype=torch.bool, device=q.device).triu(first + 1)
                weights = scores.masked_fill_(hidden[:, None], -torch.inf).softmax(-1)
                out[at + begin : at + end] = weights @ kept[:seen, :rank]
            at += query_len
        return out
