"""Decode steps as CUDA graphs: a few hundred kernel launches become one.

One graph per batch size (*bucket*); a step runs in the smallest that holds it, the rest is padding. A graph reads which rows run and where they
stand from one small tensor; everything else (last tokens, page tables) it finds in the device rows, so nothing of a step is baked in.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from paged_backend.models.decoder import Decoder
from paged_backend.step_tensors import DeviceRows, StepTensors
from paged_kernels.row_update import gather_step

_PROGRESS_SECONDS = 1.0


def bucket_sizes(max_sequences: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8 to 64, of 16 to 256, of 64 beyond; the last is max_sequences. Padding costs at most a quarter of a step's rows."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(320, max_sequences + 64, 64)]
    return [size for size in sizes if size < max_sequences] + [max_sequences]


class _DecodeInputs:
    """The tensors of a captured step of `size` sequences, filled on the device from the rows."""

    def __init__(self, rows: DeviceRows, row_ids: Tensor, starts: Tensor) -> None:
        size, device = len(row_ids), row_ids.device
        self._rows, self._row_ids, self._starts = rows, row_ids, starts
        self._ones = torch.ones(size, dtype=torch.int32, device=device)
        self._query_starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        self._input_ids, self._seq_lens = torch.zeros(2, size, dtype=torch.int32, device=device)
        self._positions, self._slot_mapping = torch.zeros(2, size, dtype=torch.int64, device=device)
        self._page_table = torch.zeros(size, rows.page_table.shape[1], dtype=torch.int32, device=device)

    def gather(self) -> StepTensors:
        """Launches the gathering; the tensors are valid once it has run."""
        gather_step(
            self._row_ids,
            self._starts,
            self._ones,
            self._query_starts[:-1],
            self._rows.token_ids,
            self._rows.page_table,
            self._rows.page_size,
            input_ids=self._input_ids,
            positions=self._positions,
            slot_mapping=self._slot_mapping,
            page_table=self._page_table,
            seq_lens=self._seq_lens,
        )
        return StepTensors(
            input_ids=self._input_ids,
            positions=self._positions,
            slot_mapping=self._slot_mapping,
            query_starts=self._query_starts,
            seq_lens=self._seq_lens,
            page_table=self._page_table,
            logit_indices=None,
            num_decodes=len(self._row_ids),
            max_decode_len=self._page_table.shape[1] * self._rows.page_size,
            prefill_lens=(),
            sampling=None,
        )


class DecodeGraphs:
    """Captured forward passes of decode-only batches. The logits of a replay are valid until the next one."""

    def __init__(self, decoder: Decoder, kv_pages: Sequence[Tensor], rows: DeviceRows, max_sequences: int, tell: Callable[[str], None]) -> None:
        self._sizes = bucket_sizes(max_sequences)
        device = rows.token_ids.device
        self._inputs = torch.full((2 * max_sequences,), -1, dtype=torch.int32, device=device)  # rows, then starts, of the bucket
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, Tensor] = {}
        self._captured: list[_DecodeInputs] = []  # the graphs read and write their tensors
        self._capture_all(decoder, kv_pages, rows, tell)

    def bucket(self, num_sequences: int) -> int:
        return self._sizes[bisect_left(self._sizes, num_sequences)]

    def replay(self, inputs: Tensor, num_sequences: int) -> Tensor:
        """inputs: int32 [2 * bucket], rows (-1: padding) and starts. Returns the logits [num_sequences, vocab] float32."""
        size = len(inputs) // 2
        self._inputs[: len(inputs)].copy_(inputs)
        self._graphs[size].replay()
        return self._logits[size][:num_sequences]

    def _capture_all(self, decoder: Decoder, kv_pages: Sequence[Tensor], rows: DeviceRows, tell: Callable[[str], None]) -> None:
        """The largest first: the smaller ones fit into its memory."""
        started = told = time.monotonic()
        free = torch.cuda.mem_get_info()[0]
        pool = None
        for number, size in enumerate(reversed(self._sizes)):
            if time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                tell(f"capturing decode steps {100 * number // len(self._sizes)} % ({number} of {len(self._sizes)} batch sizes)")
            inputs = _DecodeInputs(rows, self._inputs[:size], self._inputs[size : 2 * size])
            for _ in range(2):  # compiles the kernels and lets the libraries choose theirs, which a capture does not allow
                decoder.forward(inputs.gather(), kv_pages)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._logits[size] = decoder.forward(inputs.gather(), kv_pages)
            pool = pool or graph.pool()
            self._graphs[size] = graph
            self._captured.append(inputs)
        torch.cuda.synchronize()
        taken = (free - torch.cuda.mem_get_info()[0]) / 2**20
        tell(f"decode steps captured for {len(self._sizes)} batch sizes up to {self._sizes[-1]} in {time.monotonic() - started:.1f} s, {taken:.0f} MiB")
