"""Logits -> token ids and logprobs. Order of the pieces, as in vLLM: logprobs of the raw logits; bias, bad words,
min_tokens; penalties; masks; temperature; min_p, top_k, top_p; the draw. A batch in which no row asks for a piece skips
it; a row that does not ask is left as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_backend.batch import Feature
from paged_backend.request import MAX_BAD_WORD_TOKENS
from paged_backend.runner.step_tensors import DeviceRows, SampleTensors
from paged_backend.runner.transfers import Sampled
from paged_kernels.reference import SAMPLING_BYTES, Ops

_FEW_TOKENS = 16  # of which the logits are at hand at least
_BYTES_PER_SCORED_LOGIT = 64
_WHOLE_VOCABULARY = (  # all logits of a row are needed, not only the likeliest's
    Feature.TRUNCATE
    | Feature.PENALTY
    | Feature.BIAS
    | Feature.BAD_WORDS
    | Feature.LOGPROBS
    | Feature.TOP_LOGPROBS
    | Feature.MASK
    | Feature.BEAM
)
_EDITS = Feature.BIAS | Feature.BAD_WORDS | Feature.PENALTY | Feature.MASK


class Sampler:
    """Keeps no state: random numbers are a function of a row's seed and position, penalties of its tokens."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def sample(self, logits: Tensor, step: SampleTensors, rows: DeviceRows) -> Sampled:
        """Chooses a token for each row and appends it to the row. logits: [M, vocab], any floating type; of several
        ranks' each has its part of them.
        """
        ops = self._ops
        if step.features & _WHOLE_VOCABULARY:
            logits = ops.gather_logits(logits)
        edited = self._edit(logits, step, rows) if step.features & _EDITS else logits
        if step.features & Feature.RANDOM:
            truncation = rows.truncation if step.features & Feature.TRUNCATE else None
            token_ids = ops.choose(edited, rows.temperature, rows.seeds, step.positions, step.rows, truncation)
        else:
            token_ids = ops.argmax(edited)
        if rows.lengths is None or step.input_ids is None:
            ops.write_tokens(rows.token_ids, step.rows, step.positions, token_ids, num_tokens=rows.lengths)
            accepted = token_ids
        else:
            accepted = ops.accept_tokens(
                rows.token_ids, rows.lengths, step.rows, step.positions, token_ids, step.input_ids
            )
        candidates = None if step.beams is None else self._candidates(logits, edited, step.beams, step.num_candidates)
        if not step.features & (Feature.LOGPROBS | Feature.TOP_LOGPROBS):
            return Sampled(accepted, candidates=candidates)
        top_ids, top_logprobs = (
            ops.top_logprobs(logits, min(step.num_top_logprobs, logits.shape[1]))
            if step.num_top_logprobs
            else (None, None)
        )
        return Sampled(
            accepted, ops.logprobs(logits, token_ids), ops.ranks(logits, token_ids), top_ids, top_logprobs, candidates
        )

    def _candidates(self, logits: Tensor, edited: Tensor, beams: Tensor, n: int) -> Tensor:
        """Of log-probabilities of the raw logits, as in transformers: a ban takes a token away and leaves the others
        what they are.
        """
        n = min(n, logits.shape[1])
        ids, logprobs = self._ops.continuations(logits.index_select(0, beams), edited.index_select(0, beams), n)
        return torch.cat([ids.int(), logprobs.view(torch.int32)], dim=1)

    def score(self, logits: Tensor, token_ids: Tensor, n: int) -> Tensor:
        """What is told of tokens that are known: int32 [k, 2 + 2 n], the bits of their log-probabilities, ranks, the n
        most likely ids and their bits.

        logits: [k, vocab] as in `sample`, token_ids [k].
        """
        logits = self._ops.gather_logits(logits)
        logprobs, ranks, top_ids, top_logprobs = self._ops.score_tokens(logits, token_ids, n)
        return torch.cat(
            [logprobs.view(torch.int32)[:, None], ranks.int()[:, None], top_ids.int(), top_logprobs.view(torch.int32)],
            dim=1,
        )

    def _edit(self, logits: Tensor, step: SampleTensors, rows: DeviceRows) -> Tensor:
        """What a greedy row sees too: bias, bans, penalties, masks. float32; logits stay as they are."""
        ops, mine, positions = self._ops, step.rows, step.positions
        logits = logits.to(torch.float32, copy=True)
        p = rows.parameters(mine)
        if step.num_bias:
            logits = ops.add_bias(logits, *rows.bias(mine, step.num_bias))
        if step.num_bad_words:
            logits = ops.ban_bad_words(
                logits, rows.bad_words(mine, step.num_bad_words), rows.recent(mine, positions, MAX_BAD_WORD_TOKENS - 1)
            )
        if step.num_stop:  # min_tokens
            ban = torch.where(positions < p.integers("min_len"), -torch.inf, 0.0)
            logits = ops.add_bias(logits, rows.stop_ids(mine, step.num_stop), ban[:, None].repeat(1, step.num_stop))
        if step.features & Feature.PENALTY:
            history = rows.history(mine, step.max_len)
            penalties = (p.floats("repetition"), p.floats("presence"), p.floats("frequency"))
            logits = ops.apply_penalties(logits, history, p.integers("prompt_len"), positions, *penalties)
        if step.masked:
            masked = torch.where(p.integers("masked") > 0, mine, -1)
            if step.masks_ahead is not None:
                masks, outputs = step.masks_ahead
                logits = ops.apply_token_mask(logits, masks, outputs)
                masked = torch.where(outputs < 0, masked, -1)
            logits = ops.apply_token_mask(logits, rows.token_masks, masked)
        return logits


def prompt_tokens_at_once(num_rows: int, vocab_size: int) -> int:
    """So many logits of prompt tokens are scored at once: what that allocates stays within what sampling may, which
    comes after it.
    """
    return max(_FEW_TOKENS, min(num_rows, int(SAMPLING_BYTES) // (_BYTES_PER_SCORED_LOGIT * vocab_size)))
