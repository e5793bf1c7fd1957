"""Batch -> where everything of a step lies, in plain arrays: which sequence comes where, which tokens are whose, which
results are wanted.

Sequences that compute one token (decodes) come first, the others (prefills) after them. A *shape* is how many of each
there is room for: exactly as many as the batch has, or more where a step was captured for a fixed shape
(cuda_graphs.py); what is left is padding, which computes nothing that anyone reads.

    sequences | decode rows ... -1 -1 | prefill rows ... -1 | -1 |    the last one takes the tokens that are left
    tokens    | 1 1 1 ...       1  1  | 40   7   ...     0  | 17 |

A row's drafts are decodes, too, that come right after it: each computes the token at its place behind the row's newest,
so that no kernel need know of them; attention may, which is told of the rows, and reads the keys and values of
neighbours with one row once. Where only the device knows a row's length, `starts` has -1 - j for the place j
behind the newest token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from paged_backend.arrays import Int32, Int64
from paged_backend.batch import AdapterUse, Batch, Drafts
from paged_backend.models.step import StepShape


@dataclass(frozen=True)
class StepPlan:
    """A step in a shape. `flat` has the arrays of `array_lengths`, end to end."""

    shape: StepShape
    flat: Int32  # [plan_size(shape)]
    # [num_sampled] which output belongs to each of the batch's sampled sequences, and each of its drafts after it
    output_indices: Int64
    first_outputs: Int64  # [sampled sequences] the first of each
    firsts: Int32  # [num_sequences] which token of the step is the first of each of the batch's sequences
    prefill_lens: tuple[tuple[int, int], ...]  # (query_len, seq_len) of the real prefills
    max_decode_len: int  # longest decoding sequence, after the step
    max_len: int  # longest sequence, after the step


def array_lengths(shape: StepShape) -> dict[str, int]:
    """The arrays of a plan, in the order in which they lie end to end."""
    sequences, outputs = shape.num_sequences, shape.num_outputs
    return {
        "rows": sequences,
        "starts": sequences,
        "counts": sequences,
        "query_starts": sequences + 1,
        "logit_indices": outputs,
        "sample_rows": outputs,
    }


def plan_size(shape: StepShape) -> int:
    """Numbers in a plan."""
    return sum(array_lengths(shape).values())


def shape_of(batch: Batch) -> StepShape:
    """Without padding."""
    drafting = batch.drafts is not None and batch.drafts.any
    num_drafts = int(batch.drafts.counts.sum()) if batch.drafts is not None and drafting else 0
    use = batch.ask(AdapterUse) if batch.asks else None
    num_tokens = int(batch.counts.sum())
    num_prefills = num_prefill_tokens = 0
    if num_tokens - num_drafts != len(batch.rows):  # a draft is a decode of its own
        prefills = batch.counts > 1
        if batch.drafts is not None:
            prefills &= batch.drafts.counts == 0
        num_prefills, num_prefill_tokens = int(prefills.sum()), int(batch.counts[prefills].sum())
    return StepShape(
        num_tokens - num_prefill_tokens,
        num_prefills,
        num_prefill_tokens,
        adapted=use is not None and use.in_use,
        drafts=drafting,
    )


def plan_step(batch: Batch, shape: StepShape) -> StepPlan:
    """Lays a batch out in a shape, which must have room for it."""
    parts = batch if batch.drafts is None else _parts_of(batch, batch.drafts)
    num_parts = len(parts.rows)
    starts, part_firsts = parts.starts, np.arange(num_parts)
    if not isinstance(parts, Batch):
        starts, part_firsts = parts.device_starts, parts.firsts
    if int(batch.counts.sum()) == num_parts:
        return _plan_decodes(batch, parts, starts, part_firsts, shape)
    order = np.argsort(parts.counts > 1, kind="stable")
    num_decodes = int((parts.counts == 1).sum())
    # the sequence of the step that each part becomes
    places = np.empty(num_parts, np.int64)
    places[order] = np.arange(num_parts)
    places[order[num_decodes:]] += shape.num_decodes - num_decodes
    arrays = _empty_arrays(shape)
    arrays["rows"][places] = parts.rows
    arrays["starts"][places] = starts
    arrays["counts"][places] = parts.counts
    arrays["counts"][-1] = shape.num_tokens - arrays["counts"][:-1].sum()
    np.cumsum(arrays["counts"], out=arrays["query_starts"][1:])
    arrays["logit_indices"][:] = np.maximum(arrays["query_starts"][1:-1] - 1, 0)
    arrays["sample_rows"][places[parts.samples]] = parts.rows[parts.samples]
    lens = parts.starts + parts.counts
    prefills = order[num_decodes:]
    firsts = places[part_firsts]
    return StepPlan(
        shape=shape,
        flat=np.concatenate(list(arrays.values())),
        output_indices=places[parts.samples],
        first_outputs=firsts[batch.samples],
        firsts=arrays["query_starts"][firsts],
        prefill_lens=tuple(zip(parts.counts[prefills].tolist(), lens[prefills].tolist(), strict=True)),
        max_decode_len=int(lens[order[:num_decodes]].max(initial=0)),
        max_len=int(lens.max()),
    )


def _plan_decodes(
    batch: Batch, parts: Batch | _Parts, starts: Int32, firsts: NDArray[np.intp], shape: StepShape
) -> StepPlan:
    """As `plan_step`, where nobody computes more than a token: they lie as they come, and all else is as in a step of
    padding. starts: as the device is told. firsts: of each sequence's parts.
    """
    rows, samples, num_parts = parts.rows, parts.samples, len(parts.rows)
    flat = _padding(shape).copy()
    flat[:num_parts] = rows
    flat[shape.num_sequences : shape.num_sequences + num_parts] = starts
    sample_rows = flat[len(flat) - shape.num_outputs :]
    output_indices = np.flatnonzero(samples)
    sample_rows[output_indices] = rows[output_indices]
    max_len = int(parts.starts.max()) + 1
    return StepPlan(
        shape=shape,
        flat=flat,
        output_indices=output_indices,
        first_outputs=firsts[batch.samples],
        firsts=firsts.astype(np.int32),
        prefill_lens=(),
        max_decode_len=max_len,
        max_len=max_len,
    )


@dataclass(frozen=True)
class _Parts:
    """A batch whose drafts are sequences of their own: n entries, each sequence's one after another."""

    rows: Int32  # [n]
    starts: Int32  # [n] at most
    counts: Int32  # [n]
    samples: NDArray[np.bool_]  # [n]
    device_starts: Int32  # [n] as the device is told
    firsts: NDArray[np.intp]  # [num_sequences] of each sequence's entries


