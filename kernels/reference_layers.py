"""A decoder's layers in plain torch: products, norms, positions, the KV store, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from paged_kernels.codes import dequantise, rounded
from paged_kernels.linear import PLAIN, Linear
from paged_kernels.lone_token import HeadRules, LoneToken
from paged_kernels.norm_value import Norm

ACTIVATIONS = {
    "silu": functional.silu,  # x / (1 + exp(-x)) (Elfwing et al., 2018)
    "gelu": functional.gelu,  # x times the normal distribution's mass below x (Hendrycks and Gimpel, 2016)
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),  # the same by their formula with tanh
    "relu2": lambda x: functional.relu(x).square(),  # So et al., 2021
}
_GATHER_BYTES = 64 * 2**20  # of K and V that decode attention has in hand at once
_LARGEST_TILE = 64  # tokens


class LayerOps:
    """What a layer of the decoder computes, and the KV store it writes and reads."""

    def embedding(self, token_ids: Tensor, table: Tensor, multiplier: float = 1.0) -> Tensor:
        """[T] ids, [V, hidden] -> [T, hidden], times the multiplier."""
        x = functional.embedding(token_ids, table)
        return x if multiplier == 1 else x * multiplier

    def share_of_linear(self, x: Tensor, linear: Linear) -> Tensor:
        """A rank's part of a sum over ranks (`linear.partial`); something may be added before it is summed."""
        return self.linear(x, linear)

    def sum_shares(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, which may be written over."""
        return x

    def add_shares(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + the sum of every rank's x; both may be written over."""
        return residual.add_(x)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """[T, in] -> [T, out]. A quantised weight is dequantised and multiplied in float32; activations are rounded
        first where its format says so.
        """
        if linear.format == PLAIN:
            return functional.linear(x, linear.weight, linear.bias)
        if linear.format.codes == "plain":
            return functional.linear(rounded(x, linear).to(x.dtype), linear.weight, linear.bias)
        bias = None if linear.bias is None else linear.bias.float()
        return functional.linear(rounded(x, linear).float(), dequantise(linear), bias).to(x.dtype)

    def norm_linear(self, x: Tensor, norm: Norm | None, linear: Linear, out: Tensor | None = None) -> Tensor:
        """linear(norm(x)): [T, in] -> [T, out]; None: no norm."""
        result = self.linear(x if norm is None else self.norm(x, norm), linear)
        return result if out is None else out.copy_(result)

    def norm_gated_linear(self, x: Tensor, norm: Norm | None, linear: Linear, activation: str = "silu") -> Tensor:
        """gate(norm_linear(x)): [T, in], a linear of 2 out rows -> [T, out]."""
        return self.gate(self.norm_linear(x, norm, linear), activation)

    def norm_active_linear(self, x: Tensor, norm: Norm | None, linear: Linear, activation: str) -> Tensor:
        """activation(norm_linear(x)): [T, in] -> [T, out]."""
        return self.activate(self.norm_linear(x, norm, linear), activation)

    def add_linear(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        """residual + linear(x): [T, in], [T, out] -> [T, out]. A kernel may write over residual."""
        return residual + self.linear(x, linear)

    def add_scaled(self, residual: Tensor, x: Tensor, norm: Norm | None, multiplier: float) -> Tensor:
        """residual + multiplier * norm(x): [T, n], [T, n] -> [T, n]; None: no norm. A kernel may write over
        residual.
        """
        return residual + multiplier * (x if norm is None else self.norm(x, norm))

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """[..., n] -> [..., n]. Computed in float32; only a plain RMS norm is rounded to x's type before its weight
        comes in, as Llama's is.
        """
        wide = x.float()
        if norm.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
        if norm.is_plain:
            return norm.weight * wide.to(x.dtype)
        wide = wide * (norm.weight.float() + (1.0 if norm.plus_one else 0.0))
        return (wide if norm.bias is None else wide + norm.bias.float()).to(x.dtype)

    def gate(self, gate_up: Tensor, activation: str = "silu") -> Tensor:
        """[T, 2 n] -> [T, n]: activation(first half) * second half (GLU variants, Shazeer, 2020)."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activate(gate, activation) * up

    def activate(self, x: Tensor, activation: str) -> Tensor:
        """ACTIVATIONS[activation] of every number."""
        return ACTIVATIONS[activation](x)

    def scale_logits(self, logits: Tensor, multiplier: float, soft_cap: float | None) -> Tensor:
        """logits, written over with cap(multiplier * logits), where cap(x) = soft_cap * tanh(x / soft_cap), or x if it
        is None.
        """
        scaled = logits.float() * multiplier
        return logits.copy_(scaled if soft_cap is None else soft_cap * torch.tanh(scaled / soft_cap))

    def apply_rope(self, x: Tensor, rope_table: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
        """Rotates the first R numbers of [T, heads, D] by position; rope_table is [max_len, R] float32: cosines in the
        first half of a row, then sines.

        Pairs are (i, i + R/2), as in most Hugging Face checkpoints, or (2 i, 2 i + 1) if interleaved (Su et al., 2021).
        Computed in float32, returned in x's type.
        """
        cos, sin = rope_table[positions][:, None].chunk(2, dim=-1)
        rotated, rest = x.split([rope_table.shape[1], x.shape[-1] - rope_table.shape[1]], dim=-1)
        pairs = rotated.float().unflatten(-1, (-1, 2)).unbind(-1) if interleaved else rotated.float().chunk(2, dim=-1)
        first, second = pairs
        turned = (first * cos - second * sin, second * cos + first * sin)
        joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
        return torch.cat((joined.to(x.dtype), rest), dim=-1)

    def write_kv(self, k: Tensor, v: Tensor, kv_pages: Tensor, slot_mapping: Tensor) -> None:
        """Stores k and v [T, num_kv_heads, D] at their slots: `page_id * page_size + offset`, -1 for padding, which is
        not stored.
        """
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
        qk_norm: tuple[Norm, Norm] | None,
        rope_table: Tensor | None,
        positions: Tensor,
        kv_pages: Tensor,
        slot_mapping: Tensor,
        interleaved: bool = False,
        query_factors: Tensor | None = None,
    ) -> Tensor:
        """Splits qkv [T, (num_heads + 2 num_kv_heads) D] into heads, norms q and k if asked to, rotates them
        (rope_table None: not), multiplies q by query_factors[position] (float32 [max_len]; None: not), stores k and v,
        returns q [T, num_heads, D].

        A norm whose weight has D numbers is of each head; of more, of all heads of q or k together.
        """
        num_kv_heads, head_dim = kv_pages.shape[2], kv_pages.shape[4]
        q, k, v = qkv.view(len(qkv), -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if qk_norm is not None:
            q, k = (
                self.norm(x if len(norm.weight) == head_dim else x.flatten(1), norm).view(x.shape)
                for x, norm in zip((q, k), qk_norm, strict=True)
            )
        if rope_table is not None:
            q, k = (self.apply_rope(x, rope_table, positions, interleaved) for x in (q, k))
        if query_factors is not None:
            q = (q.float() * query_factors[positions][:, None, None]).to(q.dtype)
        self.write_kv(k, v, kv_pages, slot_mapping)
        return q.contiguous()

    def plan_attention(
        self,
        seq_lens: Tensor,
        query_starts: Tensor,
        num_decodes: int,
        max_query_len: int,
        drafting_rows: Tensor | None = None,
    ) -> None:
        """Called once a step, before its first attention: kernels share out the work here, plain torch needs no plan.

        seq_lens [S] and query_starts [S + 1] of all sequences, the first num_decodes of which have one query;
        max_query_len: longest of the others. drafting_rows: int32 [num_decodes], given where some of those are drafts:
        which row each is of. Neighbours of one row are its newest tokens, each a token longer than the one before, and
        may be computed together; -1 is padding.
        """

    def decode_attention(
        self,
        q: Tensor,
        kv_pages: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        max_seq_len: int,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """The newest token of each sequence attends to the sequence's last `sliding_window` tokens (None: to all),
        itself included.

        Scores become soft_cap * tanh(score / soft_cap) if it is given; sinks [num_heads]: a score more for each head,
        of a token without a value. q [S, num_heads, D]; page_table [S, P]; seq_lens [S] (0: an empty row, its result is
        0); max_seq_len >= every length -> [S, num_heads, D]. Goes along the context in chunks of all sequences that
        reach that far and merges them by running maximum and sum (Milakov and Gimelshein, 2018), so that no more than
        _GATHER_BYTES of K and V are gathered at once. Asks the device which sequences reach a chunk: on CUDA the host
        waits.
        """
        num_sequences, num_heads, head_dim = q.shape
        num_kv_heads = kv_pages.shape[2]
        queries = q.float().view(num_sequences, num_kv_heads, -1, head_dim) * scale
        seq_lens = seq_lens.long()
        firsts = torch.zeros_like(seq_lens) if sliding_window is None else (seq_lens - sliding_window).clamp(min=0)
        top = queries.new_full((*queries.shape[:3], 1), -torch.inf)
        mass, acc = torch.zeros_like(top), torch.zeros_like(queries)
        if sinks is not None:
            top[:] = sinks.float().view(num_kv_heads, -1, 1)
            mass[:] = 1
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
            scores = _capped(queries[live] @ k.transpose(-1, -2), soft_cap).masked_fill_(
                hidden[:, None, None, :], -torch.inf
            )
            new_top = torch.maximum(top[live], scores.amax(-1, keepdim=True))
            weights = torch.exp(scores - new_top)
            decay = torch.exp(top[live] - new_top)
            mass[live] = mass[live] * decay + weights.sum(-1, keepdim=True)
            acc[live] = acc[live] * decay + weights @ v
            top[live] = new_top
        return (acc / torch.where(mass > 0, mass, 1)).view(num_sequences, num_heads, head_dim).to(q.dtype)

    def lone_attention(
        self,
        qkv: Tensor,
        heads: HeadRules,
        kv_pages: Tensor,
        at: LoneToken,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Of a step with one decode and nothing else: rope_write_kv, then decode_attention. qkv [1, (num_heads + 2
        num_kv_heads) D] -> [1, num_heads, D].
        """
        where = at.position, kv_pages, at.slot
        q = self.rope_write_kv(
            qkv, heads.num_heads, heads.qk_norm, heads.rope_table, *where, heads.interleaved, heads.query_factors
        )
        options = scale, sliding_window, soft_cap, sinks
        return self.decode_attention(q, kv_pages, at.page_table, at.seq_len, at.max_seq_len, *options)

    def prefill_attention(
        self,
        q: Tensor,
        kv_pages: Tensor,
        page_table: Tensor,
        lens: Sequence[tuple[int, int]],
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """The newest tokens of each sequence attend to the tokens before them, at most the last `sliding_window`, and
        to themselves.

        soft_cap and sinks: as of decode_attention.
        q [T, num_heads, D], sequence after sequence; page_table [S, P]; lens: (query_len, seq_len) of each sequence, on
        the host -> [T, num_heads, D]. K and V of the query tokens are already in the store.
        """
        num_heads, head_dim = q.shape[1:]
        num_kv_heads = kv_pages.shape[2]
        tile = math.gcd(kv_pages.shape[3], _LARGEST_TILE)
        out = torch.empty_like(q)
        at = 0
        for index, (query_len, seq_len) in enumerate(lens):
            start = seq_len - query_len
            begin = 0 if sliding_window is None else max(start + 1 - sliding_window, 0) // tile * tile
            k, v = (
                x[0, :, : seq_len - begin]
                for x in _gather(kv_pages, page_table[index : index + 1], begin, -(-seq_len // tile) * tile, tile)
            )
            queries = q[at : at + query_len].float().view(query_len, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
            query_at = torch.arange(start, seq_len, device=q.device)[:, None]
            key_at = torch.arange(begin, seq_len, device=q.device)
            visible = key_at <= query_at
            if sliding_window is not None:
                visible &= key_at > query_at - sliding_window
            if soft_cap is None and sinks is None:
                shape = (num_kv_heads, queries.shape[1], seq_len - begin, head_dim)
                result = functional.scaled_dot_product_attention(
                    queries, k[:, None].expand(shape), v[:, None].expand(shape), attn_mask=visible, scale=scale
                )
            else:
                result = _attend(queries * scale, k[:, None], v[:, None], visible, soft_cap, sinks)
            out[at : at + query_len] = result.permute(2, 0, 1, 3).reshape(query_len, num_heads, head_dim).to(q.dtype)
            at += query_len
        return out


def _attend(
    queries: Tensor, k: Tensor, v: Tensor, visible: Tensor, soft_cap: float | None, sinks: Tensor | None
) -> Tensor:
    """[kv_heads, group, queries, D] float32, scaled, over K and V [kv_heads, 1, keys, D], where visible [queries, keys]
    -> [kv_heads, group, queries, D].

    So many queries at once that their scores take no more than _GATHER_BYTES.
    """
    rows = max(1, _GATHER_BYTES // (4 * queries.shape[0] * queries.shape[1] * k.shape[2]))
    results = []
    for some, seen in zip(queries.split(rows, dim=2), visible.split(rows), strict=True):
        scores = _capped(some @ k.transpose(-1, -2), soft_cap).masked_fill_(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat(
                (sinks.float().view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1), scores), dim=-1
            )
        weights = scores.softmax(-1)
        results.append((weights if sinks is None else weights[..., 1:]) @ v)
    return torch.cat(results, dim=2)


def _capped(scores: Tensor, soft_cap: float | None) -> Tensor:
    return scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the KV store's type. float8_e4m3fn has no infinity: what is beyond its greatest number becomes that (OCP
    8-bit floating point, 2023).
    """
    greatest = torch.finfo(dtype).max
    return x.clamp(-greatest, greatest).to(dtype) if dtype == torch.float8_e4m3fn else x.to(dtype)


def _bits(x: Tensor) -> Tensor:
    """The same memory as bytes where torch cannot index the type."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _gather(kv_pages: Tensor, page_table: Tensor, begin: int, end: int, tile: int) -> tuple[Tensor, Tensor]:
    """K and V of positions [begin, end), multiples of `tile`, which divides the page size: twice [S, num_kv_heads, end
    - begin, D] float32.
    """
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
