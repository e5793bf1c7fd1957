"""What crosses between the scheduler (no tensors) and the runner (no policy): one `Batch` down, one `StepResult` up."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from paged_backend.arrays import Int32, Int64
from paged_backend.messages import FeatureOutput, Finish
from paged_backend.request import SamplingParams


@dataclass(frozen=True)
class NewRow:
    """A sequence takes a row: everything the device must know about it before the step that first uses the row."""

    row: int
    token_ids: Int32  # [num_tokens] prompt, and after a preemption the answer so far
    prompt_len: int
    sampling: SamplingParams
    seed: int  # 64 bits; the caller's, or drawn by the scheduler
    stop_ids: tuple[int, ...]  # tokens that end the sequence: banned before prompt_len + min_tokens
    bad_words: tuple[tuple[int, ...], ...]  # token sequences that must never be completed
    features: int = 0  # `Feature` bits of what it asks for


@dataclass(frozen=True)
class TokenEdit:
    """Tokens of a row from `start` on that the device does not have, or not so."""

    row: int
    start: int
    token_ids: Int32


# ---- what features ask of a step, and what it answers; an ask without an answer gets None


@dataclass(frozen=True)
class AdapterPart:
    """What another rank of the model is sent of an adapter."""

    rank: int  # the adapter's
    packed: bytes  # as it lies in the adapter slot


@dataclass(frozen=True)
class AdapterUse:
    """Adapters that a step needs. Not answered."""

    # (adapter slot, adapter or another rank's part of it): to be brought to the device before the step
    arrivals: tuple[tuple[int, AdapterPart | Any], ...]
    in_use: bool  # some row of the step has an adapter
    # [k, 2] (row, its adapter slot), of the new rows that have an adapter
    new_rows: Int32 = field(default_factory=lambda: np.empty((0, 2), np.int32))


@dataclass(frozen=True)
class TokenMasks:
    """Which tokens rows may sample, in this step and until they are told otherwise: all sampled rows that follow a
    grammar, and new rows that may choose certain tokens only. Not answered.
    """

    rows: Int32  # [k] distinct
    words: Int32  # [k, ceil(vocab / 32)] a bit per token, the first in the lowest; 0: must not be chosen
    # [d, 2] (row of a sampled sequence, how many of its drafts come before the token), and the masks behind drafts:
    # [d, ceil(vocab / 32)], for this step alone. What is sampled behind another row's drafts has the row's mask.
    ahead: Int32 = field(default_factory=lambda: np.empty((0, 2), np.int32))
    words_ahead: Int32 = field(default_factory=lambda: np.empty((0, 0), np.int32))


@dataclass(frozen=True)
class BeamRows:
    """Rows of which the likeliest continuations are wanted, beside the one that is chosen."""

    sampled: Int32  # [b] which of the batch's sampled sequences
    num_candidates: int


@dataclass(frozen=True)
class BeamCandidates:
    """What a step found for BeamRows."""

    token_ids: Int32  # [b, n] most likely first
    logprobs: NDArray[np.float32]  # [b, n] log-softmax of the raw logits; -inf: banned


@dataclass(frozen=True)
class PromptSpan:
    """Tokens of a step whose logits are wanted, for the log-probabilities of the prompt's tokens after them."""

    request_id: int
    entry: int  # of the batch
    start: int  # position of the first
    count: int
    num_tops: int  # so many of the most likely tokens are wanted, too


@dataclass(frozen=True)
class PromptScores:
    """What a step found for a PromptSpan of k tokens."""

    logprobs: NDArray[np.float32]  # [k] of the tokens after them
    ranks: Int32  # [k]
    top_ids: Int32  # [k, num_tops]
    top_logprobs: NDArray[np.float32]  # [k, num_tops]


@dataclass(frozen=True)
class PromptScoring:
    """Prompts whose tokens are to be scored."""

    spans: tuple[PromptSpan, ...]  # at least one


