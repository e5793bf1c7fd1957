"""Batch -> device tensors: the rows that live on the device, and the only copy from host to device a step makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paged_backend.arrays import Int32
from paged_backend.batch import Batch, BeamRows, Feature
from paged_backend.models.step import GroupTensors, StepShape, StepTensors
from paged_backend.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKENS
from paged_backend.runner.step_plan import StepPlan, array_lengths
from paged_backend.runner.step_sections import COLUMN, SIZES, sections_of, sizes_of
from paged_backend.runner.transfers import Staging
from paged_kernels.reference import Ops, reference

# Writes so many drafts behind each row's tokens: (token_ids int32 [num_rows, max_model_len + 1], lengths int32
# [num_rows], rows int32 [k], how many int32 [k]).
Propose = Callable[[Tensor, Tensor, Tensor, Tensor], None]
_MAX_BAD_WORD_ENTRIES = 2 * MAX_BAD_WORDS  # a word may be two: with and without a space before it


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
    # Masks behind drafts, int32 [d, words], and of each row its own among them, int32 [M], -1: it is the row's; None:
    # there are none
    masks_ahead: tuple[Tensor, Tensor] | None = None
    # int32 [M] at least: the token that each was sampled behind; None: there are no drafts, no row comes twice
    input_ids: Tensor | None = None


@dataclass(frozen=True)
class RowParameters:
    """Parameters of chosen rows, one entry each."""

    block: Tensor  # int32 [k, columns]

    def integers(self, name: str) -> Tensor:
        return self.block[:, COLUMN[name]]

    def floats(self, name: str) -> Tensor:
        return self.block.view(torch.float32)[:, COLUMN[name]]


class DeviceRows:
    """What the device knows of each running sequence: its tokens, its page table, its sampling parameters.

    Invariant: after `update(batch, plan)` a row has every token up to batch.starts + batch.counts, and the pages of
        those tokens.
    """

    def __init__(
        self,
        num_rows: int,
        max_model_len: int,
        page_size: int,
        num_eos_ids: int,
        device: torch.device,
        ops: Ops = reference,
        copy_pages: Callable[[Tensor], None] = lambda copies: None,
        num_groups: int = 1,
    ) -> None:
        """copy_pages: does a batch's page_copies, int32 [k, 2], in the store; the rows have no page themselves."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.token_ids = zeros(num_rows, max_model_len + 1)  # prompt and sampled tokens
        width = -(-max_model_len // page_size)
        self.page_table = zeros(num_rows, num_groups * width)  # of each KV group, side by side
        self._group_tables = torch.split(self.page_table, width, dim=1)
        self.page_size = page_size
        self._ops = ops
        self._copy_pages = copy_pages
        self.lengths: Tensor | None = None  # int32 [num_rows] tokens of each; None: no step ever has drafts
        self.num_drafts = 0  # of a row in a step, at most
        self._propose: Propose | None = None
        self._repeat: Propose | None = None  # of some rows instead
        self._parameters = zeros(num_rows, len(COLUMN))
        self._zeros = zeros
        # int32 [num_rows, ceil(vocab / 32)] of the rows that may choose certain tokens only; no width before the first
        self.token_masks = zeros(num_rows, 0)
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
        self._sizes = {name: np.zeros(num_rows, np.int32) for name in SIZES}

    def speculate(self, propose: Propose, num_drafts: int) -> None:
        """From now on steps may have drafts, which `propose` makes, so many of a row. To be called before any step."""
        self._propose, self.num_drafts = propose, num_drafts
        self.lengths = self._zeros(self.num_rows)

    def propose_with(self, propose: Propose) -> None:
        """From now on it makes the drafts, as many."""
        self._propose = propose

    def repeat_with(self, repeat: Propose) -> None:
        """From now on it comes behind the proposer: drafts of rows whose text repeats itself are its own."""
        self._repeat = repeat

    def copy_pages_also(self, copy_pages: Callable[[Tensor], None]) -> None:
        """Pages lie in a second store, too, in which this does a batch's page_copies."""
        first = self._copy_pages

        def both(copies: Tensor) -> None:
            first(copies)
            copy_pages(copies)

        self._copy_pages = both

    # ---- reading rows

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def seeds(self) -> Tensor:
        """int64 [num_rows], all 64 bits."""
        return self._parameters.view(torch.int64)[:, COLUMN["seed_low"] // 2]

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
    def adapter_slots(self) -> Tensor:
        """int32 [num_rows], strided; -1: no adapter."""
        return RowParameters(self._parameters).integers("adapter slot")

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
        return self._entries("bias_ids", "num_bias", rows, width), self._table("bias_values")[rows, :width].view(
            torch.float32
        )

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
        """Brings the rows up to date with a batch and brings the plan to the device: int32 [plan_size(plan.shape)].
        Copies to the device once.
        """
        for new in batch.new_rows:
            for name, size in sizes_of(new).items():
                self._sizes[name][new.row] = size
        sections = {"plan": plan.flat}
        rare = batch.new_rows or batch.asks or batch.token_edits or batch.drafts is not None
        if rare or len(batch.page_updates) or len(batch.page_copies):
            sections |= sections_of(batch, plan)
        sent = self._sent = self._staging.send(sections)
        self._write(batch, sent)
        if "drafting" in sent:
            assert self._propose is not None and self.lengths is not None
            self._propose(self.token_ids, self.lengths, *sent["drafting"])
            if self._repeat is not None:
                self._repeat(self.token_ids, self.lengths, *sent["drafting"])
        return sent["plan"]

    def apply(self, batch: Batch, plan: StepPlan) -> StepTensors:
        """`update`, and the tensors of a step that is computed at once."""
        longest = max((query_len for query_len, _ in plan.prefill_lens), default=0)
        page_tables = [
            self.token_ids.new_empty(plan.shape.num_sequences, -(-plan.max_len // self.page_size))
            for _ in self._group_tables
        ]
        step = self.make_step(
            self.update(batch, plan), plan.shape, page_tables, plan.max_decode_len, longest, plan.prefill_lens
        )
        self.gather(step, sure=batch.drafts is None)
        return step

    def make_step(
        self,
        flat: Tensor,
        shape: StepShape,
        page_tables: Sequence[Tensor],
        max_decode_len: int,
        max_query_len: int,
        prefill_lens: tuple[tuple[int, int], ...] = (),
    ) -> StepTensors:
        """Tensors for a step whose plan is, or will be, in `flat`; `gather` fills them. page_tables: of each KV group,
        int32 [sequences, pages of the longest].
        """
        new, lengths = self.token_ids.new_empty, array_lengths(shape)
        return StepTensors(
            shape=shape,
            plan=dict(zip(lengths, torch.split(flat, list(lengths.values())), strict=True)),
            input_ids=new(shape.num_tokens),
            positions=new(shape.num_tokens, dtype=torch.int64),
            groups=tuple(
                [GroupTensors(new(shape.num_tokens, dtype=torch.int64), page_table) for page_table in page_tables]
            ),
            seq_lens=new(shape.num_sequences),
            max_decode_len=max_decode_len,
            max_query_len=max_query_len,
            prefill_lens=prefill_lens,
        )

    def make_page_tables(self, num_sequences: int, max_len: int) -> list[Tensor]:
        """For captured steps of so many sequences of up to max_len tokens: of each KV group int32 [num_sequences,
        pages], page 0 everywhere, for padding is read, too.
        """
        return [self.token_ids.new_zeros(num_sequences, -(-max_len // self.page_size)) for _ in self._group_tables]

    def gather(self, step: StepTensors, sure: bool = False) -> None:
        """Fills a step's tensors from the rows of its plan. All but page tables and slots are the same for every KV
        group. sure: no start of the plan hangs on a length that only the device knows.
        """
        plan = step.plan
        for page_table, group in zip(self._group_tables, step.groups, strict=True):
            self._ops.gather_step(
                plan["rows"],
                plan["starts"],
                plan["counts"],
                plan["query_starts"][:-1],
                self.token_ids,
                page_table,
                self.page_size,
                input_ids=step.input_ids,
                positions=step.positions,
                slot_mapping=group.slot_mapping,
                page_table=group.page_table,
                seq_lens=step.seq_lens,
                lengths=None if sure else self.lengths,
            )

    def sampling(self, batch: Batch, step: StepTensors) -> SampleTensors:
        """What the sampler needs of a step."""
        sampled, features = batch.rows[batch.samples], batch.features
        beams = batch.ask(BeamRows) if features & Feature.BEAM else None
        return SampleTensors(
            rows=step.plan["sample_rows"],
            positions=step.seq_lens[: step.shape.num_outputs],
            features=features,
            max_len=int((batch.starts + batch.counts).max()),
            num_bias=self._widest("num_bias", sampled) if features & Feature.BIAS else 0,
            num_stop=self._widest("num_stop", sampled) if features & Feature.BIAS else 0,
            num_bad_words=self._widest("num_bad_words", sampled) if features & Feature.BAD_WORDS else 0,
            num_top_logprobs=self._widest("num_top_logprobs", batch.rows) if features & Feature.TOP_LOGPROBS else 0,
            beams=None if beams is None else self._sent["beams"],
            num_candidates=0 if beams is None else beams.num_candidates,
            masked=bool(features & Feature.MASK and self._widest("masked", sampled)),
            masks_ahead=(self._sent["masks_ahead"], self._sent["outputs_ahead"])
            if "masks_ahead" in self._sent
            else None,
            input_ids=None if batch.drafts is None else step.input_ids,
        )

    def prompt_tokens(self) -> tuple[Tensor, Tensor]:
        """Of the last update: int32 [k] which of the step's tokens leave their logits for prompt_logprobs, and int32
        [k] the tokens after them.
        """
        at, rows, positions = self._sent["prompt_tokens"]
        return at, self.token_ids[rows, positions]

    def pooled_tokens(self) -> Tensor:
        """Of the last update: int32 [k] which of the step's tokens leave their hidden states for embeddings."""
        return self._sent["pooled_tokens"]

    def _widest(self, name: str, rows: Int32) -> int:
        return int(self._sizes[name][rows].max(initial=0))

    def _write(self, batch: Batch, sent: Mapping[str, Tensor]) -> None:
        if batch.new_rows:
            self._ops.write_spans(self.token_ids, sent["token_spans"], sent["new_tokens"])
            self._ops.write_spans(self._parameters, sent["parameter_spans"], sent["new_parameters"])
            if self.lengths is not None:
                rows, _, _, lengths = sent["token_spans"].T
                self.lengths[rows] = lengths
            for name in self._table_shapes:
                if name in sent:
                    *where, values = sent[name]
                    self._table(name)[tuple(where)] = values
        if "adapter_slots" in sent:
            rows, adapter_slots = sent["adapter_slots"]
            self.adapter_slots[rows] = adapter_slots
        if "edit_spans" in sent:
            self._ops.write_spans(self.token_ids, sent["edit_spans"], sent["edited_tokens"])
        if "page_copies" in sent:
            self._copy_pages(sent["page_copies"])
        if "page_updates" in sent:
            self._ops.update_page_tables(self.page_table, sent["page_updates"])
        if "masks" in sent:
            if not self.token_masks.shape[1]:
                self.token_masks = self._zeros(len(self.token_ids), sent["masks"].shape[1])
            self._ops.write_spans(self.token_masks, sent["mask_spans"], sent["masks"].view(-1))

    def _table(self, name: str) -> Tensor:
        if name not in self._tables:
            self._tables[name] = self._zeros(*self._table_shapes[name])
        return self._tables[name]
