"""Every op of the engine in plain torch: the specification of the kernels beside it, and what runs where there is no GPU.

Shapes: T tokens of a step, S sequences, P pages in a page-table row, M sampled rows, V vocabulary, D head dimension.
One layer's KV store is `kv_pages` [num_pages, 2, num_kv_heads, page_size, D]; 0 is K, 1 is V. Index tensors are int32 or int64.
It may be of another type than the rest. Attention and softmax are computed in float32 whatever the type of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

_GATHER_BYTES = 64 * 2**20  # of K and V that decode attention has in hand at once
_LARGEST_TILE = 64  # tokens
SAMPLING_BYTES = 512 * 2**20  # upper bound of sampling's temporaries: many rows are taken in turns
_BYTES_PER_LOGIT = 64  # temporaries of its hungriest op


# ---- dense


def embedding(token_ids: Tensor, table: Tensor) -> Tensor:
    """[T] ids, [V, hidden] -> [T, hidden]."""
    return functional.embedding(token_ids, table)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T, in], [out, in], [out] -> [T, out]."""
    return functional.linear(x, weight, bias)


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """linear(rms_norm(x)): [T, in], [in], [out, in], [out] -> [T, out]."""
    result = linear(rms_norm(x, norm_weight, eps), weight, bias)
    return result if out is None else out.copy_(result)


def norm_gated_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu_mul(norm_linear(x)): [T, in], [in], [2 out, in], [2 out] -> [T, out]."""
    return silu_mul(norm_linear(x, norm_weight, eps, weight, bias))


def add_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + linear(x): [T, in], [out, in], [out], [T, out] -> [T, out]. A kernel may write over residual."""
    return residual + linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., n], [n] -> [..., n]: x / sqrt(mean(x²) + eps) in float32, back in x's type, times weight (Zhang and Sennrich, 2019)."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 n] -> [T, n]: silu(first half) * second half (SwiGLU, Shazeer, 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


# ---- positions and the KV store


def apply_rope(x: Tensor, rope_table: Tensor, positions: Tensor) -> Tensor:
    """Rotates [T, heads, D] by position; rope_table is [max_len, D] float32: cosines in the first half of a row, sines in the second.

    Pairs are (i, i + D/2), as in Hugging Face checkpoints (Su et al., 2021). Computed in float32, returned in x's type.
    """
    cos, sin = rope_table[positions][:, None].chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def write_kv(k: Tensor, v: Tensor, kv_pages: Tensor, slot_mapping: Tensor) -> None:
    """Stores k and v [T, num_kv_heads, D] at their slots: `page_id * page_size + offset`, -1 for padding, which is not stored."""
    page_size = kv_pages.shape[3]
    stored = slot_mapping >= 0
    slots = slot_mapping[stored].long()
    pages, offsets = slots // page_size, slots % page_size
    for side, x in enumerate((k, v)):
        _bits(kv_pages)[pages, side, :, offsets] = _bits(as_stored(x[stored], kv_pages.dtype))


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the KV store's type. float8_e4m3fn has no infinity: what is beyond its greatest number becomes that (OCP 8-bit floating point, 2023)."""
    greatest = torch.finfo(dtype).max
    return x.clamp(-greatest, greatest).to(dtype) if dtype == torch.float8_e4m3fn else x.to(dtype)


