"""Steps as CUDA graphs: a few hundred kernel launches become two.

Steps are captured in fixed shapes (step_plan.py): every number of decodes up to a rounding, alone, and a few numbers of
decodes beside a few numbers of prompt tokens. A step runs in the smallest shape that holds it, the rest is padding;
only one with many prompt tokens, which keeps the device busy anyway, is launched kernel by kernel. A server with
adapters has each shape twice, with their kernels and without; where attention packs drafts (kernels/decode_plan.py),
steps with drafts have shapes of their own. Each shape has a graph up to the logits and one from there to the rows for
each common kind of sampling. A graph reads its plan from one small tensor and everything else (last tokens, page
tables, temperatures, adapters) from the device rows, so nothing of a step is baked in.

A start runs every shape once, which compiles what it needs, and captures `first_shapes`; an engine that serves captures
the others meanwhile, a graph at a time (later_captures.py). A shape that steps ask for comes before the rest.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from paged_backend.batch import MOST_DRAFTING, Feature
from paged_backend.models.decoder import Decoder
from paged_backend.models.step import LayerPages, StepShape, StepTensors
from paged_backend.runner.sampler import Sampler
from paged_backend.runner.step_plan import plan_of_padding, plan_size
from paged_backend.runner.step_tensors import DeviceRows, SampleTensors
from paged_backend.runner.transfers import Sampled

T = TypeVar("T")
_CAPTURED_FEATURES = (0, Feature.RANDOM, Feature.RANDOM | Feature.TRUNCATE)
_OBSERVED = -1  # beside the kinds of sampling: no features have it
_PROGRESS_SECONDS = 1.0
_FIRST_DECODES = 8  # steps of up to so many decodes are captured before the first request
_MOST_PADDING = 4  # until a shape is captured, its steps run in one of up to so many times its tokens
_PREFILLS = 8  # sequences of a captured step that compute more than a token
_PREFILL_TOKENS = (128, 512, 1024)


def decode_sizes(max_sequences: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8 to 64, of 16 to 256, of 64 beyond; the last is max_sequences. Padding costs at most a
    quarter of a step's rows.
    """
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(320, max_sequences + 64, 64)]
    return [size for size in sizes if size < max_sequences] + [max_sequences]


def captured_shapes(
    max_sequences: int, max_tokens: int, adapters: bool = False, num_drafts: int = 0, packs_runs: bool = False
) -> list[StepShape]:
    """All shapes, the smallest first. adapters: each once more, for steps in which some sequence has one: the others
    stay as fast as they are. packs_runs: steps with drafts have shapes of their own, for the same reason.
    """
    drafting = min(min(max_sequences, MOST_DRAFTING) * (1 + num_drafts), max_tokens)  # each draft is a decode, too
    decodes = [StepShape(size) for size in decode_sizes(max_sequences if packs_runs else max(max_sequences, drafting))]
    if packs_runs:
        decodes += [StepShape(size, drafts=True) for size in decode_sizes(drafting) if size > 1]
    beside = [size for size in (0, 16, 64, 128) if size < max_sequences] + [max_sequences]
    mixed = [
        StepShape(size, _PREFILLS, tokens) for size in beside for tokens in _PREFILL_TOKENS if tokens <= max_tokens
    ]
    plain = sorted(decodes + mixed, key=lambda shape: (shape.num_tokens, shape.num_outputs, not shape.drafts))
    return plain + [replace(shape, adapted=True) for shape in plain if adapters]


def first_shapes(shapes: Sequence[StepShape]) -> list[StepShape]:
    """What is captured before the first request: of steps with adapters and of those without, the largest, since the
    others fit into its memory, and those of few decodes. In that order.
    """
    first = []
    for adapted in (False, True):
        kind = [shape for shape in shapes if shape.adapted == adapted]
        few = [shape for shape in kind if not shape.num_prefills and shape.num_decodes <= _FIRST_DECODES]
        first += list(dict.fromkeys([*kind[-1:], *few]))
    return first


class Graph(Protocol):
    def replay(self) -> None:
        """Does the captured work again, in the device's order of work."""


class Capture(Protocol):
    def __call__(self, work: Callable[[], T]) -> tuple[Graph, T]:
        """Captures what the work launches, which has been launched before; nothing is computed. Returns what the work
        returned, filled by each replay.
        """


