"""Proposers that are models: they make a step's drafts where a lookup in the text does not (kernels/ngram.py).

A proposer keeps K and V of its own layers in a store beside the target's, under the same page ids, those of the first
KV group: who holds, shares, publishes or copies a page does it in both stores. That holds because a proposer writes its
K and V of exactly the tokens that each step computes, prompts included (`observe`), before the next step begins.

Drafts are made when the step that checks them is launched (`propose`): then their pages are there, the device knows
each row's newest token, and only rows that are to have drafts cost anything. All of it is in the device's order of
work; the host waits for nothing.

    launch n:    target's pass, sampling, results go back, observe
    launch n+1:  rows are brought up to date, propose, target's pass over newest tokens and drafts, ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from paged_backend.batch import MOST_DRAFTING
from paged_backend.models.decoder import Decoder
from paged_backend.models.proposal_head import ProposalHead
from paged_backend.models.step import LayerPages, StepShape, StepTensors
from paged_backend.runner.step_plan import plan_of_padding
from paged_backend.runner.step_tensors import DeviceRows
from paged_kernels.reference import Ops


class Proposer(ABC):
    """A model that makes drafts."""

    def __init__(self, kv_pages: Sequence[LayerPages]) -> None:
        """kv_pages: where each of its layers keeps K and V."""
        self._kv_pages = kv_pages

    @property
    def num_layers(self) -> int:
        """That have K and V."""
        return len(self._kv_pages)

    @abstractmethod
    def observe(self, step: StepTensors) -> None:
        """Writes its K and V of a step's tokens, once the target has computed them and sampled. step: the target's."""

    @abstractmethod
    def propose(self, token_ids: Tensor, lengths: Tensor, rows: Tensor, counts: Tensor) -> None:
        """Writes counts[i] drafts behind the newest token of rows[i] (step_tensors.py: Propose)."""


class DraftModel(Proposer):
    """A small model of the same vocabulary: its drafts are the tokens that it would choose itself.

    Vocabularies are padded to sizes of their own: ids that only one of the models has stand for no text.
    """

    def __init__(
        self,
        decoder: Decoder,
        ops: Ops,
        kv_pages: Sequence[LayerPages],
        passes: DraftPasses,
        vocab_sizes: tuple[int, int],
    ) -> None:
        """vocab_sizes: its own and the target's. ops: for logits of the ids that both have."""
        super().__init__(kv_pages)
        self._decoder, self._ops, self._passes = decoder, ops, passes
        self._num_shared = min(vocab_sizes)
        self._knows_all = vocab_sizes[0] == max(vocab_sizes)  # ids that the target may choose

    def observe(self, step: StepTensors) -> None:
        self._hidden(step)

    def propose(self, token_ids: Tensor, lengths: Tensor, rows: Tensor, counts: Tensor) -> None:
        """A pass over one token of each row for every draft, the newest token first."""
        for number in range(self._passes.begin(lengths, rows, counts)):
            mine = self._passes.rows(number)
            step = self._passes.step(number, mine)
            logits = self._decoder.logits(self._hidden(step))
            token = self._ops.argmax(logits[:, : self._num_shared])
            self._ops.write_tokens(token_ids, mine, lengths[rows] + number, token)

    def _hidden(self, step: StepTensors) -> Tensor:
        if not self._knows_all:
            step = replace(step, input_ids=step.input_ids.clamp(max=self._num_shared - 1))
        return self._decoder.hidden(step, self._kv_pages)


