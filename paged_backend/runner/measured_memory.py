"""What steps take of a GPU's memory, read from the device before the pool is there: the largest steps are run, a few of
the captured ones captured.

They run beside the weights, on rows of full length and two throw-away pages, and all that they took is given back.
Nothing here knows a model's layers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from paged_backend.errors import EngineError
from paged_backend.models.step import StepShape
from paged_backend.runner.kv_store import MemoryNeeds, free_bytes
from paged_backend.runner.model_runner import ModelRunner
from paged_backend.runner.warm_up import largest_batches

NUM_PAGES = 2  # all that `largest_batches` name
_BLOCK_BYTES = 2 * 2**20  # torch rounds what it asks the device for up to this, once for each layer of the pool
_NUM_SAMPLES = 5  # of the shapes of captured steps


class MemoryMeter:
    """How much of a GPU's memory was taken since its creation: by torch's allocator, and past it (code of kernels,
    graphs, libraries).
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)
        self._device = device
        self._free = free_bytes(device)  # which empties torch's cache
        self._reserved = torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)

    def peak(self) -> int:
        """The most that torch had at once, in bytes: blocks as it asks the device for them, which is more than the
        tensors in them.
        """
        torch.cuda.synchronize(self._device)
        return int(torch.cuda.max_memory_reserved(self._device)) - self._reserved

    def kept(self) -> tuple[int, int]:
        """What torch still has, and what others have, in bytes."""
        torch.cuda.synchronize(self._device)
        taken = self._free - free_bytes(self._device)
        by_torch = int(torch.cuda.memory_reserved(self._device)) - self._reserved
        return max(by_torch, 0), max(taken - by_torch, 0)


def measure(
    make_runner: Callable[[], ModelRunner], max_batched_tokens: int, shapes: Sequence[StepShape], device: torch.device
) -> MemoryNeeds:
    """make_runner: with NUM_PAGES pages, nothing captured; called once. shapes: those that will be captured, the
    smallest first; none: no step will be.

    The largest step's bytes are the most that torch had while it ran, with rows and all other lasting tensors of a
    runner; once more what the code of its kernels took, for that of other steps' kernels; and what rounding costs when
    the pool is allocated. Captured steps' bytes are their tensors, which all of them share, and the graphs' own in
    proportion to their number.
    """
    meter = MemoryMeter(device)
    runner = make_runner()
    run_largest(runner, max_batched_tokens)
    step = meter.peak() + meter.kept()[1] + runner.num_layers * _BLOCK_BYTES
    graphs = _measure_graphs(runner, shapes, device) if shapes else 0
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    return MemoryNeeds(step=step, graphs=graphs)


def run_largest(runner: ModelRunner, max_batched_tokens: int) -> None:
    """Runs the largest steps on a runner that nobody uses yet. They leave garbage in pages 0 and 1."""
    limits = runner.limits
    runner.run(
        largest_batches(
            max_batched_tokens,
            runner.num_rows,
            limits.max_model_len,
            limits.vocab_size,
            adapters=runner.adapter_slots is not None,
            num_drafts=runner.num_drafts,
        )
    )


def samples_of(shapes: Sequence[StepShape]) -> list[StepShape]:
    """A few shapes, evenly spread, the smallest and the largest among them: the others fit into the largest one's
    memory.
    """
    last = len(shapes) - 1
    indices = {round(last * number / (_NUM_SAMPLES - 1)) for number in range(_NUM_SAMPLES)}
    return [shapes[index] for index in sorted(indices)]


def _measure_graphs(runner: ModelRunner, shapes: Sequence[StepShape], device: torch.device) -> int:
    meter, samples = MemoryMeter(device), samples_of(shapes)
    runner.capture(samples, tell=lambda sentence: None)
    tensors, others = meter.kept()
    return tensors + -(-others * len(shapes) // len(samples))


@contextmanager
def in_one_sentence(what: str, options: str) -> Iterator[None]:
    """Says that memory is not there after all, in the operator's words. options: which make it less."""
    try:
        yield
    except RuntimeError as error:  # torch's own kind for it is one of these, the driver's words come in another
        if "out of memory" not in str(error).lower():
            raise
        raise EngineError(
            f"the device has no memory for {what} (smaller with {options}): {str(error).splitlines()[0]}"
        ) from None
