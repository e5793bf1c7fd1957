"""What a request wants changed before a token is chosen: biases, bad words, penalties, sets of allowed tokens.

Each changes float32 logits [M, V] in place where it must, nothing else.

What a row asked for, and its tokens, are [M, ...]: the sampler gathers them from the rows' state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_begin

_BLOCK = 1024
# of what a row seldom has many; a constant, so that no request is the first of its kind and waits for a compiler
_FEW = 128
_PARTS = 8  # programs along one history


@kernel(ints=["width", "ids_stride", "values_stride"], unaligned=["ids", "values"])
def _add_bias_kernel(
    logits, ids, values, width, logits_stride, ids_stride, values_stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    pdl_begin(LAUNCH_PDL)
    m = tl.program_id(0).to(tl.int64)
    for begin in range(0, width, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        token = tl.load(ids + m * ids_stride + at, mask=at < width, other=-1)
        inside = (token >= 0) & (token < VOCAB)
        value = tl.load(values + m * values_stride + at, mask=inside, other=0.0)
        # a token may be there twice
        tl.atomic_add(logits + m * logits_stride + token, value, mask=inside, sem="relaxed")


@kernel(ints=["num_words", "words_stride", "history_stride"], unaligned=["words", "history", "num_tokens"])
def _ban_bad_words_kernel(
    logits, words, history, num_tokens, num_words, logits_stride, words_stride, history_stride,
    LENGTH: tl.constexpr, LENGTH_PAD: tl.constexpr, WORDS: tl.constexpr, VOCAB: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    pdl_begin(LAUNCH_PDL)
    m = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WORDS)
    at = tl.arange(0, LENGTH_PAD)
    position = tl.load(num_tokens + m).to(tl.int64) - (LENGTH - 1) + at
    # -2 equals nothing
    recent = tl.load(history + m * history_stride + position, mask=(at < LENGTH - 1) & (position >= 0), other=-2)
    cell = words + m * words_stride + word[:, None] * LENGTH + at[None, :]
    prefix = tl.load(cell, mask=(word < num_words)[:, None] & (at < LENGTH - 1)[None, :], other=-1)
    differs = tl.max(((prefix != recent[None, :]) & (prefix >= 0)).to(tl.int32), 1)
    last = tl.load(words + m * words_stride + word * LENGTH + LENGTH - 1, mask=word < num_words, other=-1)
    tl.store(logits + m * logits_stride + last, float("-inf"), mask=(differs == 0) & (last >= 0) & (last < VOCAB))


@kernel(ints=["masks_stride"], unaligned=["masks", "rows"])
def _apply_token_mask_kernel(
    logits, rows, masks, logits_stride, masks_stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    pdl_begin(LAUNCH_PDL)
    m = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + m).to(tl.int64)
    if row < 0:
        return
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # the 32 lanes of a word read it together
    word = tl.load(masks + row * masks_stride + (token >> 5), mask=token < VOCAB, other=0)
    banned = ((word >> (token & 31)) & 1) == 0
    tl.store(logits + m * logits_stride + token, float("-inf"), mask=banned & (token < VOCAB))


@kernel(
    ints=["history_stride"], unaligned=["history", "prompt_lens", "num_tokens", "repetition", "presence", "frequency"]
)
def _count_tokens_kernel(
    counts, history, prompt_lens, num_tokens, repetition, presence, frequency, history_stride, state_stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """counts[m, token] |= 1 for a token of the sequence, += 2 for every occurrence in its answer."""
    pdl_begin(LAUNCH_PDL)
    m = tl.program_id(1).to(tl.int64)
    if (
        (tl.load(repetition + m * state_stride) == 1.0)
        & (tl.load(presence + m * state_stride) == 0.0)
        & (tl.load(frequency + m * state_stride) == 0.0)
    ):
        return
    length = tl.load(num_tokens + m).to(tl.int32)
    prompt_len = tl.load(prompt_lens + m * state_stride).to(tl.int32)
    for begin in range(tl.program_id(0) * BLOCK, length, tl.num_programs(0) * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        token = tl.load(history + m * history_stride + at, mask=at < length, other=-1)
        inside = (token >= 0) & (token < VOCAB)
        tl.atomic_or(counts + m * VOCAB + token, 1, mask=inside & (at < prompt_len), sem="relaxed")
        tl.atomic_add(counts + m * VOCAB + token, 2, mask=inside & (at >= prompt_len), sem="relaxed")


@kernel(ints=["history_stride"], unaligned=["history", "num_tokens", "repetition", "presence", "frequency"])
def _penalise_kernel(
    logits, counts, history, num_tokens, repetition, presence, frequency, logits_stride, history_stride, state_stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """Whoever takes a token's count away applies the penalty: once per token, and the counts are zero again."""
    pdl_begin(LAUNCH_PDL)
    m = tl.program_id(1).to(tl.int64)
    factor, offset, slope = (
        tl.load(repetition + m * state_stride),
        tl.load(presence + m * state_stride),
        tl.load(frequency + m * state_stride),
    )
    if (factor == 1.0) & (offset == 0.0) & (slope == 0.0):
        return
    length = tl.load(num_tokens + m).to(tl.int32)
    for begin in range(tl.program_id(0) * BLOCK, length, tl.num_programs(0) * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        token = tl.load(history + m * history_stride + at, mask=at < length, other=-1)
        inside = (token >= 0) & (token < VOCAB)
        count = tl.atomic_xchg(counts + m * VOCAB + token, 0, mask=inside, sem="relaxed")
        mine = inside & (count > 0)
        x = tl.load(logits + m * logits_stride + token, mask=mine, other=0.0)
        x = tl.where(x > 0, tl.div_rn(x, factor), x * factor)
        answered = count >> 1
        x -= slope * answered.to(tl.float32) + tl.where(answered > 0, offset, 0.0)
        tl.store(logits + m * logits_stride + token, x, mask=mine)


def add_bias(
    logits: torch.Tensor, ids: torch.Tensor, values: torch.Tensor, *, launch_pdl: bool = False
) -> torch.Tensor:
    """Adds values [M, W] float32 to the logits of ids [M, W], in place; ids outside the vocabulary count for nothing.
    -inf bans a token. Returns logits.

    launch_pdl: begin while the kernel before drains (programmatic dependent launch); reads nothing before that kernel
    is complete. Raises ValueError if logits are not float32 with contiguous rows.
    """
    _check(logits)
    width = ids.shape[1]
    if len(logits) and width:
        _add_bias_kernel[(len(logits),)](
            logits, ids, values, width, logits.stride(0), ids.stride(0), values.stride(0),
            VOCAB=logits.shape[1], BLOCK=_FEW, LAUNCH_PDL=launch_pdl, num_warps=4,
        )  # fmt: skip
    return logits


def ban_bad_words(
    logits: torch.Tensor,
    words: torch.Tensor,
    history: torch.Tensor,
    num_tokens: torch.Tensor,
    *,
    launch_pdl: bool = False,
) -> torch.Tensor:
    """Sets to -inf, in place, the token that would complete a bad word: its other tokens are the last of the num_tokens
    [M] in history [M, H]. Returns logits.

    words: [M, N, L] integers, contiguous, right-aligned, filled with -1 on the left; a word of -1 alone is none. As
        `add_bias` otherwise.
    """
    _check(logits)
    _, num_words, length = words.shape
    if len(logits) and num_words and length:
        _ban_bad_words_kernel[(len(logits),)](
            logits, words, history, num_tokens, num_words, logits.stride(0), words.stride(0), history.stride(0),
            LENGTH=length, LENGTH_PAD=triton.next_power_of_2(length),
            WORDS=max(_FEW, triton.next_power_of_2(num_words)), VOCAB=logits.shape[1], LAUNCH_PDL=launch_pdl,
            num_warps=4,
        )  # fmt: skip
    return logits


def apply_token_mask(
    logits: torch.Tensor, masks: torch.Tensor, rows: torch.Tensor, *, launch_pdl: bool = False
) -> torch.Tensor:
    """Sets to -inf, in place, the logits of tokens that are not in a row's set: masks[rows[m]], a bit per token, the
    first in the lowest bit. Returns logits.

    masks: [R, at least ceil(V / 32)] int32, contiguous rows; rows: [M] integers, -1: left alone. Writes only what is
        banned. As `add_bias` otherwise.
    """
    _check(logits)
    if masks.dtype != torch.int32 or masks.shape[1] * 32 < logits.shape[1] or masks.stride(1) != 1:
        raise ValueError(f"masks {tuple(masks.shape)} {masks.dtype} do not fit logits {tuple(logits.shape)}")
    if len(logits):
        _apply_token_mask_kernel[(triton.cdiv(logits.shape[1], _BLOCK), len(logits))](
            logits,
            rows,
            masks,
            logits.stride(0),
            masks.stride(0),
            VOCAB=logits.shape[1],
            BLOCK=_BLOCK,
            LAUNCH_PDL=launch_pdl,
            num_warps=4,
        )
    return logits


def apply_penalties(
    logits: torch.Tensor, history: torch.Tensor, prompt_lens: torch.Tensor, num_tokens: torch.Tensor,
    repetition: torch.Tensor, presence: torch.Tensor, frequency: torch.Tensor, *, counts: torch.Tensor,
    launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Repetition penalty on every token of the sequence, presence and frequency penalty on those of its answer, in
    place; returns logits.

    history: [M, H] integers, num_tokens: [M] of them known, the first prompt_lens [M] the prompt; repetition, presence,
    frequency: float32 [M], of one stride with prompt_lens. counts: int32 [at least M, V], all zero, and all zero again
    afterwards. Time grows with the known tokens, not with the vocabulary. As `add_bias` otherwise.
    Sources: Keskar et al., 2019 (repetition); OpenAI's API reference (presence, frequency).
    """
    _check(logits)
    num_rows, vocab_size = logits.shape
    if (
        counts.dtype != torch.int32
        or counts.shape[1] != vocab_size
        or len(counts) < num_rows
        or not counts.is_contiguous()
    ):
        raise ValueError(f"counts {tuple(counts.shape)} {counts.dtype} do not fit logits {tuple(logits.shape)}")
    state_stride = repetition.stride(0)
    if any(tensor.stride(0) != state_stride for tensor in (prompt_lens, presence, frequency)):
        raise ValueError("prompt_lens, repetition, presence and frequency must have one stride")
    if num_rows == 0:
        return logits
    flags = {"VOCAB": vocab_size, "BLOCK": _BLOCK, "LAUNCH_PDL": launch_pdl, "num_warps": 4}
    grid = (min(_PARTS, triton.cdiv(history.shape[1], _BLOCK)), num_rows)
    _count_tokens_kernel[grid](
        counts,
        history,
        prompt_lens,
        num_tokens,
        repetition,
        presence,
        frequency,
        history.stride(0),
        state_stride,
        **flags,
    )
    _penalise_kernel[grid](
        logits,
        counts,
        history,
        num_tokens,
        repetition,
        presence,
        frequency,
        logits.stride(0),
        history.stride(0),
        state_stride,
        **flags,
    )
    return logits


def _check(logits: torch.Tensor) -> None:
    if logits.dtype != torch.float32 or logits.ndim != 2 or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be float32 rows, contiguous, not {tuple(logits.shape)} {logits.dtype} of strides "
            f"{logits.stride()}"
        )