@dataclass(frozen=True)
class ScoredPrompts:
    """What a step found for PromptScoring."""

    scores: tuple[PromptScores, ...]  # one for each of its spans


@dataclass(frozen=True)
class PooledSpan:
    """Consecutive tokens of a step, whose hidden states are part of a prompt's embedding."""

    request_id: int
    entry: int  # of the batch
    start: int  # position of the first
    count: int  # at least 1


@dataclass(frozen=True)
class Pooling:
    """Prompts of which embeddings are made."""

    spans: tuple[PooledSpan, ...]  # at least one


@dataclass(frozen=True)
class PooledPrompts:
    """What a step found for Pooling."""

    sums: NDArray[np.float32]  # [spans, hidden_size] of the hidden states, after the final norm


@dataclass(frozen=True)
class LastThoughts:
    """Tokens of a step that the end of thinking may have to replace. Not answered, and nothing to the device."""

    sampled: tuple[int, ...]  # which of the batch's sampled sequences


Ask = AdapterUse | TokenMasks | BeamRows | PromptScoring | Pooling | LastThoughts
Answer = BeamCandidates | ScoredPrompts | PooledPrompts
A = TypeVar("A", AdapterUse, TokenMasks, BeamRows, PromptScoring, Pooling, LastThoughts)


MOST_DRAFTING = 16  # rows of a step that has drafts: with more of them the device is busy anyway


@dataclass(frozen=True)
class Drafts:
    """What makes a step ragged: rows that may get several tokens of it, or fewer than they may, and rows that have not
    heard yet how many they got of the step before.

    A draft is a guess at a row's next tokens. Drafts lie behind the row's newest token on the device, and are computed
    with it; each is right if it is the token that is sampled before it. The tokens up to the first wrong one, and the
    one sampled instead of that, are the row's.
    """

    counts: Int32  # [num_sequences] how many of the tokens computed are drafts; 0 where nothing is sampled
    unsure: Int32  # [num_sequences] the first position may be so many less than Batch.starts: the device knows it
    # of some rows, behind their newest tokens: drafts that the host made; the device makes the others
    given: tuple[TokenEdit, ...] = ()

    @cached_property
    def any(self) -> bool:
        """There are drafts; False: some lengths are not known."""
        return bool(self.counts.any())


@dataclass(frozen=True)
class Batch:
    """One step: which rows run, how many tokens of each, and what changed since the step before.

    A row stays with its sequence from admission to finish or preemption. Positions start at 0.
    The new token ids are not here: the device has every token of a row, the sampled ones included.
    """

    step: int
    rows: Int32  # [num_sequences] distinct
    starts: Int32  # [num_sequences] first position computed
    counts: Int32  # [num_sequences] tokens computed, >= 1
    samples: NDArray[np.bool_]  # [num_sequences] the last computed token is the newest: sample its successor
    request_ids: Int64  # [num_sequences] who held the row when the step was scheduled
    new_rows: tuple[NewRow, ...] = ()  # to be applied before the page updates
    # [k, 3] (row, index in its page table, page id)
    page_updates: Int32 = field(default_factory=lambda: np.empty((0, 3), np.int32))
    features: int = 0  # union of the rows' `Feature` bits: what the sampler must do beyond argmax
    asks: tuple[Ask, ...] = ()  # of features that some row uses; at most one of a kind
    token_edits: tuple[TokenEdit, ...] = ()  # to be applied after new_rows
    # [k, 2] (page, page that becomes its copy) before anything is computed
    page_copies: Int32 = field(default_factory=lambda: np.empty((0, 2), np.int32))
    # None: every sampled row gets one token, and every row's length is known
    drafts: Drafts | None = None
    read: bool = True  # by the model that makes drafts, if there is one; it reads steps with prompts anyway

    @property
    def num_sequences(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())

    def ask(self, kind: type[A]) -> A | None:
        """The ask of that kind; None: nobody asks."""
        return next((ask for ask in self.asks if isinstance(ask, kind)), None)


