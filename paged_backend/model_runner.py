"""Batch -> StepResult: a step's forward pass and sampling. Launches without waiting; results are read in order, when asked for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import paged_kernels.reference as reference
from paged_backend.batch import Batch, Feature, Int64, StepResult
from paged_backend.config import EngineConfig
from paged_backend.cuda_graphs import StepGraphs, captured_shapes
from paged_backend.errors import EngineError
from paged_backend.kv_store import allocate_kv_store, size_pool
from paged_backend.models.architecture import Architecture
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.models.decoder import Decoder
from paged_backend.models.rope import rope_table
from paged_backend.models.weights import allocate_weights, load_weights, randomise_weights
from paged_backend.sampler import Sampled, Sampler
from paged_backend.step_plan import plan_step, shape_of
from paged_backend.step_tensors import DeviceRows
from paged_backend.warm_up import warm_up_batches


@dataclass(frozen=True)
class RunnerLimits:
    """What the rest of the engine must know of the checkpoint and the pool."""

    max_model_len: int  # tokens; at most num_pages * page_size
    num_pages: int
    page_size: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    bos_id: int | None


class _Landing:
    """Pinned host memory for a step's results, and the moment from which they are there."""

    def __init__(self, capacity: int) -> None:
        self.memory = torch.empty(capacity, dtype=torch.int32, pin_memory=True)
        self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Flight:
    """A launched step, and where its result will be."""

    batch: Batch
    slots: Int64  # [num_sampled] the output of each sampled sequence
    columns: Tensor  # int32 [outputs, columns] in host memory: token id, logprob bits, top ids, top logprob bits
    num_tops: int
    landing: _Landing | None  # None: it is there already


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
    ) -> None:
        self.folder = folder  # the checkpoint's
        self.architecture = architecture
        self.limits = limits
        self.device = device
        self._decoder = decoder
        self._kv_pages = kv_pages
        self._rows = rows
        self._sampler = sampler
        self._graphs = graphs  # None: every step is launched kernel by kernel
        self._in_flight: deque[_Flight] = deque()
        self._landings: list[_Landing] = []  # free ones; as many exist as steps were ever in flight

    @classmethod
    @torch.inference_mode()
    def load(cls, config: EngineConfig, tell: Callable[[str], None]) -> ModelRunner:
        """Reads the checkpoint, sizes the pool, allocates everything a step needs. `tell` hears of progress and of every decision, a sentence each.

        Raises:
            EngineError: the checkpoint cannot be run, or does not fit; one sentence for the operator.
        """
        device = _device(config.device)
        checkpoint = open_checkpoint(config)
        a = checkpoint.architecture
        dtype, kv_dtype = _dtypes(config, a, device)
        tell(f"model: {a.name}, {a.num_layers} layers, vocabulary {a.vocab_size}, on {_name(device)} in {_dtype_name(dtype)}, KV in {_dtype_name(kv_dtype)}")
        weights = allocate_weights(a, dtype, device)
        if config.load_format == "dummy":
            tell(randomise_weights(weights, a, config.seed))
        else:
            tell(load_weights(weights, a, checkpoint.folder, tell))
        size = size_pool(config, a, dtype, kv_dtype, device)
        tell(size.decided_by)
        kv_pages = allocate_kv_store(size, a, config.page_size, kv_dtype, device)
        limits = RunnerLimits(size.max_model_len, size.num_pages, config.page_size, a.vocab_size, checkpoint.eos_ids, checkpoint.bos_id)
        max_sequences = min(config.max_num_sequences, config.max_batched_tokens)
        ops = _make_ops(config, a, max_sequences, dtype, kv_dtype, device, tell)
        rows = DeviceRows(max_sequences, size.max_model_len, config.page_size, len(limits.eos_ids), device, ops)
        decoder, sampler = Decoder(a, weights, rope_table(a.rope, size.max_model_len, device), ops), Sampler(ops)
        graphs = None
        if config.cuda_graphs and ops is not reference:
            shapes = captured_shapes(max_sequences, config.max_batched_tokens)
            logits = torch.empty(max(shape.num_outputs for shape in shapes), a.vocab_size, dtype=dtype, device=device)
            graphs = StepGraphs(decoder, sampler, kv_pages, rows, shapes, limits.max_model_len, logits, tell)
        runner = cls(checkpoint.folder, a, limits, decoder, sampler, kv_pages, rows, device, graphs)
        if ops is not reference:
            started = time.monotonic()
            runner.warm_up(max_sequences, config.max_batched_tokens)
            tell(f"kernels warmed up in {time.monotonic() - started:.1f} s")
        return runner

    def warm_up(self, max_sequences: int, max_batched_tokens: int) -> None:
        """Runs steps of every kind before the first request comes; rows and pages are free afterwards."""
        limits = self.limits
        for batch in warm_up_batches(max_batched_tokens, max_sequences, limits.max_model_len, limits.page_size, limits.num_pages, limits.vocab_size):
            self.launch(batch)
            for _ in self.finished(0):
                pass

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> None:
        """Starts a step. On CUDA it returns before the device is done (with the reference ops it may wait for lengths); on a CPU, after."""
        shape = shape_of(batch)
        captured = None if self._graphs is None else self._graphs.fit(shape)
        plan = plan_step(batch, captured or shape)
        sampled = None
        if self._graphs is not None and captured is not None:
            step, logits = self._graphs.forward(self._rows.update(batch, plan), captured)
            sampled = self._graphs.sample(captured, batch.features)
        else:
            step = self._rows.apply(batch, plan)
            logits = self._decoder.forward(step, self._kv_pages)
        if sampled is None:
            sampled = self._sampler.sample(logits, self._rows.sampling(batch, step), self._rows)
        self._in_flight.append(self._send_back(batch, plan.slots, sampled))

    def finished(self, keep: int) -> Iterator[tuple[Batch, StepResult]]:
        """The oldest steps with their results, until only `keep` are in flight. Waits for the device where it must."""
        while len(self._in_flight) > keep:
            flight = self._in_flight.popleft()
            if flight.landing is not None:
                flight.landing.arrived.synchronize()
                self._landings.append(flight.landing)
            yield flight.batch, _result(flight)

    def _send_back(self, batch: Batch, slots: Int64, sampled: Sampled) -> _Flight:
        """One copy to the host, floats as their bits."""
        columns = [sampled.token_ids.int()[:, None]]
        if sampled.logprobs is not None:
            columns.append(sampled.logprobs.view(torch.int32)[:, None])
        num_tops = 0
        if sampled.top_ids is not None and sampled.top_logprobs is not None:
            columns += [sampled.top_ids.int(), sampled.top_logprobs.view(torch.int32)]
            num_tops = sampled.top_ids.shape[1]
        packed = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
        if self.device.type != "cuda":
            return _Flight(batch, slots, packed, num_tops, None)
        landing = self._landings.pop() if self._landings else _Landing(packed.numel())
        if landing.memory.numel() < packed.numel():
            landing = _Landing(packed.numel())
        host = landing.memory[: packed.numel()].view(packed.shape)
        host.copy_(packed, non_blocking=True)
        landing.arrived.record()
        return _Flight(batch, slots, host, num_tops, landing)