def _parts_of(batch: Batch, drafts: Drafts) -> _Parts:
    if not drafts.any:
        device_starts = np.where(drafts.unsure > 0, np.int32(-1), batch.starts)
        return _Parts(
            batch.rows, batch.starts, batch.counts, batch.samples, device_starts, np.arange(batch.num_sequences)
        )
    lens = drafts.counts + 1
    firsts = np.cumsum(lens) - lens
    entry = np.repeat(np.arange(len(lens)), lens)
    behind = (np.arange(len(entry)) - firsts[entry]).astype(np.int32)
    starts = batch.starts[entry] + behind
    counts = np.where(drafts.counts > 0, 1, batch.counts)[entry]
    device_starts = np.where(drafts.unsure[entry] > 0, -1 - behind, starts)
    return _Parts(batch.rows[entry], starts, counts, batch.samples[entry], device_starts, firsts)


@lru_cache(maxsize=256)
def _padding(shape: StepShape) -> Int32:
    """Is copied, not written."""
    return plan_of_padding(shape)


def plan_of_padding(shape: StepShape) -> Int32:
    """A plan, joined, of a step without any sequence."""
    arrays = _empty_arrays(shape)
    arrays["counts"][-1] = shape.num_prefill_tokens
    np.cumsum(arrays["counts"], out=arrays["query_starts"][1:])
    arrays["logit_indices"][:] = np.maximum(arrays["query_starts"][1:-1] - 1, 0)
    return np.concatenate(list(arrays.values()))


def _empty_arrays(shape: StepShape) -> Mapping[str, Int32]:
    """A step of nothing but padding: a decode's padding computes a token, a prefill's none."""
    arrays = {name: np.full(length, -1, np.int32) for name, length in array_lengths(shape).items()}
    arrays["starts"][:] = 0
    arrays["counts"][: shape.num_decodes] = 1
    arrays["counts"][shape.num_decodes :] = 0
    arrays["query_starts"][0] = 0
    return arrays