class HeadProposer(Proposer):
    """A head on the target's hidden states (models/proposal_head.py): its drafts follow from the state that it has
    behind each row's newest token but one.
    """

    def __init__(
        self, head: ProposalHead, ops: Ops, pages: LayerPages, tapped: Tensor, rows: DeviceRows, max_len: int
    ) -> None:
        """tapped: [max_tokens, taps * hidden], where each step leaves what the head reads (Decoder.tap). max_len: of a
        sequence, in tokens.
        """
        super().__init__([pages])
        self._head, self._ops, self._pages, self._tapped, self._rows = head, ops, pages, tapped, rows
        self._passes = DraftPasses(rows, max_len)
        # of each row; one more takes what nobody's last entry is
        self._states = tapped.new_zeros(rows.num_rows + 1, head.hidden_size, dtype=head.dtype)

    def observe(self, step: StepTensors) -> None:
        """Enters the step's tokens with those after them, which are known or were sampled just now. Behind a wrong
        draft stands what is entered anew once the right token is.
        """
        plan, rows, num_tokens = step.plan, self._rows, step.shape.num_tokens
        assert rows.lengths is not None
        row_of = torch.repeat_interleave(plan["rows"], plan["counts"], output_size=num_tokens).clamp(min=0)
        following = replace(step, input_ids=rows.token_ids[row_of, step.positions + 1])
        states = self._head.forward(following, self._head.entering(self._tapped[:num_tokens]), self._pages)
        sampled, lens = plan["sample_rows"], step.seq_lens[: step.shape.num_outputs]
        newest = (sampled >= 0) & (rows.lengths[sampled.clamp(min=0)] == lens + 1)
        self._states[torch.where(newest, sampled, rows.num_rows)] = states[plan["logit_indices"]]

    def propose(self, token_ids: Tensor, lengths: Tensor, rows: Tensor, counts: Tensor) -> None:
        """The first draft needs no pass: the newest token was entered when it was sampled."""
        states, token = self._states[rows], rows
        for number in range(self._passes.begin(lengths, rows, counts)):
            mine = self._passes.rows(number)
            if number:
                step = replace(self._passes.step(number - 1, mine), input_ids=token)
                states = self._head.forward(step, states, self._pages)
            token = self._head.guesses(states).to(rows.dtype)
            self._ops.write_tokens(token_ids, mine, lengths[rows] + number, token)


class DraftPasses:
    """The steps that a proposer computes of its own: one token of each row that has drafts, the newest one, then each
    draft behind it.
    """

    def __init__(self, rows: DeviceRows, max_len: int) -> None:
        """max_len: of a sequence, in tokens."""
        self._rows, self._max_len = rows, max_len
        self._page_tables = rows.make_page_tables(MOST_DRAFTING + 1, max_len)
        self._steps: dict[int, StepTensors] = {}  # of so many rows

    def begin(self, lengths: Tensor, rows: Tensor, counts: Tensor) -> int:
        """For these rows and so many drafts of each. Returns how many passes there are.

        The host knows neither lengths nor counts of a GPU, and does not ask: there are passes for the most drafts.
        """
        known = rows.device.type == "cpu"
        self._drafting, self._counts = rows, counts
        self._longest = min(int(lengths[rows].max()) + self._rows.num_drafts, self._max_len) if known else self._max_len
        return int(counts.max()) if known else self._rows.num_drafts

    def rows(self, number: int) -> Tensor:
        """int32 [k]: the rows that have a draft `number`, from 0; -1 in the place of the others."""
        return torch.where(self._counts > number, self._drafting, -1)

    def step(self, behind: int, rows: Tensor) -> StepTensors:
        """The tokens so many places behind the newest of `rows`; those of -1 compute nothing."""
        step = self._step_of(len(rows))
        step.plan["rows"][: len(rows)] = rows
        step.plan["starts"].fill_(-1 - behind)
        self._rows.gather(step)
        return step

    def _step_of(self, num_rows: int) -> StepTensors:
        if num_rows not in self._steps:
            shape = StepShape(num_rows)
            flat = torch.from_numpy(plan_of_padding(shape)).to(self._rows.token_ids.device)
            page_tables = [table[: shape.num_sequences] for table in self._page_tables]
            self._steps[num_rows] = self._rows.make_step(flat, shape, page_tables, self._max_len, 0)
        return replace(self._steps[num_rows], max_decode_len=self._longest)
