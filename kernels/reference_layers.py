"""A decoder's layers in plain torch: products, norms, positions, the KV store, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from paged_kernels.codes import dequantise, rounded
from paged_kernels.linear import PLAIN, Linear

_GATHER_BYTES = 64 * 2**20  # of K and V that decode attention has in hand at once
_LARGEST_TILE = 64  # tokens


class LayerOps:
    """What a layer of the decoder computes, and the KV store it writes and reads."""

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """[T] ids, [V, hidden] -> [T, hidden]."""
        return functional.embedding(token_ids, table)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """[T, in] -> [T, out]. A quantised weight is dequantised and multiplied in float32; activations are rounded first where its format says so."""
        if linear.format == PLAIN:
            return functional.linear(x, linear.weight, linear.bias)
        if linear.format.codes == "plain":
            return functional.linear(rounded(x, linear).to(x.dtype), linear.weight, linear.bias)
        bias = None if linear.bias is None else linear.bias.float()
        return functional.linear(rounded(x, linear).float(), dequantise(linear), bias).to(x.dtype)

    def norm_linear(self, x: Tensor, norm_weight: Tensor, eps: float, linear: Linear, out: Tensor | None = None) -> Tensor:
        """linear(rms_norm(x)): [T, in], [in] -> [T, out]."""
        result = self.linear(self.rms_norm(x, norm_weight, eps), linear)
        return result if out is None else out.copy_(result)

    def norm_gated_linear(self, x: Tensor, norm_weight: Tensor, eps: float, linear: Linear) -> Tensor:
        """silu_mul(norm_linear(x)): [T, in], [in], a linear of 2 out rows -> [T, out]."""
        return self.silu_mul(self.norm_linear(x, norm_weight, eps, linear))

    def add_linear(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        """residual + linear(x): [T, in], [T, out] -> [T, out]. A kernel may write over residual."""
        return residual + self.linear(x, linear)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., n], [n] -> [..., n]: x / sqrt(mean(x²) + eps) in float32, back in x's type, times weight (Zhang and Sennrich, 2019)."""
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 n] -> [T, n]: silu(first half) * second half (SwiGLU, Shazeer, 2020)."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def apply_rope(self, x: Tensor, rope_table: Tensor, positions: Tensor) -> Tensor:
        """Rotates [T, heads, D] by position; rope_table is [max_len, D] float32: cosines in the first half of a row, sines in the second.

        Pairs are (i, i + D/2), as in Hugging Face checkpoints (Su et al., 2021). Computed in float32, returned in x's type.
        """
        cos, sin = rope_table[positions][:, None].chunk(2, dim=-1)
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    def write_kv(self, k: Tensor, v: Tensor, kv_pages: Tensor, slot_mapping: Tensor) -> None:
        """Stores k and v [T, num_kv_heads, D] at their slots: `page_id * page_size + offset`, -1 for padding, which is not stored."""
        page_size = kv_pages.shape[3]
        stored = slot_mapping >= 0
        slots = slot_mapping[stored].long()
        pages, offsets = slots // page_size, slots % page_size
        for side, x in enumerate((k, v)):
            _bits(kv_pages)[pages, side, :, offsets] = _bits(as_stored(x[stored], kv_pages.dtype))

    def copy_pages(self, kv_pages: Sequence[Tensor], copies: Tensor) -> None:
        """Page copies[i, 1] becomes a copy of page copies[i, 0] in every layer, [num_pages, ...] each.

        copies [k, 2]: no page is written twice, or read and written.
        """
        sources, targets = copies.long().T
        for layer in map(_bits, kv_pages):
            layer[targets] = layer[sources]

    def rope_write_kv(
        self,
        qkv: Tensor,
        num_heads: int,
        qk_norm: tuple[Tensor, Tensor, float] | None,
        rope_table: Tensor,
        positions: Tensor,
        kv_pages: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """Splits qkv [T, (num_heads + 2 num_kv_heads) D] into heads, norms q and k (weight of q [D], of k [D], eps) if asked to,
        rotates them, stores k and v, returns q [T, num_heads, D]."""
        num_kv_heads, head_dim = kv_pages.shape[2], kv_pages.shape[4]
        q, k, v = qkv.view(len(qkv), -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if qk_norm is not None:
            q_weight, k_weight, eps = qk_norm
            q, k = self.rms_norm(q, q_weight, eps), self.rms_norm(k, k_weight, eps)
        self.write_kv(self.apply_rope(k, rope_table, positions), v, kv_pages, slot_mapping)
        return self.apply_rope(q, rope_table, positions)

    def plan_attention(self, seq_lens: Tensor, query_starts: Tensor, num_decodes: int, max_query_len: int) -> None:
        """Called once a step, before its first attention: kernels share out the work here, plain torch needs no plan.

        seq_lens [S] and query_starts [S + 1] of all sequences, the first num_decodes of which have one query; max_query_len: longest of the others.
        """

    def decode_attention(
        self, q: Tensor, kv_pages: Tensor, page_table: Tensor, seq_lens: Tensor, max_seq_len: int, scale: float, sliding_window: int | None = None
    ) -> Tensor:
        """The newest token of each sequence attends to the sequence's last `sliding_window` tokens (None: to all), itself included.

        q [S, num_heads, D]; page_table [S, P]; seq_lens [S] (0: an empty row, its result is 0); max_seq_len >= every length -> [S, num_heads, D].
        Goes along the context in chunks of all sequences that reach that far and merges them by running maximum and sum (Milakov and Gimelshein, 2018),
        so that no more than _GATHER_BYTES of K and V are gathered at once. Asks the device which sequences reach a chunk: on CUDA the host waits.
        """
        num_sequences, num_heads, head_dim = q.shape
        num_kv_heads = kv_pages.shape[2]
        queries = q.float().view(num_sequences, num_kv_heads, -1, head_dim) * scale
        seq_lens = seq_lens.long()
        firsts = torch.zeros_like(seq_lens) if sliding_window is None else (seq_lens - sliding_window).clamp(min=0)
        top = queries.new_full((*queries.shape[:3], 1), -torch.inf)
        mass, acc = torch.zeros_like(top), torch.zeros_like(queries)
        tile = math.gcd(kv_pages.shape[3], _LARGEST_TILE)
        chunk = max(_GATHER_BYTES // (8 * num_sequences * num_kv_heads * head_dim) // tile, 1) * tile
        for begin in range(0, max_seq_len, chunk):
            end = min(begin + chunk, -(-max_seq_len // tile) * tile)
            live = torch.nonzero((seq_lens > begin) & (firsts < end)).squeeze(1)
            if len(live) == 0:
                continue
            positions = torch.arange(begin, end, device=q.device)
            hidden = (positions >= seq_lens[live, None]) | (positions < firsts[live, None])
            k, v = _gather(kv_pages, page_table[live], begin, end, tile)
            v.transpose(1, 2)[hidden] = 0  # 0 * NaN is NaN: what another sequence left in a slot must not matter
            scores = (queries[live] @ k.transpose(-1, -2)).masked_fill_(hidden[:, None, None, :], -torch.inf)
            new_top = torch.maximum(top[live], scores.amax(-1, keepdim=True))
            weights = torch.exp(scores - new_top)
            decay = torch.exp(top[live] - new_top)
            mass[live] = mass[live] * decay + weights.sum(-1, keepdim=True)
            acc[live] = acc[live] * decay + weights @ v
            top[live] = new_top
        return (acc / torch.where(mass > 0, mass, 1)).view(num_sequences, num_heads, head_dim).to(q.dtype)

    def prefill_attention(
        self, q: Tensor, kv_pages: Tensor, page_table: Tensor, lens: Sequence[tuple[int, int]], scale: float, sliding_window: int | None = None
    ) -> Tensor:
        """The newest tokens of each sequence attend to the tokens before them, at most the last `sliding_window`, and to themselves.

        q [T, num_heads, D], sequence after sequence; page_table [S, P]; lens: (query_len, seq_len) of each sequence, on the host -> [T, num_heads, D].
        K and V of the query tokens are already in the store.
        """
        num_heads, head_dim = q.shape[1:]
        num_kv_heads = kv_pages.shape[2]
        tile = math.gcd(kv_pages.shape[3], _LARGEST_TILE)
        out = torch.empty_like(q)
        at = 0
        for index, (query_len, seq_len) in enumerate(lens):
            start = seq_len - query_len
            begin = 0 if sliding_window is None else max(start + 1 - sliding_window, 0) // tile * tile
            k, v = (x[0, :, : seq_len - begin] for x in _gather(kv_pages, page_table[index : index + 1], begin, -(-seq_len // tile) * tile, tile))
            queries = q[at : at + query_len].float().view(query_len, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
            shape = (num_kv_heads, queries.shape[1], seq_len - begin, head_dim)
            query_at = torch.arange(start, seq_len, device=q.device)[:, None]
            key_at = torch.arange(begin, seq_len, device=q.device)
            visible = key_at <= query_at
            if sliding_window is not None:
                visible &= key_at > query_at - sliding_window
            result = functional.scaled_dot_product_attention(queries, k[:, None].expand(shape), v[:, None].expand(shape), attn_mask=visible, scale=scale)
            out[at : at + query_len] = result.permute(2, 0, 1, 3).reshape(query_len, num_heads, head_dim).to(q.dtype)
            at += query_len
        return out


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the KV store's type. float8_e4m3fn has no infinity: what is beyond its greatest number becomes that (OCP 8-bit floating point, 2023)."""
    greatest = torch.finfo(dtype).max
    return x.clamp(-greatest, greatest).to(dtype) if dtype == torch.float8_e4m3fn else x.to(dtype)


def _bits(x: Tensor) -> Tensor:
    """The same memory as bytes where torch cannot index the type."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _gather(kv_pages: Tensor, page_table: Tensor, begin: int, end: int, tile: int) -> tuple[Tensor, Tensor]:
    """K and V of positions [begin, end), multiples of `tile`, which divides the page size: twice [S, num_kv_heads, end - begin, D] float32."""
    _, _, num_kv_heads, page_size, head_dim = kv_pages.shape
    tiles_per_page = page_size // tile
    tiles = torch.arange(begin // tile, end // tile, device=page_table.device)
    pages = page_table[:, tiles // tiles_per_page].long()
    heads = torch.arange(num_kv_heads, device=page_table.device)
    rows = ((pages * 2 * num_kv_heads)[:, None] + heads[:, None]) * tiles_per_page + tiles % tiles_per_page
    flat = _bits(kv_pages).view(-1, tile * head_dim)
    shape = (len(page_table), num_kv_heads, end - begin, head_dim)
    k = flat.index_select(0, rows.flatten()).view(kv_pages.dtype).view(shape)
    v = flat.index_select(0, rows.flatten() + num_kv_heads * tiles_per_page).view(kv_pages.dtype).view(shape)
    return k.float(), v.float()
