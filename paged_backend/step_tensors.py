"""Batch -> device tensors: the rows that live on the device, and the only copy from host to device a step makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import paged_kernels.reference as reference
from paged_backend.batch import Batch, Feature, Int32, NewRow, TokenEdit, TokenMasks
from paged_backend.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKENS
from paged_backend.staging import Staging
from paged_backend.step_plan import StepPlan, StepShape

_MIN_TEMPERATURE = 1e-5  # below it logits / temperature drowns the random numbers anyway, and may overflow
_MAX_BAD_WORD_ENTRIES = 2 * MAX_BAD_WORDS  # a word may be two: with and without a space before it

# columns of a row's parameters; the floats are stored as their bits. The seed comes first and their number is even: it is read as one int64
_COLUMNS = ("seed_low", "seed_high", "prompt_len", "min_len", "top_k", "num_bias", "num_stop", "num_bad_words", "masked", "berth")
_FLOAT_COLUMNS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
_COLUMN = {name: index for index, name in enumerate(_COLUMNS + _FLOAT_COLUMNS)}


class RowOps(Protocol):
    """What the rows are kept with: `paged_kernels.reference`, which documents each op, or kernels of the same names."""

    def write_spans(self, target: Tensor, spans: Tensor, values: Tensor) -> None: ...
    def update_page_tables(self, page_tables: Tensor, updates: Tensor) -> None: ...
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
    ) -> None: ...


@dataclass(frozen=True)
class SampleTensors:
    """What the sampler needs of a step: M rows, in the order of the step's outputs."""

    rows: Tensor  # int32 [M]; -1: what is chosen is dropped
    positions: Tensor  # int32 [M] of the token to sample: how many tokens the sequence has
    features: int  # Batch.features
    max_len: int = 0  # the largest position
    num_bias: int = 0  # widest of the rows' tables
    num_stop: int = 0
    num_bad_words: int = 0
    num_top_logprobs: int = 0
    beams: Tensor | None = None  # int32 [b] outputs of which the likeliest continuations are wanted
    num_candidates: int = 0  # so many
    masked: bool = False  # some row may choose certain tokens only


@dataclass(frozen=True)
class StepTensors:
    """One step for the decoder, laid out by step_plan.py: D decodes, then prefills, S sequences in all; T tokens, M of them with logits."""

    shape: StepShape
    plan: Mapping[str, Tensor]  # int32, the arrays of StepShape.lengths
    input_ids: Tensor  # int32 [T]
    positions: Tensor  # int64 [T]
    slot_mapping: Tensor  # int64 [T] page_id * page_size + offset; -1 for padding
    page_table: Tensor  # int32 [S, pages of the longest sequence]
    seq_lens: Tensor  # int32 [S] after this step; 0 for padding
    max_decode_len: int  # no decode is longer, after this step
    max_query_len: int  # no prefill computes more tokens
    prefill_lens: tuple[tuple[int, int], ...]  # (query_len, seq_len) of each prefill, where the host knows them

    @property
    def query_starts(self) -> Tensor:
        """int32 [S + 1]: first token of each sequence, and T."""
        return self.plan["query_starts"]

    @property
    def logit_indices(self) -> Tensor | None:
        """int32 [M]: tokens whose successors may be sampled; None: all."""
        return self.plan["logit_indices"] if self.shape.num_prefills else None


@dataclass(frozen=True)
class RowParameters:
    """Parameters of chosen rows, one entry each."""

    block: Tensor  # int32 [k, columns]

    def integers(self, name: str) -> Tensor:
        return self.block[:, _COLUMN[name]]

    def floats(self, name: str) -> Tensor:
        return self.block.view(torch.float32)[:, _COLUMN[name]]