class Feature:
    """Bits of `Batch.features`: each names a piece of sampler work that a batch without it skips."""

    RANDOM = 1  # some row has temperature > 0
    TRUNCATE = 2  # some row has top_k, top_p or min_p
    PENALTY = 4  # some row has a repetition, presence or frequency penalty
    BIAS = 8  # some row has logit_bias, or stop ids to ban while under min_tokens
    BAD_WORDS = 16
    LOGPROBS = 32  # some row wants logprobs of the chosen token
    TOP_LOGPROBS = 64  # some row wants the n most likely tokens too
    MASK = 128  # some row may choose certain tokens only
    # some row follows a grammar: its mask depends on all tokens before, so it runs only when they are known
    GUIDED = 256
    PROMPT_LOGPROBS = 512  # some row's prompt has tokens whose logits are wanted; of no concern to the sampler
    BEAM = 1024  # some row is a beam: what it says next depends on the others' results


def features_of(
    sampling: SamplingParams,
    stop_ids: tuple[int, ...],
    bad_words: tuple[tuple[int, ...], ...],
    restricted: bool = False,
) -> int:
    """The `Feature` bits a sequence asks for. restricted: only certain tokens are allowed."""
    s = sampling
    bits = 0
    if not s.greedy:
        bits |= Feature.RANDOM
        if s.top_k > 0 or s.top_p < 1 or s.min_p > 0:
            bits |= Feature.TRUNCATE
    if s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0:
        bits |= Feature.PENALTY
    if s.logit_bias or (s.min_tokens > 0 and stop_ids):
        bits |= Feature.BIAS
    if bad_words:
        bits |= Feature.BAD_WORDS
    if s.logprobs is not None:
        bits |= Feature.LOGPROBS | (Feature.TOP_LOGPROBS if s.logprobs > 0 else 0)
    if s.guided:
        bits |= Feature.MASK | Feature.GUIDED
    if restricted:
        bits |= Feature.MASK
    if s.use_beam_search:
        bits |= Feature.BEAM
    return bits


@dataclass(frozen=True)
class StepResult:
    """What a step sampled: one entry per batch row with `samples`, in the batch's order. A row with drafts has an entry
    more for each of them, so that num_sampled counts those, too.
    """

    token_ids: Int32  # [num_sampled]; -1: sampled after a wrong draft, and nobody's
    # [num_sampled] log-softmax of the raw logits at the chosen token, if LOGPROBS
    logprobs: NDArray[np.float32] | None = None
    # [num_sampled] of the chosen token in the vocabulary, 1: none is more likely; with logprobs
    ranks: Int32 | None = None
    # [num_sampled, n] most likely first, if TOP_LOGPROBS; n = largest asked for in the batch
    top_ids: Int32 | None = None
    top_logprobs: NDArray[np.float32] | None = None  # [num_sampled, n]
    answers: tuple[Answer | None, ...] = ()  # to Batch.asks, in their order


@dataclass(frozen=True)
class StepOutput:
    """What a step, or the refusal of requests, means for callers: parallel arrays, an entry per token; those of a
    request that got several are in their order.
    """

    request_ids: Int64  # [k]
    token_ids: Int32  # [k]
    logprobs: NDArray[np.float32] | None = None  # [k]
    ranks: Int32 | None = None  # [k], with logprobs
    top_logprobs: dict[int, dict[int, float]] = field(default_factory=dict)  # entry -> token id -> logprob
    started: dict[int, int] = field(default_factory=dict)  # request id -> prompt tokens found in the prefix cache
    # request id -> seconds, CLOCK_MONOTONIC, when it left the queue; traced requests only
    admitted: dict[int, float] = field(default_factory=dict)
    feature_outputs: tuple[FeatureOutput, ...] = ()
    finishes: tuple[Finish, ...] = ()  # after all of the above
