"""Steps that nobody asked for, run before the first request: they compile kernels and make libraries choose theirs, so
that no request waits for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.batch import (
    MOST_DRAFTING,
    AdapterUse,
    Ask,
    Batch,
    BeamRows,
    Drafts,
    Feature,
    NewRow,
    PromptScoring,
    PromptSpan,
    TokenMasks,
    features_of,
)
from paged_backend.request import MAX_BEAM_WIDTH, MAX_LOGPROBS, SamplingParams

_SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=0.0, logprobs=0),
    SamplingParams(temperature=0.0, guided_regex="a"),
    SamplingParams(temperature=0.0, use_beam_search=True, beam_width=2),
    SamplingParams(temperature=0.7, presence_penalty=0.1),  # edited logits are float32
    SamplingParams(
        temperature=0.7,
        top_k=5,
        min_tokens=1,
        logit_bias={0: 1.0},
        repetition_penalty=1.1,
        presence_penalty=0.1,
        logprobs=1,
    ),
)
_EVERYTHING = SamplingParams(  # at once, as no request can ask for it: whatever a row asks for takes no more memory
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.05,
    min_tokens=1,
    logit_bias={0: 1.0},
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logprobs=MAX_LOGPROBS,
    guided_regex="a",
    use_beam_search=True,
    beam_width=MAX_BEAM_WIDTH,
)
_BAD_WORDS = ((0, 1),)
_CANDIDATES = 3


def warm_up_batches(
    max_tokens: int,
    max_sequences: int,
    max_len: int,
    page_size: int,
    num_pages: int,
    vocab_size: int,
    adapters: bool = False,
    num_drafts: int = 0,
) -> Iterator[Batch]:
    """Prompts of many lengths, alone and beside decoding sequences, with every kind of sampling. All rows and pages
    must be free, and are so afterwards.

    max_tokens of a step; max_len of a sequence, in tokens. adapters: the prompts once more, with the adapter of adapter
    slot 0, where there may be none. num_drafts: of a sequence in a step, at most.
    """
    room = min(max_len, num_pages * page_size)  # a token is needed for what a step appends
    longest = min(max_tokens, room) - 1
    if longest < 1:
        return
    size = 16
    while size <= max_tokens:
        count = min(-(-size // longest), max_sequences, num_pages * page_size // (longest + page_size) or 1)
        for adapter_slot in (-1, 0) if adapters else (-1,):
            yield _prompts([min(size // count, longest)] * count, _SAMPLINGS[0], page_size, vocab_size, adapter_slot)
        size *= 2
    few = [length for length in (1, 5, 3, 37)[: min(4, max_sequences)] if length <= longest]
    if sum(-(-(length + 1) // page_size) for length in few) > num_pages or sum(few) > max_tokens:
        few = few[:1]
    num_drafts = min(num_drafts, room - few[0] - 1, max_tokens - 1)
    for sampling in _SAMPLINGS:
        batch = _prompts(few, sampling, page_size, vocab_size)
        yield batch
        yield _beside_decodes(batch, few)
        if num_drafts > 0:
            yield _with_drafts(batch, few, num_drafts)


def time_largest(run: Callable[[list[Batch]], None], batches: Iterable[Batch]) -> tuple[Batch, float] | None:
    """Runs the steps, and the one with the most tokens once more, when nothing is left to be compiled for it. Returns
    that one and its seconds; None: there was no step.
    """
    largest: Batch | None = None
    for batch in batches:
        run([batch])
        if largest is None or batch.num_tokens > largest.num_tokens:
            largest = batch
    if largest is None:
        return None
    started = time.monotonic()
    run([largest])
    return largest, time.monotonic() - started


def largest_batches(
    max_tokens: int, max_sequences: int, max_len: int, vocab_size: int, adapters: bool, num_drafts: int = 0
) -> tuple[Batch, ...]:
    """The steps that take most of a device's memory: as many prompt tokens as a step may have, and as many decodes,
    each with one sequence at its longest and every kind of sampling for every row. Where drafts make more outputs than
    there are sequences, those, too. All rows must be free; no page of theirs is named, so all their K and V lie in page
    0. Page 1 is written, too.

    max_sequences of a step, at most max_tokens; max_len of a sequence, in tokens; num_drafts of one in a step, at most.
    """
    decodes = np.ones(max_sequences, np.int32)
    # beyond a token each: the first rows have most
    more = np.full(max_sequences, max_len - 1, np.int64).cumsum().clip(max=max_tokens - max_sequences)
    prefills = decodes + np.diff(more, prepend=0).astype(np.int32)
    first, second = (
        _at_its_longest(counts, max_len, vocab_size, 0 if adapters else -1) for counts in (prefills, decodes)
    )
    scored = PromptSpan(0, 0, int(first.starts[0]), int(first.counts[0]), MAX_LOGPROBS)
    first = replace(first, asks=(*first.asks, PromptScoring((scored,))))
    num_drafting = min(max_sequences, MOST_DRAFTING)
    num_drafts = min(num_drafts, max_tokens // num_drafting - 1, max_len - 1)
    if num_drafting * (1 + num_drafts) <= max_sequences:
        return first, second
    counts = np.full(num_drafting, 1 + num_drafts, np.int32)
    third = _at_its_longest(counts, max_len, vocab_size, 0 if adapters else -1)
    return first, second, replace(third, drafts=Drafts(counts - 1, np.zeros_like(counts)))


def _at_its_longest(counts: Int32, max_len: int, vocab_size: int, adapter_slot: int) -> Batch:
    """A step that computes `counts` tokens of the rows 0, 1, 2 … and samples for each; the first row ends at max_len,
    the others begin at 0.
    """
    starts = np.zeros_like(counts)
    starts[0] = max_len - counts[0]
    batch = _prompts([1] * len(counts), _EVERYTHING, page_size=2, vocab_size=vocab_size, adapter_slot=adapter_slot)
    return replace(batch, starts=starts, counts=counts, page_updates=np.empty((0, 3), np.int32))


def _prompts(
    lens: Sequence[int], sampling: SamplingParams, page_size: int, vocab_size: int, adapter_slot: int = -1
) -> Batch:
    """A step that computes whole prompts, in rows 0, 1, 2 … and pages 0, 1, 2 …"""
    rows, counts = np.arange(len(lens), dtype=np.int32), np.array(lens, np.int32)
    bad_words = _BAD_WORDS if sampling.logit_bias else ()
    features = features_of(sampling, (0,), bad_words)
    new = tuple(
        NewRow(row, np.zeros(length, np.int32), length, sampling, row, (0,), bad_words, features)
        for row, length in enumerate(lens)
    )
    pages = -(-(counts + 1) // page_size)
    firsts = np.cumsum(pages) - pages
    updates = [(row, index, firsts[row] + index) for row in range(len(lens)) for index in range(pages[row])]
    return Batch(
        step=0,
        rows=rows,
        starts=np.zeros_like(rows),
        counts=counts,
        samples=np.ones(len(lens), np.bool_),
        request_ids=rows.astype(np.int64),
        new_rows=new,
        page_updates=np.array(updates, np.int32),
        features=features,
        page_copies=np.array([[0, pages[0]]] if features & Feature.BEAM and len(lens) > 1 else [], np.int32).reshape(
            -1, 2
        ),
        asks=_asks(rows, features, vocab_size, adapter_slot),
    )


def _asks(rows: Int32, features: int, vocab_size: int, adapter_slot: int) -> tuple[Ask, ...]:
    asks: list[Ask] = []
    if adapter_slot >= 0:
        asks.append(AdapterUse((), in_use=True, new_rows=np.stack([rows, np.full_like(rows, adapter_slot)], axis=1)))
    if features & Feature.MASK:
        asks.append(TokenMasks(rows, np.full((len(rows), -(-vocab_size // 32)), -1, np.int32)))
    if features & Feature.BEAM:
        asks.append(BeamRows(rows, _CANDIDATES))
    return tuple(asks)


def _with_drafts(batch: Batch, lens: Sequence[int], num_drafts: int) -> Batch:
    """The step after: the first sequence decodes, with drafts; where it has no page for them, in pages of others. It
    asks for nothing.
    """
    counts = np.array([1 + num_drafts], np.int32)
    drafts = Drafts(counts - 1, np.zeros(1, np.int32))
    features = batch.features & ~(Feature.BEAM | Feature.MASK | Feature.GUIDED)
    return replace(
        batch,
        rows=batch.rows[:1],
        starts=np.array(lens[:1], np.int32),
        counts=counts,
        samples=batch.samples[:1],
        request_ids=batch.request_ids[:1],
        new_rows=(),
        page_updates=batch.page_updates[:0],
        page_copies=batch.page_copies[:0],
        features=features,
        asks=(),
        drafts=drafts,
    )


def _beside_decodes(batch: Batch, lens: Sequence[int]) -> Batch:
    """The step after: the first sequence decodes, the others compute their prompts' last tokens again and sample
    nothing.
    """
    first = np.arange(len(lens)) == 0
    counts = np.where(first, 1, np.maximum(batch.counts - 1, 1)).astype(np.int32)
    starts = np.where(first, batch.counts, batch.counts - counts).astype(np.int32)
    asks: list[Ask] = []
    for ask in batch.asks:
        if isinstance(ask, TokenMasks):
            ask = TokenMasks(ask.rows[:1], ask.words[:1])
        elif isinstance(ask, BeamRows):
            ask = BeamRows(ask.sampled[:1], _CANDIDATES)
        asks.append(ask)
    return Batch(
        batch.step, batch.rows, starts, counts, first, batch.request_ids, features=batch.features, asks=tuple(asks)
    )
