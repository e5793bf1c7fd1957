"""Logits -> token ids and logprobs. Order of the pieces, as in vLLM: logprobs of the raw logits; bias, bad words, min_tokens; penalties;
temperature; min_p, top_k, top_p; the draw. Each piece touches only the rows that ask for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from paged_backend.batch import Feature
from paged_backend.request import MAX_BAD_WORD_TOKENS
from paged_backend.step_tensors import DeviceRows, SampleTensors

SAMPLER_BYTES = 512 * 2**20  # upper bound of temporaries: many rows are taken in turns
_BYTES_PER_LOGIT = 64  # temporaries of the hungriest op

Piece = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits [k, vocab], rows [k], positions [k] -> logits


class SamplerOps(Protocol):
    """What the sampler computes with: `paged_kernels.reference`, which documents each op, or kernels of the same names."""

    def add_bias(self, logits: Tensor, ids: Tensor, values: Tensor) -> Tensor: ...
    def ban_bad_words(self, logits: Tensor, words: Tensor, recent: Tensor) -> Tensor: ...
    def apply_penalties(
        self, logits: Tensor, history: Tensor, prompt_lens: Tensor, num_tokens: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
    ) -> Tensor: ...
    def apply_temperature(self, logits: Tensor, temperature: Tensor) -> Tensor: ...
    def truncate(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, max_top_k: int) -> Tensor: ...
    def argmax(self, logits: Tensor) -> Tensor: ...
    def sample(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor: ...
    def logprobs(self, logits: Tensor, token_ids: Tensor) -> Tensor: ...
    def top_logprobs(self, logits: Tensor, n: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Sampled:
    """Tensors on the device, one entry per sampled row, as in StepResult."""

    token_ids: Tensor  # int64 [M]
    logprobs: Tensor | None = None  # float32 [M]
    top_ids: Tensor | None = None  # int64 [M, n]
    top_logprobs: Tensor | None = None  # float32 [M, n]


class Sampler:
    """Keeps no state: random numbers are a function of a row's seed and position, penalties of its tokens."""

    def __init__(self, ops: SamplerOps) -> None:
        self._ops = ops

    def sample(self, logits: Tensor, step: SampleTensors, rows: DeviceRows) -> Sampled:
        """Chooses a token for each row and appends it to the row. logits [M, vocab] float32 may be overwritten."""
        wants_logprobs = step.features & (Feature.LOGPROBS | Feature.TOP_LOGPROBS)
        raw = logits.clone() if wants_logprobs and step.entries else logits
        self._adjust(logits, step, rows)
        token_ids = self._choose(logits, step, rows)
        rows.append(step.rows, step.positions, token_ids)
        if not wants_logprobs:
            return Sampled(token_ids)
        top_ids, top_logprobs = self._ops.top_logprobs(raw, min(step.num_top_logprobs, raw.shape[1])) if step.num_top_logprobs else (None, None)
        return Sampled(token_ids, self._ops.logprobs(raw, token_ids), top_ids, top_logprobs)

    def _adjust(self, logits: Tensor, step: SampleTensors, rows: DeviceRows) -> None:
        """What a greedy row sees too: bias, bans, penalties. In place."""
        ops = self._ops

        def bias(part: Tensor, mine: Tensor, positions: Tensor) -> Tensor:
            return ops.add_bias(part, *rows.bias(mine, step.num_bias)) if step.num_bias else part

        def bad_words(part: Tensor, mine: Tensor, positions: Tensor) -> Tensor:
            return ops.ban_bad_words(part, rows.bad_words(mine, step.num_bad_words), rows.recent(mine, positions, MAX_BAD_WORD_TOKENS - 1))

        def min_tokens(part: Tensor, mine: Tensor, positions: Tensor) -> Tensor:
            if not step.num_stop:
                return part
            ban = torch.where(positions < rows.parameters(mine).integers("min_len"), -torch.inf, 0.0)
            return ops.add_bias(part, rows.stop_ids(mine, step.num_stop), ban[:, None].expand(-1, step.num_stop))

        def penalties(part: Tensor, mine: Tensor, positions: Tensor) -> Tensor:
            p = rows.parameters(mine)
            history = rows.history(mine, step.max_len)
            return ops.apply_penalties(part, history, p.integers("prompt_len"), positions, p.floats("repetition"), p.floats("presence"), p.floats("frequency"))

        pieces: tuple[tuple[int, Piece], ...] = (
            (Feature.BIAS, bias),
            (Feature.BAD_WORDS, bad_words),
            (Feature.BIAS, min_tokens),
            (Feature.PENALTY, penalties),
        )
        for feature, piece in pieces:
            for at in _turns(logits, step, feature):
                logits.index_copy_(0, at, piece(logits[at], step.rows[at], step.positions[at]))

    def _choose(self, logits: Tensor, step: SampleTensors, rows: DeviceRows) -> Tensor:
        """[M] int64: the largest logit of greedy rows, a draw for the others."""
        ops = self._ops
        token_ids = ops.argmax(logits)
        for feature in (Feature.RANDOM, Feature.TRUNCATE):
            for at in _turns(logits, step, feature):
                p = rows.parameters(step.rows[at])
                part = ops.apply_temperature(logits[at], p.floats("temperature"))
                if feature == Feature.TRUNCATE:
                    part = ops.truncate(part, p.integers("top_k"), p.floats("top_p"), p.floats("min_p"), step.max_top_k)
                token_ids.index_copy_(0, at, ops.sample(part, p.seeds(), step.positions[at]))
        return token_ids


def _turns(logits: Tensor, step: SampleTensors, feature: int) -> tuple[Tensor, ...]:
    """The entries that have a feature, so many at a time that their temporaries stay within bounds."""
    entries = step.entries.get(feature)
    return () if entries is None else torch.split(entries, max(SAMPLER_BYTES // (_BYTES_PER_LOGIT * logits.shape[1]), 1))
