"""Logits in plain torch: what changes them, and what is told of them."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLING_BYTES = 512 * 2**20  # upper bound of sampling's temporaries: many rows are taken in turns
_BYTES_PER_LOGIT = 64  # temporaries of its hungriest op


class LogitOps:
    """Rows of logits [M, V] are independent of each other; what changes them takes float32 and returns new ones."""

    def add_bias(self, logits: Tensor, ids: Tensor, values: Tensor) -> Tensor:
        """Adds values [M, W] float32 to the logits of ids [M, W]; ids outside the vocabulary count for nothing. -inf
        bans a token.
        """
        inside = (ids >= 0) & (ids < logits.shape[1])
        return logits.scatter_add(1, torch.where(inside, ids, 0).long(), torch.where(inside, values, 0.0))

    def ban_bad_words(self, logits: Tensor, words: Tensor, recent: Tensor) -> Tensor:
        """Bans the token that would complete a bad word, the others of which are the sequence's newest tokens.

        words [M, N, L] are right-aligned and filled with -1 on the left; a word of -1 alone is none. recent [M, L - 1]:
        the newest tokens, the newest last, filled with -2 on the left.
        """
        prefix, last = words[:, :, :-1], words[:, :, -1]
        complete = ((prefix == recent[:, None]) | (prefix < 0)).all(-1)
        return self.add_bias(logits, last, torch.where(complete, -torch.inf, 0.0))

    def apply_token_mask(self, logits: Tensor, masks: Tensor, rows: Tensor) -> Tensor:
        """Bans the tokens that are not in a row's set: row m's is masks[rows[m]], a bit per token, the first in the
        lowest bit of the first word.

        masks [R, ceil(V / 32)] int32; rows [M], -1: no ban.
        """
        at_once = rows_at_once(logits)
        if len(logits) > at_once:
            return torch.cat(
                [
                    self.apply_token_mask(some, masks, mine)
                    for some, mine in zip(logits.split(at_once), rows.split(at_once), strict=True)
                ]
            )
        token = torch.arange(logits.shape[1], device=logits.device)
        allowed = masks[rows.clamp(min=0)][:, token >> 5] >> (token & 31) & 1
        return logits.masked_fill((allowed == 0) & (rows >= 0)[:, None], -torch.inf)

    def apply_penalties(
        self,
        logits: Tensor,
        history: Tensor,
        prompt_lens: Tensor,
        num_tokens: Tensor,
        repetition: Tensor,
        presence: Tensor,
        frequency: Tensor,
    ) -> Tensor:
        """Repetition penalty on every token of the sequence (Keskar et al., 2019), presence and frequency on those of
        its answer (OpenAI's definition).

        history [M, H] holds num_tokens [M] tokens, the first prompt_lens [M] of them the prompt; the penalties are [M]
        float32.
        """
        at_once = rows_at_once(logits)
        if len(logits) > at_once:
            columns = (logits, history, prompt_lens, num_tokens, repetition, presence, frequency)
            return torch.cat(
                [
                    self.apply_penalties(*rows)
                    for rows in zip(*(column.split(at_once) for column in columns), strict=True)
                ]
            )
        at = torch.arange(history.shape[1], device=logits.device)
        known = at < num_tokens[:, None]
        ids = torch.where(known & (history >= 0) & (history < logits.shape[1]), history, 0).long()
        seen = torch.zeros_like(logits).scatter_add_(1, ids, known.float()) > 0
        answered = torch.zeros_like(logits).scatter_add_(1, ids, (known & (at >= prompt_lens[:, None])).float())
        scaled = torch.where(logits > 0, logits / repetition[:, None], logits * repetition[:, None])
        logits = torch.where(seen, scaled, logits)
        return logits - frequency[:, None] * answered - presence[:, None] * (answered > 0)

    def truncate(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, max_top_k: int) -> Tensor:
        """Sets to -inf what is unlikely: first probabilities below min_p times the largest, then logits below the
        top_k-th (top_k <= 0: none), then tokens such that more likely ones already have probability top_p among those
        that are left. Ties stay or go together.

        top_k [M] int, top_p and min_p [M] float32; max_top_k: no row's top_k is larger; 0 if some row has none.
        """
        highest = logits.amax(-1, keepdim=True)
        logits = logits.masked_fill(logits < highest + torch.log(min_p)[:, None], -torch.inf)
        vocab_size = logits.shape[1]
        depth = min(max_top_k, vocab_size) if max_top_k > 0 else vocab_size
        ordered = (
            logits.topk(depth, dim=-1).values if depth < vocab_size else logits.sort(dim=-1, descending=True).values
        )
        kth = torch.where(top_k > 0, top_k, vocab_size).clamp(max=depth).long() - 1
        logits = logits.masked_fill(logits < ordered.gather(1, kth[:, None]), -torch.inf)
        probabilities = torch.exp(ordered - logits.logsumexp(-1, keepdim=True))
        before = probabilities.cumsum(-1) - probabilities
        kept = (before < top_p[:, None]).sum(-1).clamp(min=1) - 1  # `before` never falls, so the kept ones come first
        kept = torch.where(top_p < 1, torch.minimum(kept, kth), kth)
        return logits.masked_fill(logits < ordered.gather(1, kept[:, None]), -torch.inf)

    def gather_logits(self, logits: Tensor) -> Tensor:
        """Of the whole vocabulary, [M, V], from what `norm_linear` with the head leaves: the same, unless several ranks
        have parts of it (rank_ops.py).
        """
        return logits

    def logprobs(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        """log softmax(logits) at token_ids: [M, V], [M] -> [M] float32."""
        wide = logits.float()
        return wide.gather(1, token_ids[:, None].long()).squeeze(1) - wide.logsumexp(-1)

    def top_logprobs(self, logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The n largest of log softmax(logits), largest first: [M, V] -> ids [M, n] int64, logprobs [M, n] float32."""
        wide = logits.float()
        top = wide.topk(n, dim=-1)
        return top.indices, top.values - wide.logsumexp(-1, keepdim=True)

    def ranks(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        """1 for a token than which none is more likely, one more for each that is: [M, V], [M] -> [M] int32."""
        wide = logits.float()
        return 1 + (wide > wide.gather(1, token_ids[:, None].long())).sum(-1, dtype=torch.int32)

    def score_tokens(self, logits: Tensor, token_ids: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of tokens that are known: log softmax(logits) at token_ids, their ranks (1: no token is more likely), and the
        n most likely tokens.

        [M, V], [M] -> [M] float32, [M] int64, ids [M, n] int64, logprobs [M, n] float32.
        """
        wide = logits.float()
        own = wide.gather(1, token_ids[:, None].long())
        mass = wide.logsumexp(-1, keepdim=True)
        top = wide.topk(n, dim=-1)
        return (own - mass).squeeze(1), (wide > own).sum(-1) + 1, top.indices, top.values - mass

    def continuations(self, logits: Tensor, edited: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The n largest of log softmax(logits) among the tokens that edited leaves, largest first: [M, V] twice -> ids
        [M, n] int64, logprobs [M, n] float32.

        edited: logits, or -inf for tokens that must not come.
        """
        at_once = rows_at_once(logits)
        if len(logits) > at_once:
            ids, values = zip(
                *(
                    self.continuations(*rows, n)
                    for rows in zip(logits.split(at_once), edited.split(at_once), strict=True)
                ),
                strict=True,
            )
            return torch.cat(ids), torch.cat(values)
        wide = logits.float()
        top = edited.float().topk(n, dim=-1)
        return top.indices, top.values - wide.logsumexp(-1, keepdim=True)


def rows_at_once(logits: Tensor) -> int:
    """Rows of which sampling's temporaries stay within SAMPLING_BYTES."""
    return max(SAMPLING_BYTES // (_BYTES_PER_LOGIT * logits.shape[1]), 1)