def _bits(x: Tensor) -> Tensor:
    """The same memory as bytes where torch cannot index the type."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def copy_pages(kv_pages: Sequence[Tensor], copies: Tensor) -> None:
    """Page copies[i, 1] becomes a copy of page copies[i, 0] in every layer, [num_pages, ...] each.

    copies [k, 2]: no page is written twice, or read and written.
    """
    sources, targets = copies.long().T
    for layer in map(_bits, kv_pages):
        layer[targets] = layer[sources]


def rope_write_kv(
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
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    write_kv(apply_rope(k, rope_table, positions), v, kv_pages, slot_mapping)
    return apply_rope(q, rope_table, positions)


# ---- attention


def plan_attention(seq_lens: Tensor, query_starts: Tensor, num_decodes: int, max_query_len: int) -> None:
    """Called once a step, before its first attention: kernels share out the work here, plain torch needs no plan.

    seq_lens [S] and query_starts [S + 1] of all sequences, the first num_decodes of which have one query; max_query_len: longest of the others.
    """


def decode_attention(
    q: Tensor, kv_pages: Tensor, page_table: Tensor, seq_lens: Tensor, max_seq_len: int, scale: float, sliding_window: int | None = None
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
    q: Tensor, kv_pages: Tensor, page_table: Tensor, lens: Sequence[tuple[int, int]], scale: float, sliding_window: int | None = None
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


# ---- rows: a running sequence's place in persistent tensors (row_update.py)


def write_spans(target: Tensor, spans: Tensor, values: Tensor) -> None:
    """target[row, column : column + length] = values[start : start + length] for every (row, column, start, length) of spans [k, 4]; row -1: padding."""
    for row, column, start, length in spans.tolist():
        if row >= 0:
            target[row, column : column + length] = values[start : start + length].to(target.dtype)


def update_page_tables(page_tables: Tensor, updates: Tensor) -> None:
    """page_tables[row, index] = page for every (row, index, page) of updates [k, 3]; row -1: padding."""
    rows, index, pages = updates[updates[:, 0] >= 0].T
    page_tables[rows, index] = pages


def gather_step(
    rows: Tensor,
    starts: Tensor,
    counts: Tensor,
    offsets: Tensor,
    history: Tensor,
    page_tables: Tensor,
    page_size: int,
    *,
    input_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
) -> None:
    """A step's inputs from the rows' state: sequence s computes counts[s] tokens of rows[s] from position starts[s], as tokens offsets[s] ... of the step.

    rows, starts, counts, offsets [S]; history [R, H]; page_tables [R, P]. Written: input_ids, positions, slot_mapping [T]; seq_lens [S], the tokens after the
    step; page_table [S, W], the first entries of each row's. A row of -1 is padding: length 0, and for each of its tokens id 0, position 0, slot -1.
    """
    real = rows >= 0
    mine = rows.clamp(min=0)
    seq_lens.copy_(torch.where(real, starts + counts, 0))
    page_table.copy_(page_tables[mine, : page_table.shape[1]])
    which = torch.repeat_interleave(counts, output_size=len(input_ids))
    at = (starts - offsets)[which] + torch.arange(len(input_ids), dtype=torch.int32, device=rows.device)
    stored = real[which]
    at = torch.where(stored, at, 0)
    input_ids.copy_(torch.where(stored, history[mine[which], at], 0))
    positions.copy_(at)
    slot_mapping.copy_(torch.where(stored, page_tables[mine[which], at // page_size].long() * page_size + at % page_size, -1))


def write_tokens(history: Tensor, rows: Tensor, positions: Tensor, token_ids: Tensor) -> None:
    """history[rows[m], positions[m]] = token_ids[m]: [R, H], [M] distinct, [M], [M]. A row of -1 is padding."""
    stored = rows >= 0
    history[rows[stored], positions[stored]] = token_ids[stored].to(history.dtype)


# ---- adapters (LoRA; runner/adapter_store.py has the picture): row b of `weights` [berths, elements] holds one of rank ranks[b]


def assign_adapters(rows: Tensor, query_starts: Tensor, row_berths: Tensor, token_berths: Tensor) -> None:
    """token_berths[t] = row_berths[rows[s]] for the tokens t of each sequence s: [S], [S + 1], [R], [T]. A row of -1 is padding: -1."""
    which = torch.where(rows >= 0, row_berths[rows.clamp(min=0)], -1)
    token_berths.copy_(torch.repeat_interleave(which, query_starts.diff(), output_size=len(token_berths)))


def num_tiles(num_tokens: int, num_berths: int) -> int:
    """Of group_tokens: here one a berth; a kernel cuts smaller ones."""
    return num_berths


def num_splits(num_tokens: int, num_columns: int) -> int:
    """Parts in which adapter_shrink leaves its sums: here one."""
    return 1


def group_tokens(token_berths: Tensor, num_berths: int, order: Tensor, tiles: Tensor) -> None:
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


def adapter_shrink(x: Tensor, weights: Tensor, ranks: Tensor, order: Tensor, tiles: Tensor, offset: int, num_parts: int, hidden: Tensor) -> None:
    """hidden[0, i, : parts r] = A x[order[i]] for the places i of each tile, A [parts r, K] lying r * offset elements from its berth's beginning.

    x [T, K], hidden float32 [splits, T, parts * largest rank]: a kernel may leave the sum in as many parts, which count together.
    """
    hidden[1:] = 0
    for berth, rank, first, tokens in _tiles(ranks, order, tiles):
        width = num_parts * rank
        a = weights[berth, rank * offset : rank * offset + width * x.shape[1]].view(width, -1)
        hidden[0, first : first + len(tokens), :width] = linear(x[tokens], a).float()


def adapter_expand(hidden: Tensor, weights: Tensor, ranks: Tensor, order: Tensor, tiles: Tensor, offset: int, out_sizes: Sequence[int], out: Tensor) -> None:
    """out[order[i]] += B hidden[:, i].sum(0) for the places i of each tile, B [N, r] lying r * offset elements from its berth's beginning; its rows of part p
    are multiplied with the p-th r of hidden. out_sizes: rows of each part; out [T, N]."""
    for berth, rank, first, tokens in _tiles(ranks, order, tiles):
        b = weights[berth, rank * offset : rank * (offset + out.shape[1])].view(-1, rank)
        places = hidden[:, first : first + len(tokens), : len(out_sizes) * rank].sum(0).to(out.dtype)
        parts = zip(places.split(rank, 1), b.split(list(out_sizes)), strict=True)
        out[tokens] += torch.cat([linear(vectors, rows) for vectors, rows in parts], dim=1)


def _tiles(ranks: Tensor, order: Tensor, tiles: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """(berth, rank, first place, tokens) of those that are tiles, with anything in their berths. Asks the device: on CUDA the host waits."""
    known = ranks.tolist()
    for berth, first, count in tiles.tolist():
        if berth >= 0 and known[berth]:
            yield berth, known[berth], first, order[first : first + count]


# ---- sampling: rows of logits [M, V] are independent of each other; what changes them takes float32 and returns new ones


def add_bias(logits: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Adds values [M, W] float32 to the logits of ids [M, W]; ids outside the vocabulary count for nothing. -inf bans a token."""
    inside = (ids >= 0) & (ids < logits.shape[1])
    return logits.scatter_add(1, torch.where(inside, ids, 0).long(), torch.where(inside, values, 0.0))


