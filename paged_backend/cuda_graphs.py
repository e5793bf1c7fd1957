"""Decode steps as CUDA graphs: a few hundred kernel launches become one.

Two graphs per batch size (*bucket*), one up to the logits and one from there to the rows (one for each common kind of sampling); a step runs in the smallest
bucket that holds it, the rest is padding. A graph reads which rows run and where they stand from one small tensor; everything else (last tokens, page tables,
temperatures) it finds in the device rows, so nothing of a step is baked in.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from paged_backend.batch import Feature
from paged_backend.models.decoder import Decoder
from paged_backend.sampler import Sampled, Sampler
from paged_backend.step_tensors import DeviceRows, SampleTensors, StepTensors

T = TypeVar("T")
_CAPTURED_FEATURES = (0, Feature.RANDOM, Feature.RANDOM | Feature.TRUNCATE)
_PROGRESS_SECONDS = 1.0


def bucket_sizes(max_sequences: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8 to 64, of 16 to 256, of 64 beyond; the last is max_sequences. Padding costs at most a quarter of a step's rows."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(320, max_sequences + 64, 64)]
    return [size for size in sizes if size < max_sequences] + [max_sequences]


class _Captured:
    """A decode step of up to `size` sequences: what it computes with, and what it leaves."""

    def __init__(self, rows: DeviceRows, inputs: Tensor, logits: Tensor) -> None:
        """inputs: int32 [2 * size], rows (-1: padding), then starts; logits [size, vocab]."""
        size, device = len(inputs) // 2, inputs.device
        self.logits = logits
        self._rows, self._row_ids, self._starts = rows, inputs[:size], inputs[size:]
        self._ones = torch.ones(size, dtype=torch.int32, device=device)
        self._query_starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        self._inputs = rows.empty_inputs(size, size, rows.page_table.shape[1])
        self._inputs["page_table"].zero_()
        self.forward = torch.cuda.CUDAGraph()
        self.samplings: dict[int, tuple[torch.cuda.CUDAGraph, Sampled]] = {}  # features -> the graph that chooses tokens, and where it leaves them

    def gather(self) -> StepTensors:
        """Launches the gathering; the tensors are valid once it has run."""
        self._rows.gather(self._row_ids, self._starts, self._ones, self._query_starts, self._inputs)
        return StepTensors(
            **self._inputs,
            query_starts=self._query_starts,
            logit_indices=None,
            num_decodes=len(self._row_ids),
            max_decode_len=self._inputs["page_table"].shape[1] * self._rows.page_size,
            prefill_lens=(),
            sampling=None,
        )

    def sampling(self, features: int) -> SampleTensors:
        """A new token's position is the length of its sequence."""
        return SampleTensors(rows=self._row_ids, positions=self._inputs["seq_lens"], features=features)


class DecodeGraphs:
    """Captured decode-only steps: the forward pass, and for the common kinds of sampling the choice of tokens. What a replay leaves is valid until the next."""

    def __init__(
        self,
        decoder: Decoder,
        sampler: Sampler,
        kv_pages: Sequence[Tensor],
        rows: DeviceRows,
        max_sequences: int,
        logits: Tensor,
        tell: Callable[[str], None],
    ) -> None:
        """logits: [max_sequences, vocab], where every captured step leaves its own."""
        self._decoder, self._sampler, self._kv_pages, self._rows = decoder, sampler, kv_pages, rows
        self._sizes = bucket_sizes(max_sequences)
        self._inputs = torch.full((2 * max_sequences,), -1, dtype=torch.int32, device=logits.device)
        self._pool: Any = None  # torch's handle of the memory that all graphs share
        self._steps: dict[int, _Captured] = {}
        self._capture_all(logits, tell)

    def bucket(self, num_sequences: int) -> int:
        return self._sizes[bisect_left(self._sizes, num_sequences)]

    def forward(self, inputs: Tensor, num_sequences: int) -> Tensor:
        """inputs: int32 [2 * bucket], rows (-1: padding) and starts. Returns the logits [num_sequences, vocab]."""
        step = self._steps[len(inputs) // 2]
        self._inputs[: len(inputs)].copy_(inputs)
        step.forward.replay()
        return step.logits[:num_sequences]

    def sample(self, num_sequences: int, features: int) -> Sampled | None:
        """The tokens after `forward`, appended to their rows: [num_sequences]. None: this kind of sampling is not captured."""
        captured = self._steps[self.bucket(num_sequences)].samplings.get(features)
        if captured is None:
            return None
        graph, sampled = captured
        graph.replay()
        return Sampled(sampled.token_ids[:num_sequences])

    def _capture_all(self, logits: Tensor, tell: Callable[[str], None]) -> None:
        """The largest first: the smaller ones fit into its memory."""
        started = told = time.monotonic()
        free = torch.cuda.mem_get_info()[0]
        for number, size in enumerate(reversed(self._sizes)):
            if time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                tell(f"capturing decode steps {100 * number // len(self._sizes)} % ({number} of {len(self._sizes)} batch sizes)")
            step = _Captured(self._rows, self._inputs[: 2 * size], logits[:size])
            self._capture(step.forward, lambda step=step: self._decoder.forward(step.gather(), self._kv_pages, step.logits))  # type: ignore[misc]
            for features in _CAPTURED_FEATURES:
                graph, sampling = torch.cuda.CUDAGraph(), step.sampling(features)
                sampled = self._capture(graph, lambda step=step, sampling=sampling: self._sampler.sample(step.logits, sampling, self._rows))  # type: ignore[misc]
                step.samplings[features] = graph, sampled
            self._steps[size] = step
        torch.cuda.synchronize()
        taken = (free - torch.cuda.mem_get_info()[0]) / 2**20
        tell(f"decode steps captured for {len(self._sizes)} batch sizes up to {self._sizes[-1]} in {time.monotonic() - started:.1f} s, {taken:.0f} MiB")

    def _capture(self, graph: torch.cuda.CUDAGraph, work: Callable[[], T]) -> T:
        """Runs the work, which compiles the kernels and lets the libraries choose theirs, which a capture does not allow; then captures it."""
        work()
        with torch.cuda.graph(graph, pool=self._pool):
            result = work()
        self._pool = self._pool or graph.pool()
        return result
