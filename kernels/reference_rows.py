"""The rows in plain torch: what the host says about a step goes in, a step's inputs come out, and the tokens that are
chosen from its logits go in.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from paged_kernels.reference_logits import LogitOps, rows_at_once

NGRAM_LONGEST, NGRAM_SHORTEST = 8, 2  # tokens that must be alike for what came after them to be a draft
NGRAM_SEARCHED = 16_384  # of a row's newest tokens: farther back it takes longer than it saves


class RowOps(LogitOps):
    """Rows: a running sequence's place in persistent tensors (row_update.py), and the choice of its next token."""

    def write_spans(self, target: Tensor, spans: Tensor, values: Tensor) -> None:
        """target[row, column : column + length] = values[start : start + length] for every (row, column, start, length)
        of spans [k, 4]; row -1: padding.
        """
        for row, column, start, length in spans.tolist():
            if row >= 0:
                target[row, column : column + length] = values[start : start + length].to(target.dtype)

    def update_page_tables(self, page_tables: Tensor, updates: Tensor) -> None:
        """page_tables[row, index] = page for every (row, index, page) of updates [k, 3]; row -1: padding."""
        rows, index, pages = updates[updates[:, 0] >= 0].T
        page_tables[rows, index] = pages

    def gather_step(
        self,
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
        lengths: Tensor | None = None,
    ) -> None:
        """A step's inputs from the rows' state: sequence s computes counts[s] tokens of rows[s] from position
        starts[s], as tokens offsets[s] ... of the step.

        rows, starts, counts, offsets [S]; history [R, H]; page_tables [R, P]. Written: input_ids, positions,
        slot_mapping [T]; seq_lens [S], the tokens after the step; page_table [S, W], the first entries of each row's. A
        row of -1 is padding: length 0, and for each of its tokens id 0, position 0, slot -1.

        lengths [R]: of the rows, in tokens; a start of -1 - j is the position j behind the row's newest token.
        """
        real = rows >= 0
        mine = rows.clamp(min=0)
        if lengths is not None:
            starts = torch.where(starts < 0, lengths[mine] - 2 - starts, starts)
        seq_lens.copy_(torch.where(real, starts + counts, 0))
        page_table.copy_(page_tables[mine, : page_table.shape[1]])
        which = torch.repeat_interleave(counts, output_size=len(input_ids))
        at = (starts - offsets)[which] + torch.arange(len(input_ids), dtype=torch.int32, device=rows.device)
        stored = real[which]
        at = torch.where(stored, at, 0)
        input_ids.copy_(torch.where(stored, history[mine[which], at], 0))
        positions.copy_(at)
        slot_mapping.copy_(
            torch.where(stored, page_tables[mine[which], at // page_size].long() * page_size + at % page_size, -1)
        )

    def argmax(self, logits: Tensor) -> Tensor:
        """[M, V] -> [M] int64: the most likely token."""
        return logits.argmax(-1)

    def choose(
        self,
        logits: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        positions: Tensor,
        rows: Tensor,
        truncation: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The most likely token of rows with temperature 0, a draw from truncate(logits / temperature) for the others:
        [M, V] -> [M].

        positions and rows [M]: of the token to choose, and which entry of the state is whose. State, [R]: temperature
        float32, seeds int64, truncation (None: no row has any): top_k integers, top_p and min_p float32. Asks the
        device which rows draw: on CUDA the host waits.
        """
        token_ids = self.argmax(logits)
        heat = temperature[rows]
        cut = torch.zeros_like(heat, dtype=torch.bool)
        if truncation is not None:
            top_k, top_p, min_p = (column[rows] for column in truncation)
            cut = (top_k > 0) | (top_p < 1) | (min_p > 0)
        for at in torch.nonzero((heat > 0) & ~cut).squeeze(1).split(rows_at_once(logits)):
            token_ids[at] = self.sample(
                self.apply_temperature(logits[at].float(), heat[at]), seeds[rows[at]], positions[at]
            )
        for at in torch.nonzero((heat > 0) & cut).squeeze(1).split(rows_at_once(logits)):
            if len(at):
                widest = int(top_k[at].max()) if bool((top_k[at] > 0).all()) else 0
                part = self.truncate(
                    self.apply_temperature(logits[at].float(), heat[at]), top_k[at], top_p[at], min_p[at], widest
                )
                token_ids[at] = self.sample(part, seeds[rows[at]], positions[at])
        return token_ids

    def apply_temperature(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """logits / temperature: [M, V], [M] float32 > 0."""
        return logits / temperature[:, None]

    def sample(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """Draws a token from softmax(logits): [M, V], [M] int64, [M] int -> [M] int64.

        An exponential race: token t finishes at E(t) / p(t) with E(t) = -log(1 - v(t)), and the first to finish wins,
        which is the argmax of logit - log E(t) (Gumbel-max). v(t) is a hash of seed, position and t, so that a
        sequence's tokens depend on nothing else, and no state is kept:

            key  = splitmix64's output number `position`, seeded with `seed` (Steele et al., 2014): k0 its lower, k1 its
            upper 32 bits h(t) = fmix32(fmix32(t * 0x9E3779B1 + k0) ^ k1), with murmur3's finaliser fmix32, everything
            modulo 2^32 v(t) = min((float32(h) + 0.5) * 2^-32, 1 - 2^-24)
        """
        return self.race(logits, seeds, positions).argmax(-1)

    def race(self, logits: Tensor, seeds: Tensor, positions: Tensor, first: int = 0) -> Tensor:
        """logit - log E(t) of `sample`, for the tokens first, first + 1 …: [M, L], [M] int64, [M] int -> [M, L]."""
        key = _splitmix64(seeds, positions)
        low, high = (key & 0xFFFFFFFF)[:, None], (key >> 32 & 0xFFFFFFFF)[:, None]
        tokens = torch.arange(first, first + logits.shape[1], device=logits.device)
        hashed = _fmix32(_fmix32(tokens * 0x9E3779B1 + low & 0xFFFFFFFF) ^ high)
        uniform = ((hashed.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
        return logits - torch.log(-torch.log1p(-uniform))

    def write_tokens(
        self,
        history: Tensor,
        rows: Tensor,
        positions: Tensor,
        token_ids: Tensor,
        *,
        num_tokens: Tensor | None = None,
    ) -> None:
        """history[rows[m], positions[m]] = token_ids[m]: [R, H], [M] distinct, [M], [M]; and num_tokens[rows[m]] =
        positions[m] + 1 if given, [R]. A row of -1 is padding.
        """
        stored = rows >= 0
        mine, at = rows[stored], positions[stored]
        history[mine, at] = token_ids[stored].to(history.dtype)
        if num_tokens is not None:
            num_tokens[mine] = (at + 1).to(num_tokens.dtype)

    def accept_tokens(
        self, history: Tensor, lengths: Tensor, rows: Tensor, positions: Tensor, token_ids: Tensor, input_ids: Tensor
    ) -> Tensor:
        """As `write_tokens`, where a row may come several times, one after another: token m was sampled behind
        input_ids[m], which is a draft of the token before it unless it is the row's first. A row gets the tokens up to
        the first that its draft differs from, that one included; lengths [R] becomes how many the row has.

        rows, positions, token_ids [M], input_ids [M] at least -> [M] int32: token_ids, -1 for those that no row gets.
        """
        follows = torch.zeros_like(rows, dtype=torch.bool)
        follows[1:] = (rows[1:] == rows[:-1]) & (rows[1:] >= 0)
        wrong = follows.clone()
        wrong[1:] &= token_ids[:-1] != input_ids[1 : len(rows)]
        at = torch.arange(len(rows), device=rows.device)
        first = torch.where(follows, 0, at).cummax(0).values
        so_far = wrong.cumsum(0)
        accepted = so_far == so_far[first]
        self.write_tokens(history, torch.where(accepted, rows, -1), positions, token_ids)
        last = accepted & (rows >= 0)
        last[:-1] &= ~(follows[1:] & accepted[1:])
        lengths[rows[last]] = (positions[last] + 1).to(lengths.dtype)
        return torch.where(accepted, token_ids, -1).int()

    def propose_ngram(self, history: Tensor, lengths: Tensor, rows: Tensor, counts: Tensor) -> None:
        """Drafts from a row's own text: history[rows[i], length : length + counts[i]] = what follows the place in the
        row's newest NGRAM_SEARCHED tokens before which most of them, NGRAM_LONGEST at most, are the row's newest, where
        length = lengths[rows[i]]; the last of such places. Where fewer than NGRAM_SHORTEST are, the newest token again
        and again. Beyond the newest token it begins again at the place. (Prompt lookup decoding, Saxena, 2023.)

        history [R, H], lengths [R] at least 1; rows [k] distinct, counts [k].
        """
        for tokens, drafts in _texts(history, lengths, rows, counts):
            place = _place_alike(tokens, NGRAM_SHORTEST)
            drafts.copy_(tokens[-1:].expand_as(drafts) if place is None else _following(tokens, place, len(drafts)))

    def propose_repeated(self, history: Tensor, lengths: Tensor, rows: Tensor, counts: Tensor) -> None:
        """As `propose_ngram`, of rows that end as they went before for NGRAM_LONGEST tokens; the others' drafts, which
        somebody else has made, stay.
        """
        for tokens, drafts in _texts(history, lengths, rows, counts):
            place = _place_alike(tokens, NGRAM_LONGEST)
            if place is not None:
                drafts.copy_(_following(tokens, place, len(drafts)))


def _texts(history: Tensor, lengths: Tensor, rows: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each row the tokens that are searched, and where its drafts lie."""
    for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
        length = int(lengths[row])
        yield history[row, max(length - NGRAM_SEARCHED, 0) : length], history[row, length : length + count]


def _following(tokens: Tensor, place: int, count: int) -> Tensor:
    """What comes from `place` on, [count]; beyond the end it begins again there."""
    return tokens[place + torch.arange(count, device=tokens.device) % (len(tokens) - place)]


def _place_alike(tokens: Tensor, least: int) -> int | None:
    """The last place before which most tokens are those at the end, NGRAM_LONGEST at most and `least` at least; None:
    there is none.
    """
    places = torch.arange(1, len(tokens), device=tokens.device)
    found = None
    for back in range(1, NGRAM_LONGEST + 1):
        places = places[places >= back]
        places = places[tokens[places - back] == tokens[-back]] if back <= len(tokens) else places[:0]
        if len(places) == 0:
            break
        if back >= least:
            found = int(places[-1])
    return found


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