def ban_bad_words(logits: Tensor, words: Tensor, recent: Tensor) -> Tensor:
    """Bans the token that would complete a bad word, the others of which are the sequence's newest tokens.

    words [M, N, L] are right-aligned and filled with -1 on the left; a word of -1 alone is none. recent [M, L - 1]: the newest tokens, the newest last,
    filled with -2 on the left.
    """
    prefix, last = words[:, :, :-1], words[:, :, -1]
    complete = ((prefix == recent[:, None]) | (prefix < 0)).all(-1)
    return add_bias(logits, last, torch.where(complete, -torch.inf, 0.0))


def apply_token_mask(logits: Tensor, masks: Tensor, rows: Tensor) -> Tensor:
    """Bans the tokens that are not in a row's set: row m's is masks[rows[m]], a bit per token, the first in the lowest bit of the first word.

    masks [R, ceil(V / 32)] int32; rows [M], -1: no ban.
    """
    turn = _rows_at_once(logits)
    if len(logits) > turn:
        return torch.cat([apply_token_mask(some, masks, mine) for some, mine in zip(logits.split(turn), rows.split(turn), strict=True)])
    token = torch.arange(logits.shape[1], device=logits.device)
    allowed = masks[rows.clamp(min=0)][:, token >> 5] >> (token & 31) & 1
    return logits.masked_fill((allowed == 0) & (rows >= 0)[:, None], -torch.inf)


