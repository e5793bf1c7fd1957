"""Batch and plan -> what the device's rows have to learn before a step, in plain arrays: sections of the one copy there
(transfers.py).

Values that lie end to end come with spans that say where they belong: int32 [k, 4], row, first column, start among the
values, length.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.batch import Batch, Feature, NewRow, TokenEdit
from paged_backend.request import MAX_BAD_WORD_TOKENS
from paged_backend.runner.ask_table import room_of
from paged_backend.runner.step_plan import StepPlan

_NO_ADAPTER = -1  # until the row is given an adapter slot (adapter_store.py)
_MIN_TEMPERATURE = 1e-5  # below it logits / temperature drowns the random numbers anyway, and may overflow

# columns of a row's parameters; the floats are stored as their bits. The seed comes first and their number is even: it
# is read as one int64
_INTEGERS = (
    "seed_low",
    "seed_high",
    "prompt_len",
    "min_len",
    "top_k",
    "num_bias",
    "num_stop",
    "num_bad_words",
    "masked",
    "adapter slot",
)
_FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
COLUMN = {name: index for index, name in enumerate(_INTEGERS + _FLOATS)}

# what the host must know of a row to size a step's sampling
SIZES = ("num_bias", "num_stop", "num_bad_words", "num_top_logprobs", "masked")


def sizes_of(new: NewRow) -> dict[str, int]:
    """SIZES of a row that was taken."""
    s = new.sampling
    return dict(
        zip(SIZES, (len(s.logit_bias), _num_stop(new), len(new.bad_words), s.logprobs or 0, _masked(new)), strict=True)
    )


def sections_of(batch: Batch, plan: StepPlan) -> dict[str, Int32]:
    """By name; those that a step does not need are not there."""
    sections = _new_row_sections(batch.new_rows) if batch.new_rows else {}
    if len(batch.page_updates):
        sections["page_updates"] = batch.page_updates
    given = () if batch.drafts is None else batch.drafts.given
    if batch.token_edits or given:
        sections |= _edit_sections(batch.token_edits + given)
    if len(batch.page_copies):
        sections["page_copies"] = batch.page_copies
    if batch.drafts is not None and batch.drafts.any:
        drafting = batch.drafts.counts > 0
        if given:
            drafting &= ~np.isin(batch.rows, [edit.row for edit in given])
        if not given or drafting.any():
            sections["drafting"] = np.stack([batch.rows[drafting], batch.drafts.counts[drafting]])
    for ask in batch.asks:
        sections |= room_of(ask).sections(ask, batch, plan)
    return sections


def _new_row_sections(new_rows: tuple[NewRow, ...]) -> dict[str, Int32]:
    """Everything about rows that were taken since the step before. Table entries are columns: row, place(s) in the row,
    value.
    """
    sections = {
        "token_spans": _spans(new_rows, np.array([len(new.token_ids) for new in new_rows], np.int32)),
        "new_tokens": np.concatenate([new.token_ids for new in new_rows]),
        "parameter_spans": _spans(new_rows, np.full(len(new_rows), len(COLUMN), np.int32)),
        "new_parameters": np.concatenate([_parameter_block(new) for new in new_rows]),
    }
    tables: dict[str, list[Any]] = {"bias_ids": [], "stop_ids": [], "bad_words": []}
    values: list[float] = []
    for new in new_rows:
        tables["bias_ids"] += [(new.row, index, token_id) for index, token_id in enumerate(new.sampling.logit_bias)]
        values += new.sampling.logit_bias.values()
        tables["stop_ids"] += [
            (new.row, index, token_id) for index, token_id in enumerate(new.stop_ids[: _num_stop(new)])
        ]
        for index, word in enumerate(new.bad_words):
            padded = [-1] * (MAX_BAD_WORD_TOKENS - len(word)) + list(word)
            tables["bad_words"] += [(new.row, index, place, token_id) for place, token_id in enumerate(padded)]
    sections |= {name: np.array(entries, np.int32).T for name, entries in tables.items() if entries}
    if values:
        sections["bias_values"] = np.concatenate(
            [sections["bias_ids"][:2], np.array([values], np.float32).view(np.int32)]
        )
    return sections


def _spans(new_rows: tuple[NewRow, ...], lens: Int32) -> Int32:
    """Of values that begin at column 0."""
    rows = np.array([new.row for new in new_rows], np.int32)
    return np.stack([rows, np.zeros_like(rows), np.cumsum(lens, dtype=np.int32) - lens, lens], axis=1)


def _edit_sections(edits: tuple[TokenEdit, ...]) -> dict[str, Int32]:
    lens = np.array([len(edit.token_ids) for edit in edits], np.int32)
    columns = [
        np.array([edit.row for edit in edits], np.int32),
        np.array([edit.start for edit in edits], np.int32),
        np.cumsum(lens, dtype=np.int32) - lens,
        lens,
    ]
    return {
        "edit_spans": np.stack(columns, axis=1),
        "edited_tokens": np.concatenate([edit.token_ids for edit in edits]),
    }


def _parameter_block(new: NewRow) -> Int32:
    """One row's parameters in the order of the columns: int32 [columns]."""
    s = new.sampling
    seed = np.array([new.seed & (2**64 - 1)], np.uint64).view(np.int32)  # little-endian: low word first
    min_len = min(new.prompt_len + s.min_tokens, 2**31 - 1)
    integers = [
        *seed.tolist(),
        new.prompt_len,
        min_len,
        max(s.top_k, 0),
        len(s.logit_bias),
        _num_stop(new),
        len(new.bad_words),
        _masked(new),
        _NO_ADAPTER,
    ]
    floats = [
        0.0 if s.greedy else max(s.temperature, _MIN_TEMPERATURE),
        s.top_p,
        s.min_p,
        s.repetition_penalty,
        s.presence_penalty,
        s.frequency_penalty,
    ]
    return np.concatenate([np.array(integers, np.int32), np.array(floats, np.float32).view(np.int32)])


def _masked(new: NewRow) -> bool:
    return bool(new.features & Feature.MASK)


def _num_stop(new: NewRow) -> int:
    """Stop ids that the sampler must know: without min_tokens, none; a grammar's mask takes care of them, and lets them
    through where nothing else is left.
    """
    return len(new.stop_ids) if new.sampling.min_tokens > 0 and not new.sampling.guided else 0