class DeviceRows:
    """What the device knows of each running sequence: its tokens, its page table, its sampling parameters.

    Invariant: after `update(batch, plan)` a row has every token up to batch.starts + batch.counts, and the pages of those tokens.
    """

    def __init__(
        self,
        num_rows: int,
        max_model_len: int,
        page_size: int,
        num_eos_ids: int,
        device: torch.device,
        ops: RowOps = reference,
        copy_pages: Callable[[Tensor], None] = lambda copies: None,
    ) -> None:
        """copy_pages: does a batch's page_copies, int32 [k, 2], in the store; the rows have no page themselves."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.token_ids = zeros(num_rows, max_model_len + 1)  # prompt and sampled tokens
        self.page_table = zeros(num_rows, -(-max_model_len // page_size))
        self.page_size = page_size
        self._ops = ops
        self._copy_pages = copy_pages
        self._parameters = zeros(num_rows, len(_COLUMN))
        self._zeros = zeros
        self.token_masks = zeros(num_rows, 0)  # int32 [num_rows, ceil(vocab / 32)] of the rows that may choose certain tokens only; no width before the first
        self._tables: dict[str, Tensor] = {}  # allocated when the first row needs one
        self._table_shapes = {
            "bias_ids": (num_rows, MAX_LOGIT_BIAS),
            "bias_values": (num_rows, MAX_LOGIT_BIAS),  # float32 bits
            "stop_ids": (num_rows, MAX_STOP_TOKENS + num_eos_ids),
            "bad_words": (num_rows, _MAX_BAD_WORD_ENTRIES, MAX_BAD_WORD_TOKENS),
        }
        self._staging = Staging(device)
        self._sent: dict[str, Tensor] = {}  # valid until the next update
        # what the host must know of a row to size a step's sampling
        self._sizes = {name: np.zeros(num_rows, np.int32) for name in ("num_bias", "num_stop", "num_bad_words", "num_top_logprobs", "masked")}

    # ---- reading rows

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def seeds(self) -> Tensor:
        """int64 [num_rows], all 64 bits."""
        return self._parameters.view(torch.int64)[:, _COLUMN["seed_low"] // 2]

    @property
    def temperature(self) -> Tensor:
        """float32 [num_rows]; 0: greedy."""
        return RowParameters(self._parameters).floats("temperature")

    @property
    def truncation(self) -> tuple[Tensor, Tensor, Tensor]:
        """top_k int32, top_p float32, min_p float32: [num_rows]; 0, 1, 0: none."""
        every = RowParameters(self._parameters)
        return every.integers("top_k"), every.floats("top_p"), every.floats("min_p")

    @property
    def berths(self) -> Tensor:
        """int32 [num_rows], strided; -1: no adapter."""
        return RowParameters(self._parameters).integers("berth")

    def parameters(self, rows: Tensor) -> RowParameters:
        return RowParameters(self._parameters[rows])

    def history(self, rows: Tensor, max_len: int) -> Tensor:
        """int32 [k, max_len]: the rows' first tokens."""
        return self.token_ids[:, :max_len][rows]

    def recent(self, rows: Tensor, positions: Tensor, count: int) -> Tensor:
        """int32 [k, count]: the tokens before `positions`, -2 where there are none."""
        at = positions[:, None] - torch.arange(count, 0, -1, device=rows.device)
        return torch.where(at >= 0, self.token_ids[rows[:, None], at.clamp(min=0)], -2)

    def bias(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """logit_bias: ids int32 [k, width], -1 where there are fewer; values float32 [k, width]."""
        return self._entries("bias_ids", "num_bias", rows, width), self._table("bias_values")[rows, :width].view(torch.float32)

    def stop_ids(self, rows: Tensor, width: int) -> Tensor:
        """int32 [k, width], -1 where there are fewer."""
        return self._entries("stop_ids", "num_stop", rows, width)

    def bad_words(self, rows: Tensor, width: int) -> Tensor:
        """int32 [k, width, MAX_BAD_WORD_TOKENS], right-aligned, -1 where there are fewer."""
        return self._entries("bad_words", "num_bad_words", rows, width)

    def _entries(self, table: str, count: str, rows: Tensor, width: int) -> Tensor:
        entries = self._table(table)[rows, :width]
        absent = torch.arange(width, device=rows.device) >= self.parameters(rows).integers(count)[:, None]
        return entries.masked_fill(absent.view(*absent.shape, *[1] * (entries.dim() - 2)), -1)

    # ---- writing rows

    def update(self, batch: Batch, plan: StepPlan) -> Tensor:
        """Brings the rows up to date with a batch and brings the plan to the device: int32 [plan.shape.size]. Copies to the device once."""
        for new in batch.new_rows:
            self._note(new)
        sections = {"plan": plan.flat, "page_updates": batch.page_updates}
        if batch.new_rows:
            sections |= _new_row_sections(batch.new_rows)
        masks = _masks_to_write(batch)
        if masks is not None:
            sections |= {"mask_spans": _mask_spans(masks), "masks": masks.words}
        if batch.token_edits:
            sections |= _edit_sections(batch.token_edits)
        if len(batch.page_copies):
            sections["page_copies"] = batch.page_copies
        if batch.beams is not None:
            sections["beams"] = plan.slots[batch.beams.sampled].astype(np.int32)
        if batch.prompts:
            sections["prompt_tokens"] = _prompt_tokens(batch, plan)
        sent = self._sent = self._staging.send(sections)
        self._write(batch, sent)
        return sent["plan"]

    def apply(self, batch: Batch, plan: StepPlan) -> StepTensors:
        """`update`, and the tensors of a step that is computed at once."""
        longest = max((query_len for query_len, _ in plan.prefill_lens), default=0)
        step = self.make_step(self.update(batch, plan), plan.shape, plan.max_len, plan.max_decode_len, longest, plan.prefill_lens)
        self.gather(step)
        return step

    def make_step(
        self, flat: Tensor, shape: StepShape, max_len: int, max_decode_len: int, max_query_len: int, prefill_lens: tuple[tuple[int, int], ...] = ()
    ) -> StepTensors:
        """Tensors for a step whose plan is, or will be, in `flat`; `gather` fills them."""
        new = self.token_ids.new_empty
        return StepTensors(
            shape=shape,
            plan=dict(zip(shape.lengths, torch.split(flat, list(shape.lengths.values())), strict=True)),
            input_ids=new(shape.num_tokens),
            positions=new(shape.num_tokens, dtype=torch.int64),
            slot_mapping=new(shape.num_tokens, dtype=torch.int64),
            page_table=new(shape.num_sequences, -(-max_len // self.page_size)),
            seq_lens=new(shape.num_sequences),
            max_decode_len=max_decode_len,
            max_query_len=max_query_len,
            prefill_lens=prefill_lens,
        )

    def gather(self, step: StepTensors) -> None:
        """Fills a step's tensors from the rows of its plan."""
        plan = step.plan
        self._ops.gather_step(
            plan["rows"],
            plan["starts"],
            plan["counts"],
            plan["query_starts"][:-1],
            self.token_ids,
            self.page_table,
            self.page_size,
            input_ids=step.input_ids,
            positions=step.positions,
            slot_mapping=step.slot_mapping,
            page_table=step.page_table,
            seq_lens=step.seq_lens,
        )

    def sampling(self, batch: Batch, step: StepTensors) -> SampleTensors:
        """What the sampler needs of a step."""
        sampled, features = batch.rows[batch.samples], batch.features
        return SampleTensors(
            rows=step.plan["sample_rows"],
            positions=step.seq_lens[: step.shape.num_outputs],
            features=features,
            max_len=int((batch.starts + batch.counts).max()),
            num_bias=self._widest("num_bias", sampled) if features & Feature.BIAS else 0,
            num_stop=self._widest("num_stop", sampled) if features & Feature.BIAS else 0,
            num_bad_words=self._widest("num_bad_words", sampled) if features & Feature.BAD_WORDS else 0,
            num_top_logprobs=self._widest("num_top_logprobs", batch.rows) if features & Feature.TOP_LOGPROBS else 0,
            beams=None if batch.beams is None else self._sent["beams"],
            num_candidates=0 if batch.beams is None else batch.beams.num_candidates,
            masked=bool(features & Feature.MASK and self._widest("masked", sampled)),
        )

    def prompt_tokens(self) -> tuple[Tensor, Tensor]:
        """Of the last update: int32 [k] which of the step's tokens leave their logits for prompt_logprobs, and int32 [k] the tokens after them."""
        at, rows, positions = self._sent["prompt_tokens"]
        return at, self.token_ids[rows, positions]

    def _widest(self, name: str, rows: Int32) -> int:
        return int(self._sizes[name][rows].max(initial=0))

    def _note(self, new: NewRow) -> None:
        s = new.sampling
        sizes = (len(s.logit_bias), _num_stop(new), len(new.bad_words), s.logprobs or 0, _masked(new))
        for column, size in zip(self._sizes.values(), sizes, strict=True):
            column[new.row] = size

    def _write(self, batch: Batch, sent: Mapping[str, Tensor]) -> None:
        if batch.new_rows:
            self._ops.write_spans(self.token_ids, sent["token_spans"], sent["new_tokens"])
            self._ops.write_spans(self._parameters, sent["parameter_spans"], sent["new_parameters"])
            for name in self._table_shapes:
                if name in sent:
                    *where, values = sent[name]
                    self._table(name)[tuple(where)] = values
        if batch.token_edits:
            self._ops.write_spans(self.token_ids, sent["edit_spans"], sent["edited_tokens"])
        if len(batch.page_copies):
            self._copy_pages(sent["page_copies"])
        if len(batch.page_updates):
            self._ops.update_page_tables(self.page_table, sent["page_updates"])
        if "masks" in sent:
            if not self.token_masks.shape[1]:
                self.token_masks = self._zeros(len(self.token_ids), sent["masks"].shape[1])
            self._ops.write_spans(self.token_masks, sent["mask_spans"], sent["masks"].view(-1))

    def _table(self, name: str) -> Tensor:
        if name not in self._tables:
            self._tables[name] = self._zeros(*self._table_shapes[name])
        return self._tables[name]


def _new_row_sections(new_rows: tuple[NewRow, ...]) -> dict[str, Int32]:
    """Everything about rows that were taken since the step before. Table entries are columns: row, place(s) in the row, value."""
    sections = {
        "token_spans": _spans(new_rows, np.array([len(new.token_ids) for new in new_rows], np.int32)),
        "new_tokens": np.concatenate([new.token_ids for new in new_rows]),
        "parameter_spans": _spans(new_rows, np.full(len(new_rows), len(_COLUMN), np.int32)),
        "new_parameters": np.concatenate([_parameter_block(new) for new in new_rows]),
    }
    tables: dict[str, list[Any]] = {"bias_ids": [], "stop_ids": [], "bad_words": []}
    values: list[float] = []
    for new in new_rows:
        tables["bias_ids"] += [(new.row, index, token_id) for index, token_id in enumerate(new.sampling.logit_bias)]
        values += new.sampling.logit_bias.values()
        tables["stop_ids"] += [(new.row, index, token_id) for index, token_id in enumerate(new.stop_ids[: _num_stop(new)])]
        for index, word in enumerate(new.bad_words):
            padded = [-1] * (MAX_BAD_WORD_TOKENS - len(word)) + list(word)
            tables["bad_words"] += [(new.row, index, place, token_id) for place, token_id in enumerate(padded)]
    sections |= {name: np.array(entries, np.int32).T for name, entries in tables.items() if entries}
    if values:
        sections["bias_values"] = np.concatenate([sections["bias_ids"][:2], np.array([values], np.float32).view(np.int32)])
    return sections


def _spans(new_rows: tuple[NewRow, ...], lens: Int32) -> Int32:
    """Where values that lie end to end belong: int32 [k, 4], row, column 0, start, length."""
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
    return {"edit_spans": np.stack(columns, axis=1), "edited_tokens": np.concatenate([edit.token_ids for edit in edits])}


def _prompt_tokens(batch: Batch, plan: StepPlan) -> Int32:
    """int32 [3, k]: which token of the step, and the row and position of the one after it."""
    columns = []
    for span in batch.prompts:
        positions = np.arange(span.start, span.start + span.count, dtype=np.int32)
        at = plan.firsts[span.entry] + positions - batch.starts[span.entry]
        columns.append(np.stack([at, np.full_like(positions, batch.rows[span.entry]), positions + 1]))
    return np.concatenate(columns, axis=1)


def _masks_to_write(batch: Batch) -> TokenMasks | None:
    """Those of new rows, which stay, and those of this step."""
    fixed = [(new.row, new.allowed) for new in batch.new_rows if new.allowed is not None]
    if not fixed:
        return batch.masks
    rows, words = np.array([row for row, _ in fixed], np.int32), np.stack([allowed for _, allowed in fixed])
    if batch.masks is None:
        return TokenMasks(rows, words)
    return TokenMasks(np.concatenate([rows, batch.masks.rows]), np.concatenate([words, batch.masks.words]))


def _mask_spans(masks: TokenMasks) -> Int32:
    """As `_spans`."""
    count, width = masks.words.shape
    places = np.arange(count, dtype=np.int32) * width
    return np.stack([masks.rows, np.zeros_like(places), places, np.full_like(places, width)], axis=1)


def _parameter_block(new: NewRow) -> Int32:
    """One row's parameters in the order of the columns: int32 [columns]."""
    s = new.sampling
    seed = np.array([new.seed & (2**64 - 1)], np.uint64).view(np.int32)  # little-endian: low word first
    min_len = min(new.prompt_len + s.min_tokens, 2**31 - 1)
    integers = [*seed.tolist(), new.prompt_len, min_len, max(s.top_k, 0), len(s.logit_bias), _num_stop(new), len(new.bad_words), _masked(new), new.berth]
    floats = [0.0 if s.greedy else max(s.temperature, _MIN_TEMPERATURE), s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty]
    return np.concatenate([np.array(integers, np.int32), np.array(floats, np.float32).view(np.int32)])


def _masked(new: NewRow) -> bool:
    return new.sampling.guided or new.allowed is not None


def _num_stop(new: NewRow) -> int:
    """Stop ids that the sampler must know: without min_tokens, none; a grammar's mask takes care of them, and lets them through where nothing else is left."""
    return len(new.stop_ids) if new.sampling.min_tokens > 0 and not new.sampling.guided else 0
