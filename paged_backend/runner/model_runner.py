"""Batch -> StepResult: a step's forward pass and sampling. Launches without waiting; results are read in order, when
asked for.

builder.py makes one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from paged_backend.batch import Batch, StepResult
from paged_backend.models.architecture import Architecture
from paged_backend.models.decoder import Decoder
from paged_backend.models.step import LayerPages, StepShape, StepTensors
from paged_backend.runner.adapter_store import AdapterStore
from paged_backend.runner.ask_table import room_of
from paged_backend.runner.asks import ComputedStep
from paged_backend.runner.cuda_graphs import DeviceCapture, StepGraphs
from paged_backend.runner.later_captures import LaterCaptures
from paged_backend.runner.proposer import Proposer
from paged_backend.runner.proposer_graphs import ProposalGraphs
from paged_backend.runner.sampler import Sampler, prompt_tokens_at_once
from paged_backend.runner.step_plan import plan_step, shape_of
from paged_backend.runner.step_tensors import DeviceRows
from paged_backend.runner.transfers import InFlightStep, ResultBuffers
from paged_backend.runner.warm_up import time_largest, warm_up_batches


@dataclass(frozen=True)
class RunnerLimits:
    """What the rest of the engine must know of the checkpoint and the pool."""

    max_model_len: int  # tokens; at most num_pages * page_size, divided by the number of KV groups
    num_pages: int
    page_size: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    bos_id: int | None
    max_num_sequences: int  # as the operator said or the start has chosen; of a step at most max_batched_tokens
    windows: tuple[int | None, ...] = (None,)  # tokens that each KV group keeps of a sequence; None: all


class ModelRunner:
    """Owns the decoder, the KV store and the device rows. Steps run on the device in the order of their launch."""

    def __init__(
        self,
        folder: Path,
        architecture: Architecture,
        limits: RunnerLimits,
        decoder: Decoder,
        sampler: Sampler,
        kv_pages: list[LayerPages],
        rows: DeviceRows,
        adapter_slots: AdapterStore | None = None,
    ) -> None:
        self.folder = folder  # the checkpoint's
        self.architecture = architecture
        self.limits = limits
        self.device = kv_pages[0].tensor.device
        self._decoder = decoder
        self._kv_pages = kv_pages
        self._rows = rows
        self._sampler = sampler
        self.adapter_slots = adapter_slots  # None: this server has no adapters
        self._graphs: StepGraphs | None = None  # None: every step is launched kernel by kernel
        self.later: LaterCaptures | None = None  # None: the start has left nothing to be captured while serving
        self._in_flight: deque[InFlightStep] = deque()
        self._result_buffers = ResultBuffers(self.device)
        self._scored_at_once = prompt_tokens_at_once(rows.num_rows, limits.vocab_size)
        self._proposer: Proposer | None = None  # None: no model makes drafts
        self.timed: tuple[Batch, float] | None = None  # a step of many prompt tokens, and its seconds; None: not yet

    def speculate(self, proposer: Proposer, num_drafts: int) -> None:
        """From now on a model makes the drafts, so many of a row and step at most. To be called before any step."""
        self._proposer = proposer
        self._rows.speculate(proposer.propose, num_drafts)

    @torch.inference_mode()
    def capture(
        self, shapes: Sequence[StepShape], tell: Callable[[str], None], first: Sequence[StepShape] | None = None
    ) -> None:
        """Captures steps of these shapes, the smallest first, as CUDA graphs: from now on a step that fits one of them
        is replayed. first: those that are captured now, the largest before the others; None: all of them. The rest is
        left to `later`.
        """
        started, free = time.monotonic(), torch.cuda.mem_get_info()[0]
        capture = DeviceCapture()
        logits = self._kv_pages[0].tensor.new_empty(
            (max(shape.num_outputs for shape in shapes), self.architecture.num_logits), dtype=self._decoder.dtype
        )
        self._graphs = StepGraphs(
            self._decoder,
            self._sampler,
            self._kv_pages,
            self._rows,
            shapes,
            self.limits.max_model_len,
            logits,
            capture,
        )
        if self._proposer is not None:
            self._graphs.capture_also(self._proposer.observe)
        self._graphs.run_all(tell)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what those steps took: captured ones have memory of their own
        now = shapes[::-1] if first is None else first
        self._graphs.capture(now)
        if self._proposer is not None:
            proposals = ProposalGraphs(self._proposer, self._rows, capture)
            proposals.capture()
            self._rows.propose_with(proposals.propose)
        torch.cuda.synchronize()
        taken = (free - torch.cuda.mem_get_info()[0]) / 2**20
        later = f"; {len(shapes) - len(now)} more while serving" if len(now) < len(shapes) else ""
        tell(
            f"{len(now)} shapes of steps captured, up to {max(shape.num_decodes for shape in now)} sequences that "
            f"decode and {max(shape.num_prefill_tokens for shape in now)} prompt tokens, in "
            f"{time.monotonic() - started:.1f} s, {taken:.0f} MiB{later}"
        )
        if len(now) < len(shapes):
            self.later = LaterCaptures(self._graphs, tell)

    def warm_up(self, max_sequences: int, max_batched_tokens: int) -> None:
        """Runs steps of every kind before the first request comes; rows and pages are free afterwards."""
        limits = self.limits
        sizes = (
            max_batched_tokens,
            max_sequences,
            limits.max_model_len,
            limits.page_size,
            limits.num_pages,
            limits.vocab_size,
        )
        batches = warm_up_batches(*sizes, adapters=self.adapter_slots is not None, num_drafts=self.num_drafts)
        self.timed = time_largest(self.run, batches)

    def run(self, batches: Iterable[Batch]) -> None:
        """Runs steps one after another; nobody wants their results."""
        for batch in batches:
            self.launch(batch)
            for _ in self.finished(0):
                pass

    @property
    def num_rows(self) -> int:
        """Sequences that may run at once."""
        return self._rows.num_rows

    @property
    def num_layers(self) -> int:
        """That keep K and V."""
        return self.architecture.num_layers + (0 if self._proposer is None else self._proposer.num_layers)

    @property
    def num_drafts(self) -> int:
        """Of a sequence in a step, at most; 0: steps have none."""
        return self._rows.num_drafts

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> None:
        """Starts a step. On CUDA it returns before the device is done (with the reference ops it may wait for lengths);
        on a CPU, after.
        """
        for ask in batch.asks:
            room_of(ask).prepare(ask, self)
        shape = shape_of(batch)
        captured = (
            self._graphs.fit(shape)
            if self._graphs is not None and all(room_of(ask).captured for ask in batch.asks)
            else None
        )
        plan = plan_step(batch, captured or shape)
        sampled = hidden = None
        if self._graphs is not None and captured is not None:
            step, logits = self._graphs.forward(self._rows.update(batch, plan), captured)
            sampled = self._graphs.sample(captured, batch.features)
        else:
            step = self._rows.apply(batch, plan)
            hidden = self._decoder.hidden(step, self._kv_pages)
            logits = self._decoder.logits(
                hidden if step.logit_indices is None else hidden.index_select(0, step.logit_indices)
            )
        if sampled is None:
            sampled = self._sampler.sample(logits, self._rows.sampling(batch, step), self._rows)
        found = tuple(room_of(ask).compute(ask, ComputedStep(self, hidden, sampled)) for ask in batch.asks)
        self._in_flight.append(self._result_buffers.send_back(batch, plan.output_indices, sampled, found))
        if self._proposer is not None and (batch.read or plan.prefill_lens):
            self._observe(self._proposer, step, captured)

    def _observe(self, proposer: Proposer, step: StepTensors, captured: StepShape | None) -> None:
        if self._graphs is None or captured is None or not self._graphs.observe(captured):
            proposer.observe(step)

    def finished(self, keep: int) -> Iterator[tuple[Batch, StepResult]]:
        """The oldest steps with their results, until only `keep` are in flight. Waits for the device where it must."""
        while len(self._in_flight) > keep:
            step = self._in_flight.popleft()
            yield step.batch, self._result_buffers.receive(step)

    def score_prompts(self, hidden: Tensor, num_tops: int) -> Tensor:
        """int32 [k, 2 + 2 n] of the tokens that the launched step's prompts want scored (prompt_scores.py). hidden: [T,
        hidden_size]. Few at a time: logits are large.
        """
        at, token_ids = self._rows.prompt_tokens()
        n = min(num_tops, self.limits.vocab_size)
        parts = zip(torch.split(at, self._scored_at_once), torch.split(token_ids, self._scored_at_once), strict=True)
        return torch.cat(
            [
                self._sampler.score(self._decoder.logits(hidden.index_select(0, some)), following, n)
                for some, following in parts
            ]
        )

    def pool(self, hidden: Tensor, counts: Sequence[int]) -> Tensor:
        """int32 [len(counts), hidden_size], float32's bits: sums of the normed states of the tokens that the launched
        step's prompts want pooled (embeddings.py), of which the first counts[0] belong together, and so on. hidden: [T,
        hidden_size].
        """
        at = self._rows.pooled_tokens()
        if max(counts) == 1:
            return self._decoder.normed(hidden.index_select(0, at)).float().view(torch.int32)
        parts = torch.split(at, list(counts))
        return torch.stack(
            [self._decoder.normed(hidden.index_select(0, part)).sum(0, dtype=torch.float32) for part in parts]
        ).view(torch.int32)
