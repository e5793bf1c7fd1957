"""Steps as CUDA graphs: a few hundred kernel launches become two.

Steps are captured in fixed shapes (step_plan.py): every number of decodes up to a rounding, alone, and a few numbers of
decodes beside a few numbers of prompt tokens. A step runs in the smallest shape that holds it, the rest is padding;
only one with many prompt tokens, which keeps the device busy anyway, is launched kernel by kernel. A server with
adapters has each shape twice, with their kernels and without. Each shape has a graph up to the logits and one from
there to the rows for each common kind of sampling. A graph reads its plan from one small tensor and everything else
(last tokens, page tables, temperatures, adapters) from the device rows, so nothing of a step is baked in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from paged_backend.batch import Feature
from paged_backend.models.decoder import Decoder
from paged_backend.models.step import LayerPages, StepShape, StepTensors
from paged_backend.runner.sampler import Sampler
from paged_backend.runner.step_plan import plan_of_padding, plan_size
from paged_backend.runner.step_tensors import DeviceRows, SampleTensors
from paged_backend.runner.transfers import Sampled

T = TypeVar("T")
_CAPTURED_FEATURES = (0, Feature.RANDOM, Feature.RANDOM | Feature.TRUNCATE)
_PROGRESS_SECONDS = 1.0


_PREFILLS = 8  # sequences of a captured step that compute more than a token
_PREFILL_TOKENS = (128, 512, 1024)


def decode_sizes(max_sequences: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8 to 64, of 16 to 256, of 64 beyond; the last is max_sequences. Padding costs at most a
    quarter of a step's rows.
    """
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(320, max_sequences + 64, 64)]
    return [size for size in sizes if size < max_sequences] + [max_sequences]


def captured_shapes(max_sequences: int, max_tokens: int, adapters: bool = False) -> list[StepShape]:
    """All shapes, the smallest first. adapters: each once more, for steps in which some sequence has one: the others
    stay as fast as they are.
    """
    decodes = [StepShape(size) for size in decode_sizes(max_sequences)]
    beside = [size for size in (0, 16, 64, 128) if size < max_sequences] + [max_sequences]
    mixed = [
        StepShape(size, _PREFILLS, tokens) for size in beside for tokens in _PREFILL_TOKENS if tokens <= max_tokens
    ]
    plain = sorted(decodes + mixed, key=lambda shape: (shape.num_tokens, shape.num_outputs))
    return plain + [replace(shape, adapted=True) for shape in plain if adapters]


class _Captured:
    """A step of a shape: what it computes with, and what it leaves."""

    def __init__(
        self,
        rows: DeviceRows,
        flat: Tensor,
        page_tables: Sequence[Tensor],
        shape: StepShape,
        max_len: int,
        logits: Tensor,
    ) -> None:
        """flat: int32 [plan_size(shape)], where the plan will be. page_tables: of each KV group, int32
        [shape.num_sequences, pages].
        logits: [shape.num_outputs, vocab]."""
        self.logits = logits
        self.step = rows.make_step(flat, shape, page_tables, max_len, shape.num_prefill_tokens)
        self.forward = torch.cuda.CUDAGraph()
        # features -> the graph that chooses tokens, and where it leaves them
        self.samplings: dict[int, tuple[torch.cuda.CUDAGraph, Sampled]] = {}

    def sampling(self, features: int) -> SampleTensors:
        return SampleTensors(
            rows=self.step.plan["sample_rows"],
            positions=self.step.seq_lens[: self.step.shape.num_outputs],
            features=features,
        )


