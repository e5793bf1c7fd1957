"""Batch -> StepResult: a step's forward pass and sampling. Launches without waiting; results are read in order, when asked for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from paged_backend.batch import Batch, StepResult
from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.architecture import Architecture
from paged_backend.models.checkpoint import Checkpoint, open_checkpoint
from paged_backend.models.decoder import Decoder
from paged_backend.models.rope import rope_table
from paged_backend.models.weights import allocate_weights, load_weights, randomise_weights, weight_bytes
from paged_backend.runner.adapter_store import AdapterStore, allocate_adapter_store
from paged_backend.runner.cuda_graphs import StepGraphs, captured_shapes
from paged_backend.runner.kv_store import allocate_kv_store, free_bytes, prompt_tokens_at_once, size_pool
from paged_backend.runner.sampler import Sampler
from paged_backend.runner.sizing_lock import alone_on
from paged_backend.runner.step_plan import plan_step, shape_of
from paged_backend.runner.step_results import InFlightStep, ResultBuffers
from paged_backend.runner.step_tensors import DeviceRows
from paged_backend.runner.warm_up import warm_up_batches
from paged_backend.units import spell_bytes
from paged_kernels.reference import Ops, reference

_FP8_CAPABILITY = (8, 9)  # Ada and Hopper convert to and from it; the Triton language refuses it on older ones


@dataclass(frozen=True)
class RunnerLimits:
    """What the rest of the engine must know of the checkpoint and the pool."""

    max_model_len: int  # tokens; at most num_pages * page_size
    num_pages: int
    page_size: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    bos_id: int | None


class ModelRunner:
    """Owns the decoder, the KV store and the device rows. Steps run on the device in the order of their launch."""

    def __init__(
        self,
        folder: Path,
        architecture: Architecture,
        limits: RunnerLimits,
        decoder: Decoder,
        sampler: Sampler,
        kv_pages: list[Tensor],
        rows: DeviceRows,
        device: torch.device,
        graphs: StepGraphs | None,
        adapter_slots: AdapterStore | None = None,
    ) -> None:
        self.folder = folder  # the checkpoint's
        self.architecture = architecture
        self.limits = limits
        self.device = device
        self._decoder = decoder
        self._kv_pages = kv_pages
        self._rows = rows
        self._sampler = sampler
        self.adapter_slots = adapter_slots  # None: this server has no adapters
        self._graphs = graphs  # None: every step is launched kernel by kernel
        self._in_flight: deque[InFlightStep] = deque()
        self._result_buffers = ResultBuffers(device)
        self._scored_at_once = prompt_tokens_at_once(rows.num_rows, limits.vocab_size)

    @classmethod
    @torch.inference_mode()
    def load(cls, config: EngineConfig, tell: Callable[[str], None], checkpoint: Checkpoint | None = None) -> ModelRunner:
        """Reads the checkpoint, sizes the pool, allocates everything a step needs. `tell` hears of progress and of every decision, a sentence each.

        checkpoint: if it was opened already.

        Raises:
            EngineError: the checkpoint cannot be run, or does not fit; one sentence for the operator.
        """
        device = _device(config.device)
        checkpoint = checkpoint or open_checkpoint(config)  # which may be fetched first: nobody has to wait for that
        with alone_on(device, tell):
            return cls._load(config, device, tell, checkpoint)

    @classmethod
    def _load(cls, config: EngineConfig, device: torch.device, tell: Callable[[str], None], checkpoint: Checkpoint) -> ModelRunner:
        """As `load`, with nobody else taking the device's memory meanwhile."""
        a = checkpoint.architecture
        dtype, kv_dtype = _dtypes(config, a, device)
        tell(f"model: {a.name}, {a.num_layers} layers, vocabulary {a.vocab_size}, on {_name(device)} in {_dtype_name(dtype)}, KV in {_dtype_name(kv_dtype)}")
        for warning in checkpoint.warnings:
            tell(warning)
        _check_room(a, dtype, device)
        size_pool(config, a, dtype, kv_dtype, device, weight_bytes(a, dtype))  # refuses what cannot fit before the weights are read
        weights = allocate_weights(a, dtype, device)
        adapter_slots = allocate_adapter_store(config, a, dtype, device)
        if adapter_slots is not None:
            tell(adapter_slots.reported)
        if config.load_format == "dummy":
            tell(randomise_weights(weights, a, config.seed))
        else:
            tell(load_weights(weights, checkpoint.folder, tell))
        size = size_pool(config, a, dtype, kv_dtype, device)
        tell(size.decided_by)
        kv_pages = allocate_kv_store(size, a, config.page_size, kv_dtype, device)
        eos_ids = tuple(token_id for token_id in checkpoint.eos_ids if 0 <= token_id < a.vocab_size)  # no other is ever chosen
        limits = RunnerLimits(size.max_model_len, size.num_pages, config.page_size, a.vocab_size, eos_ids, checkpoint.bos_id)
        max_sequences = min(config.max_num_sequences, config.max_batched_tokens)
        ops = _make_ops(config, a, max_sequences, dtype, kv_dtype, device, tell)
        rows = DeviceRows(max_sequences, size.max_model_len, config.page_size, len(limits.eos_ids), device, ops, partial(ops.copy_pages, kv_pages))
        shapes = captured_shapes(max_sequences, config.max_batched_tokens, adapters=adapter_slots is not None)
        largest_step = max(config.max_batched_tokens, max(shape.num_tokens for shape in shapes))
        adapted = None if adapter_slots is None else adapter_slots.products(ops, weights, rows.adapter_slots, largest_step)
        decoder, sampler = Decoder(weights, rope_table(a.rope, size.max_model_len, device), ops, adapted), Sampler(ops)
        graphs = None
        if config.cuda_graphs and ops is not reference:
            logits = torch.empty(max(shape.num_outputs for shape in shapes), a.vocab_size, dtype=dtype, device=device)
            graphs = StepGraphs(decoder, sampler, kv_pages, rows, shapes, limits.max_model_len, logits, tell)
        runner = cls(checkpoint.folder, a, limits, decoder, sampler, kv_pages, rows, device, graphs, adapter_slots)
        if ops is not reference:
            started = time.monotonic()
            runner.warm_up(max_sequences, config.max_batched_tokens)
            tell(f"kernels warmed up in {time.monotonic() - started:.1f} s")
        return runner

    def warm_up(self, max_sequences: int, max_batched_tokens: int) -> None:
        """Runs steps of every kind before the first request comes; rows and pages are free afterwards."""
        limits = self.limits
        sizes = max_batched_tokens, max_sequences, limits.max_model_len, limits.page_size, limits.num_pages, limits.vocab_size
        for batch in warm_up_batches(*sizes, adapters=self.adapter_slots is not None):
            self.launch(batch)
            for _ in self.finished(0):
                pass

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> None:
        """Starts a step. On CUDA it returns before the device is done (with the reference ops it may wait for lengths); on a CPU, after."""
        for adapter_slot, adapter in batch.adapters:
            assert self.adapter_slots is not None
            self.adapter_slots.fill(adapter_slot, adapter)
        shape = shape_of(batch)
        captured = None if self._graphs is None or batch.prompts else self._graphs.fit(shape)  # a captured step keeps the logits of its outputs only
        plan = plan_step(batch, captured or shape)
        sampled = prompts = None
        if self._graphs is not None and captured is not None:
            step, logits = self._graphs.forward(self._rows.update(batch, plan), captured)
            sampled = self._graphs.sample(captured, batch.features)
        else:
            step = self._rows.apply(batch, plan)
            hidden = self._decoder.hidden(step, self._kv_pages)
            logits = self._decoder.logits(hidden if step.logit_indices is None else hidden.index_select(0, step.logit_indices))
            prompts = self._score_prompts(batch, hidden) if batch.prompts else None
        if sampled is None:
            sampled = self._sampler.sample(logits, self._rows.sampling(batch, step), self._rows)
        self._in_flight.append(self._result_buffers.send_back(batch, plan.output_indices, sampled, prompts))

    def finished(self, keep: int) -> Iterator[tuple[Batch, StepResult]]:
        """The oldest steps with their results, until only `keep` are in flight. Waits for the device where it must."""
        while len(self._in_flight) > keep:
            step = self._in_flight.popleft()
            yield step.batch, self._result_buffers.receive(step)

    def _score_prompts(self, batch: Batch, hidden: Tensor) -> Tensor:
        """int32 [k, 2 + 2 n] of the tokens of all the batch's PromptSpans. hidden: [T, hidden_size]. Few at a time: logits are large."""
        at, token_ids = self._rows.prompt_tokens()
        n = min(max(span.num_tops for span in batch.prompts), self.limits.vocab_size)
        parts = zip(torch.split(at, self._scored_at_once), torch.split(token_ids, self._scored_at_once), strict=True)
        return torch.cat([self._sampler.score(self._decoder.logits(hidden.index_select(0, some)), following, n) for some, following in parts])


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise EngineError(f"device: {name} is asked for, but torch finds no CUDA device")
        device = torch.device(name if ":" in name else "cuda:0")
        if (device.index or 0) >= torch.cuda.device_count():
            raise EngineError(f"device: {name} is asked for, but there are {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def _check_room(a: Architecture, dtype: torch.dtype, device: torch.device) -> None:
    """A CPU's memory is promised before it is there: a process that takes more than there is gets killed, without a word."""
    needed, free = weight_bytes(a, dtype), free_bytes(device)
    if needed > free:
        raise EngineError(
            f"the weights do not fit into the memory of {_name(device)}: {spell_bytes(needed)} in {_dtype_name(dtype)}, {spell_bytes(free)} are free"
        )


def _make_ops(
    config: EngineConfig, a: Architecture, max_sequences: int, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device, tell: Callable[[str], None]
) -> Ops:
    """Kernels on CUDA, plain torch elsewhere and where the kernels do not reach."""
    if device.type != "cuda":
        return reference
    if config.page_size & (config.page_size - 1) or kv_dtype.itemsize > dtype.itemsize:
        tell("kernels: off, they want a page_size that is a power of two, and K and V of no more bits than the weights; plain torch computes, slowly")
        return reference
    from paged_kernels.cuda_ops import CudaOps

    return CudaOps(
        num_heads=a.attention.num_heads,
        num_kv_heads=a.attention.num_kv_heads,
        head_dim=a.attention.head_dim,
        sliding_windows=a.sliding_windows,
        vocab_size=a.vocab_size,
        max_sequences=max_sequences,
        max_outputs=max(shape.num_outputs for shape in captured_shapes(max_sequences, config.max_batched_tokens)),
        kv_dtype=kv_dtype,
        device=device,
    )


def _dtypes(config: EngineConfig, architecture: Architecture, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Types of weights and activations, and of the KV store."""
    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else architecture.dtype  # type: ignore[assignment]
    kv_name = name if config.kv_dtype == "auto" else config.kv_dtype
    if kv_name == "fp8_e4m3" and device.type == "cuda" and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        raise EngineError(f"kv_dtype: fp8_e4m3 needs a GPU of compute capability {'.'.join(map(str, _FP8_CAPABILITY))}; {_name(device)} has less")
    return getattr(torch, name), torch.float8_e4m3fn if kv_name == "fp8_e4m3" else getattr(torch, kv_name)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