def apply_penalties(
    logits: Tensor, history: Tensor, prompt_lens: Tensor, num_tokens: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Repetition penalty on every token of the sequence (Keskar et al., 2019), presence and frequency on those of its answer (OpenAI's definition).

    history [M, H] holds num_tokens [M] tokens, the first prompt_lens [M] of them the prompt; the penalties are [M] float32.
    """
    turn = _rows_at_once(logits)
    if len(logits) > turn:
        columns = (logits, history, prompt_lens, num_tokens, repetition, presence, frequency)
        return torch.cat([apply_penalties(*rows) for rows in zip(*(column.split(turn) for column in columns), strict=True)])
    at = torch.arange(history.shape[1], device=logits.device)
    known = at < num_tokens[:, None]
    ids = torch.where(known & (history >= 0) & (history < logits.shape[1]), history, 0).long()
    seen = torch.zeros_like(logits).scatter_add_(1, ids, known.float()) > 0
    answered = torch.zeros_like(logits).scatter_add_(1, ids, (known & (at >= prompt_lens[:, None])).float())
    scaled = torch.where(logits > 0, logits / repetition[:, None], logits * repetition[:, None])
    logits = torch.where(seen, scaled, logits)
    return logits - frequency[:, None] * answered - presence[:, None] * (answered > 0)


def truncate(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, max_top_k: int) -> Tensor:
    """Sets to -inf what is unlikely: first probabilities below min_p times the largest, then logits below the top_k-th (top_k <= 0: none),
    then tokens such that more likely ones already have probability top_p among those that are left. Ties stay or go together.

    top_k [M] int, top_p and min_p [M] float32; max_top_k: no row's top_k is larger; 0 if some row has none.
    """
    highest = logits.amax(-1, keepdim=True)
    logits = logits.masked_fill(logits < highest + torch.log(min_p)[:, None], -torch.inf)
    vocab_size = logits.shape[1]
    depth = min(max_top_k, vocab_size) if max_top_k > 0 else vocab_size
    ordered = logits.topk(depth, dim=-1).values if depth < vocab_size else logits.sort(dim=-1, descending=True).values
    kth = torch.where(top_k > 0, top_k, vocab_size).clamp(max=depth).long() - 1
    logits = logits.masked_fill(logits < ordered.gather(1, kth[:, None]), -torch.inf)
    probabilities = torch.exp(ordered - logits.logsumexp(-1, keepdim=True))
    before = probabilities.cumsum(-1) - probabilities
    kept = (before < top_p[:, None]).sum(-1).clamp(min=1) - 1  # `before` never falls, so the kept ones come first
    kept = torch.where(top_p < 1, torch.minimum(kept, kth), kth)
    return logits.masked_fill(logits < ordered.gather(1, kept[:, None]), -torch.inf)


def argmax(logits: Tensor) -> Tensor:
    """[M, V] -> [M] int64: the most likely token."""
    return logits.argmax(-1)


def choose(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, rows: Tensor, truncation: tuple[Tensor, Tensor, Tensor] | None = None
) -> Tensor:
    """The most likely token of rows with temperature 0, a draw from truncate(logits / temperature) for the others: [M, V] -> [M].

    positions and rows [M]: of the token to choose, and which entry of the state is whose. State, [R]: temperature float32, seeds int64,
    truncation (None: no row has any): top_k integers, top_p and min_p float32. Asks the device which rows draw: on CUDA the host waits.
    """
    token_ids = argmax(logits)
    heat = temperature[rows]
    cut = torch.zeros_like(heat, dtype=torch.bool)
    if truncation is not None:
        top_k, top_p, min_p = (column[rows] for column in truncation)
        cut = (top_k > 0) | (top_p < 1) | (min_p > 0)
    for at in torch.nonzero((heat > 0) & ~cut).squeeze(1).split(_rows_at_once(logits)):
        token_ids[at] = sample(apply_temperature(logits[at].float(), heat[at]), seeds[rows[at]], positions[at])
    for at in torch.nonzero((heat > 0) & cut).squeeze(1).split(_rows_at_once(logits)):
        if len(at):
            widest = int(top_k[at].max()) if bool((top_k[at] > 0).all()) else 0
            part = truncate(apply_temperature(logits[at].float(), heat[at]), top_k[at], top_p[at], min_p[at], widest)
            token_ids[at] = sample(part, seeds[rows[at]], positions[at])
    return token_ids


def _rows_at_once(logits: Tensor) -> int:
    return max(SAMPLING_BYTES // (_BYTES_PER_LOGIT * logits.shape[1]), 1)


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits / temperature: [M, V], [M] float32 > 0."""
    return logits / temperature[:, None]


def sample(logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draws a token from softmax(logits): [M, V], [M] int64, [M] int -> [M] int64.

    An exponential race: token t finishes at E(t) / p(t) with E(t) = -log(1 - v(t)), and the first to finish wins, which is the argmax of
    logit - log E(t) (Gumbel-max). v(t) is a hash of seed, position and t, so that a sequence's tokens depend on nothing else, and no
    state is kept:

        key  = splitmix64's output number `position`, seeded with `seed` (Steele et al., 2014): k0 its lower, k1 its upper 32 bits
        h(t) = fmix32(fmix32(t * 0x9E3779B1 + k0) ^ k1), with murmur3's finaliser fmix32, everything modulo 2^32
        v(t) = min((float32(h) + 0.5) * 2^-32, 1 - 2^-24)
    """
    key = _splitmix64(seeds, positions)
    low, high = (key & 0xFFFFFFFF)[:, None], (key >> 32 & 0xFFFFFFFF)[:, None]
    hashed = torch.arange(logits.shape[1], device=logits.device) * 0x9E3779B1 + low & 0xFFFFFFFF
    hashed = _fmix32(_fmix32(hashed) ^ high)
    uniform = ((hashed.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return (logits - torch.log(-torch.log1p(-uniform))).argmax(-1)


def _splitmix64(seeds: Tensor, positions: Tensor) -> Tensor:
    """int64 stands for uint64: sums and products wrap alike, right shifts need a mask."""
    z = seeds + (positions.long() + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ z >> 30 & (1 << 34) - 1) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ z >> 27 & (1 << 37) - 1) * _signed(0x94D049BB133111EB)
    return z ^ z >> 31 & (1 << 33) - 1


def _fmix32(h: Tensor) -> Tensor:
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """log softmax(logits) at token_ids: [M, V], [M] -> [M] float32."""
    wide = logits.float()
    return wide.gather(1, token_ids[:, None].long()).squeeze(1) - wide.logsumexp(-1)


def top_logprobs(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of log softmax(logits), largest first: [M, V] -> ids [M, n] int64, logprobs [M, n] float32."""
    wide = logits.float()
    top = wide.topk(n, dim=-1)
    return top.indices, top.values - wide.logsumexp(-1, keepdim=True)


def ranks(logits: Tensor, token_ids: Tensor) -> Tensor:
    """1 for a token than which none is more likely, one more for each that is: [M, V], [M] -> [M] int32."""
    wide = logits.float()
    return 1 + (wide > wide.gather(1, token_ids[:, None].long())).sum(-1, dtype=torch.int32)


def score_tokens(logits: Tensor, token_ids: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of tokens that are known: log softmax(logits) at token_ids, their ranks (1: no token is more likely), and the n most likely tokens.

    [M, V], [M] -> [M] float32, [M] int64, ids [M, n] int64, logprobs [M, n] float32.
    """
    wide = logits.float()
    own = wide.gather(1, token_ids[:, None].long())
    mass = wide.logsumexp(-1, keepdim=True)
    top = wide.topk(n, dim=-1)
    return (own - mass).squeeze(1), (wide > own).sum(-1) + 1, top.indices, top.values - mass


def continuations(logits: Tensor, edited: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of log softmax(logits) among the tokens that edited leaves, largest first: [M, V] twice -> ids [M, n] int64, logprobs [M, n] float32.

    edited: logits, or -inf for tokens that must not come.
    """
    turn = _rows_at_once(logits)
    if len(logits) > turn:
        ids, values = zip(*(continuations(*rows, n) for rows in zip(logits.split(turn), edited.split(turn), strict=True)), strict=True)
        return torch.cat(ids), torch.cat(values)
    wide = logits.float()
    top = edited.float().topk(n, dim=-1)
    return top.indices, top.values - wide.logsumexp(-1, keepdim=True)