class DeviceCapture:
    """Captures work on the current CUDA device; all graphs share memory.

    torch.cuda.graph would wait for the device and give its free memory back before each: dozens of graphs would take a
    start several times as long, and a capture beside running steps would hold them up.
    """

    def __init__(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._pool = torch.cuda.graph_pool_handle()
        # torch's own, which has the libraries' scratch memory from the graphs that were captured to be measured
        self._stream = torch.cuda.graph(torch.cuda.CUDAGraph()).capture_stream

    def __call__(self, work: Callable[[], T]) -> tuple[Graph, T]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # NCCL's watchdog asks for events on a thread of its own meanwhile, which must not end the capture
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with suppress(RuntimeError):  # of a capture that ends badly, too: what comes first is what is told
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, result


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
        self._speculates = rows.lengths is not None
        self.forward: Graph | None = None  # None: not captured yet
        # features -> the graph that chooses tokens, and where it leaves them
        self.samplings: dict[int, tuple[Graph, Sampled]] = {}

    def sampling(self, features: int) -> SampleTensors:
        return SampleTensors(
            rows=self.step.plan["sample_rows"],
            positions=self.step.seq_lens[: self.step.shape.num_outputs],
            features=features,
            input_ids=self.step.input_ids if self._speculates else None,
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
        capture: Capture,
    ) -> None:
        """shapes: from the smallest to the largest, those for adapters after the others. max_len: longest sequence, in
        tokens.
        logits: where every step leaves its own, enough rows for any. Nothing is captured yet: `run_all` comes first."""
        self._decoder, self._sampler, self._kv_pages, self._rows = decoder, sampler, kv_pages, rows
        self._shapes = tuple(shapes)
        self._flat = torch.zeros(max(plan_size(shape) for shape in shapes), dtype=torch.int32, device=logits.device)
        self._capture = capture
        # of one step after another, whatever its shape
        page_tables = rows.make_page_tables(max(shape.num_sequences for shape in shapes), max_len)
        self._steps = {
            shape: _Captured(
                rows,
                self._flat[: plan_size(shape)],
                [table[: shape.num_sequences] for table in page_tables],
                shape,
                max_len,
                logits[: shape.num_outputs],
            )
            for shape in shapes
        }
        self._observe: Callable[[StepTensors], None] | None = None
        self._waiting = list(shapes)  # to be captured, the next first
        self._graphs_of_next: Iterator[None] = iter(())  # of the shape that is being captured

    def capture_also(self, observe: Callable[[StepTensors], None]) -> None:
        """From now on each shape has one more graph: what a proposer does with a step that was sampled."""
        self._observe = observe

    @property
    def num_waiting(self) -> int:
        """Shapes of which no graph was captured yet."""
        return len(self._waiting)

    def fit(self, shape: StepShape) -> StepShape | None:
        """The smallest captured shape that has room; None: there is none. If it is not the smallest of all shapes that
        have, that one will be captured next. Drafts come to the same in a shape that has none.
        """
        best: StepShape | None = None
        for there in self._shapes:
            if (
                there.adapted == shape.adapted
                and there.drafts <= shape.drafts
                and there.num_decodes >= shape.num_decodes
                and there.num_prefills >= shape.num_prefills
                and there.num_prefill_tokens >= shape.num_prefill_tokens
            ):
                if self._steps[there].forward is not None:
                    return there if best is None or there.num_tokens <= _MOST_PADDING * best.num_tokens else None
                if best is None:
                    best = there
                    self._prefer(there)
        return None

    def forward(self, plan: Tensor, shape: StepShape) -> tuple[StepTensors, Tensor]:
        """plan: int32 [plan_size(shape)], of a captured shape. Returns the step's tensors and the logits
        [shape.num_outputs, vocab].
        """
        captured = self._steps[shape]
        assert captured.forward is not None, f"{shape} was not captured"
        self._flat[: plan_size(shape)].copy_(plan)
        captured.forward.replay()
        return captured.step, captured.logits

    def sample(self, shape: StepShape, features: int) -> Sampled | None:
        """The tokens after `forward`, appended to their rows: [shape.num_outputs]. None: this kind of sampling is not
        captured.
        """
        captured = self._steps[shape].samplings.get(features)
        if captured is None:
            return None
        graph, sampled = captured
        graph.replay()
        return sampled

    def observe(self, shape: StepShape) -> bool:
        """What `capture_also` was told of, after `sample`. False: it is not captured."""
        found = self._steps[shape].samplings.get(_OBSERVED)
        if found is not None:
            found[0].replay()
        return found is not None

    def run_all(self, tell: Callable[[str], None]) -> None:
        """Runs a step of padding in each shape, the largest first: that compiles kernels and makes libraries choose
        theirs, which a capture does not allow.
        """
        reported = time.monotonic()
        for number, shape in enumerate(reversed(self._shapes)):
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                tell(f"running steps of each shape: {number} of {len(self._shapes)}")
            self._flat.fill_(-1)
            self._flat[: plan_size(shape)].copy_(torch.from_numpy(plan_of_padding(shape)))
            for work in self._works(self._steps[shape]).values():
                work()

    def capture(self, shapes: Sequence[StepShape]) -> None:
        """Captures these, in their order. The largest must be the first of all: the others fit into its memory."""
        for shape in shapes:
            self._waiting.remove(shape)
            for _ in self._graphs_of(shape):
                pass

    def capture_next(self) -> bool:
        """Captures a single graph; False if there is none left."""
        for _ in self._graphs_of_next:
            return True
        if not self._waiting:
            return False
        self._graphs_of_next = self._graphs_of(self._waiting.pop(0))
        return self.capture_next()

    def give_up(self) -> None:
        """Leaves the rest as it is: such steps run in larger shapes, or kernel by kernel."""
        self._waiting, self._graphs_of_next = [], iter(())

    def _prefer(self, shape: StepShape) -> None:
        if shape in self._waiting[1:]:
            self._waiting.remove(shape)
            self._waiting.insert(0, shape)

    def _graphs_of(self, shape: StepShape) -> Iterator[None]:
        """Captures a shape's graphs, one for each that is asked for: the forward pass, then each kind of sampling."""
        captured = self._steps[shape]
        works = self._works(captured)
        captured.forward, _ = self._capture(works.pop(None))
        yield
        for features, work in works.items():
            assert features is not None
            captured.samplings[features] = self._capture(work)
            yield

    def _works(self, captured: _Captured) -> dict[int | None, Callable[[], Any]]:
        """What there is to capture of a shape, in order: None: the forward pass; features: such sampling; _OBSERVED:
        what a proposer does with it.
        """
        works: dict[int | None, Callable[[], Any]] = {None: partial(self._forward, captured)}
        for features in _CAPTURED_FEATURES:
            works[features] = partial(self._sampler.sample, captured.logits, captured.sampling(features), self._rows)
        if self._observe is not None:
            works[_OBSERVED] = partial(self._observe, captured.step)
        return works

    def _forward(self, captured: _Captured) -> Tensor:
        self._rows.gather(captured.step)
        return self._decoder.forward(captured.step, self._kv_pages, captured.logits)