def _result(flight: _Flight) -> StepResult:
    columns, n = flight.columns.numpy()[flight.slots], flight.num_tops  # a copy: the memory is used again
    token_ids = np.ascontiguousarray(columns[:, 0])
    if columns.shape[1] == 1:
        return StepResult(token_ids)
    logprobs = np.ascontiguousarray(columns[:, 1]).view(np.float32)
    if not flight.batch.features & Feature.TOP_LOGPROBS:
        return StepResult(token_ids, logprobs)
    return StepResult(token_ids, logprobs, columns[:, 2 : 2 + n], np.ascontiguousarray(columns[:, 2 + n :]).view(np.float32))


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


def _make_ops(
    config: EngineConfig, a: Architecture, max_sequences: int, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device, tell: Callable[[str], None]
) -> Any:
    """Kernels on CUDA, plain torch elsewhere and where the kernels do not reach."""
    if device.type != "cuda":
        return reference
    if config.page_size & (config.page_size - 1) or kv_dtype != dtype:
        tell("kernels: off, they want a page_size that is a power of two, and K and V in the type of the weights; plain torch computes, slowly")
        return reference
    from paged_kernels.cuda_ops import CudaOps

    return CudaOps(
        num_heads=a.num_heads,
        num_kv_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        sliding_windows=a.sliding_windows,
        vocab_size=a.vocab_size,
        max_sequences=max_sequences,
        max_outputs=max(shape.num_outputs for shape in captured_shapes(max_sequences, config.max_batched_tokens)),
        dtype=dtype,
        device=device,
    )


def _dtypes(config: EngineConfig, architecture: Architecture, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Types of weights and activations, and of the KV store."""
    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else architecture.dtype  # type: ignore[assignment]
    kv_name = name if config.kv_dtype == "auto" else config.kv_dtype
    return getattr(torch, name), getattr(torch, kv_name)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