class StepGraphs:
    """Captured steps: the forward pass, and for the common kinds of sampling the choice of tokens. What a replay leaves
    is valid until the next.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampler: Sampler,
        kv_pages: Sequence[LayerPages],
        rows: DeviceRows,
        shapes: Sequence[StepShape],
        max_len: int,
        logits: Tensor,
        tell: Callable[[str], None],
    ) -> None:
        """shapes: from the smallest to the largest, those for adapters after the others. max_len: longest sequence, in
        tokens.
        logits: where every step leaves its own, enough rows for any."""
        self._decoder, self._sampler, self._kv_pages, self._rows = decoder, sampler, kv_pages, rows
        self._shapes = tuple(shapes)
        self._flat = torch.zeros(max(plan_size(shape) for shape in shapes), dtype=torch.int32, device=logits.device)
        self._pool: Any = None  # torch's handle of the memory that all graphs share
        self._captured: dict[StepShape, _Captured] = {}
        self._capture_all(max_len, logits, tell)

    def fit(self, shape: StepShape) -> StepShape | None:
        """The smallest captured shape that has room; None: there is none."""
        for captured in self._shapes:
            if (
                captured.adapted == shape.adapted
                and captured.num_decodes >= shape.num_decodes
                and captured.num_prefills >= shape.num_prefills
                and captured.num_prefill_tokens >= shape.num_prefill_tokens
            ):
                return captured
        return None

    def forward(self, plan: Tensor, shape: StepShape) -> tuple[StepTensors, Tensor]:
        """plan: int32 [plan_size(shape)], of a captured shape. Returns the step's tensors and the logits
        [shape.num_outputs, vocab].
        """
        captured = self._captured[shape]
        self._flat[: plan_size(shape)].copy_(plan)
        captured.forward.replay()
        return captured.step, captured.logits

    def sample(self, shape: StepShape, features: int) -> Sampled | None:
        """The tokens after `forward`, appended to their rows: [shape.num_outputs]. None: this kind of sampling is not
        captured.
        """
        captured = self._captured[shape].samplings.get(features)
        if captured is None:
            return None
        graph, sampled = captured
        graph.replay()
        return sampled

    def _capture_all(self, max_len: int, logits: Tensor, tell: Callable[[str], None]) -> None:
        """The largest first: the smaller ones fit into its memory."""
        started = reported = time.monotonic()
        free = torch.cuda.mem_get_info()[0]
        # of one step after another, whatever its shape
        page_tables = self._rows.make_page_tables(max(shape.num_sequences for shape in self._shapes), max_len)
        for number, shape in enumerate(reversed(self._shapes)):
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                tell(f"capturing steps {100 * number // len(self._shapes)} % ({number} of {len(self._shapes)} shapes)")
            self._flat.fill_(-1)
            self._flat[: plan_size(shape)].copy_(torch.from_numpy(plan_of_padding(shape)))
            tables = [table[: shape.num_sequences] for table in page_tables]
            captured = _Captured(
                self._rows, self._flat[: plan_size(shape)], tables, shape, max_len, logits[: shape.num_outputs]
            )
            self._capture(captured.forward, partial(self._forward, captured))
            for features in _CAPTURED_FEATURES:
                graph = torch.cuda.CUDAGraph()
                sampled = self._capture(
                    graph, partial(self._sampler.sample, captured.logits, captured.sampling(features), self._rows)
                )
                captured.samplings[features] = graph, sampled
            self._captured[shape] = captured
        torch.cuda.synchronize()
        taken = (free - torch.cuda.mem_get_info()[0]) / 2**20
        tell(
            f"{len(self._shapes)} shapes of steps captured, up to "
            f"{max(shape.num_decodes for shape in self._shapes)} sequences that decode and "
            f"{max(shape.num_prefill_tokens for shape in self._shapes)} prompt tokens, in "
            f"{time.monotonic() - started:.1f} s, {taken:.0f} MiB"
        )

    def _forward(self, captured: _Captured) -> Tensor:
        self._rows.gather(captured.step)
        return self._decoder.forward(captured.step, self._kv_pages, captured.logits)

    def _capture(self, graph: torch.cuda.CUDAGraph, work: Callable[[], T]) -> T:
        """Runs the work, which compiles the kernels and lets the libraries choose theirs, which a capture does not
        allow; then captures it.
        """
        work()
        # NCCL's watchdog asks for events on a thread of its own meanwhile, which must not end the capture
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        self._pool = self._pool or graph.pool()
        return result
