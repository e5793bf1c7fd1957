"""The adapters' place on the device: a fixed number of adapter slots, sized for the largest rank, and the products that
use what lies in them.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paged_backend.arrays import Int32
from paged_backend.batch import AdapterPart, AdapterUse, Batch
from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.adapter_files import Adapter, check_adapter, open_folder, read_adapter
from paged_backend.models.adapter_layout import AdapterLayout
from paged_backend.models.architecture import Architecture
from paged_backend.models.blocks.products import AdaptedProducts
from paged_backend.models.shard import Shard
from paged_backend.models.weights import Weights
from paged_backend.runner.asks import AskRoom
from paged_backend.runner.step_plan import StepPlan
from paged_backend.units import spell_bytes
from paged_kernels.reference import Ops

if TYPE_CHECKING:
    from paged_backend.runner.model_runner import ModelRunner


@dataclass(frozen=True)
class RankLayouts:
    """How an adapter lies in its file, and on each rank."""

    whole: AdapterLayout
    own: AdapterLayout  # this rank's
    parts: tuple[AdapterLayout, ...]  # of every rank


def layout_of(architecture: Architecture) -> AdapterLayout:
    return AdapterLayout.of(architecture.layers, architecture.hidden_size, architecture.renames)


class AdapterStore:
    """Owns their memory. Which adapter lies where is decided by scheduler/adapter_slots.py. `check` and `read` may be
    called on any thread.
    """

    def __init__(
        self,
        root: Path,
        layouts: RankLayouts,
        num_adapter_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        layout = layouts.own
        self._layouts = layouts
        self._root, self._layout, self._max_rank, self._dtype, self._pinned = (
            root,
            layout,
            max_rank,
            dtype,
            device.type == "cuda",
        )
        self._device = device
        # kernels/lora.py
        self._weights = torch.zeros(num_adapter_slots, layout.size * max_rank, dtype=dtype, device=device)
        self._ranks = torch.zeros(num_adapter_slots, dtype=torch.int32, device=device)  # 0: empty
        self.reported = (
            f"adapters: room for {num_adapter_slots} of rank {max_rank} at most, "
            f"{spell_bytes(self._weights[0].nbytes)} each, "
            f"{spell_bytes(self._weights.nbytes)} in all (max_loras, max_lora_rank)"
        )

    def __len__(self) -> int:
        return len(self._weights)

    def check(self, name: str) -> None:
        """Looks at everything but the numbers.

        Raises:
            RequestError: why the adapter of that name cannot be used.
        """
        check_adapter(open_folder(self._root, name), self._layouts.whole, self._max_rank)

    def read(self, name: str) -> Adapter:
        """The adapter of that name, from its folder.

        Raises:
            RequestError: as `check`.
        """
        # each thread has a current device of its own
        with torch.cuda.device(self._device) if self._pinned else nullcontext():
            return read_adapter(
                open_folder(self._root, name),
                self._layouts.whole,
                self._max_rank,
                self._dtype,
                self._pinned,
                self._layouts.parts,
            )

    @torch.inference_mode()
    def fill(self, adapter_slot: int, adapter: Adapter | AdapterPart) -> None:
        """Copies an adapter into an adapter slot, after the steps that were launched before and without waiting for
        them.
        """
        packed = adapter.packed
        if isinstance(packed, bytes):
            packed = torch.frombuffer(bytearray(packed), dtype=self._dtype)
        self._weights[adapter_slot, : len(packed)].copy_(packed, non_blocking=True)
        self._ranks[adapter_slot].fill_(adapter.rank)

    def products(self, ops: Ops, weights: Weights, row_adapter_slots: Tensor, max_tokens: int) -> AdaptedProducts:
        """The products of a step with adapters, of at most max_tokens tokens. row_adapter_slots: int32 [rows], -1:
        none.
        """
        sites = dict(zip(weights.linears, self._layout.sites, strict=True))
        return AdaptedProducts(ops, sites, self._layout, self._weights, self._ranks, row_adapter_slots, max_tokens)


class AdapterRoom(AskRoom):
    """Brings adapters to the device. Whether a step has the products for them is a part of its shape (step_plan.py)."""

    def prepare(self, ask: AdapterUse, runner: ModelRunner) -> None:
        for adapter_slot, adapter in ask.arrivals:
            assert runner.adapter_slots is not None
            runner.adapter_slots.fill(adapter_slot, adapter)

    def sections(self, ask: AdapterUse, batch: Batch, plan: StepPlan) -> dict[str, Int32]:
        """int32 [2, k]: rows, and their adapter slots."""
        return {"adapter_slots": ask.new_rows.T} if len(ask.new_rows) else {}


def allocate_adapter_store(
    config: EngineConfig, architecture: Architecture, whole: Architecture, dtype: torch.dtype, device: torch.device
) -> AdapterStore | None:
    """architecture: this rank's part of the whole one. None if the config names no folder of adapters.

    Raises:
        EngineError: there is no such folder, or the device has no room for them.
    """
    if not config.lora_directory:
        return None
    root = Path(config.lora_directory).expanduser()
    if not root.is_dir():
        raise EngineError(f"lora_directory: no folder {config.lora_directory}")
    size = architecture.shard.size
    layouts = RankLayouts(
        layout_of(whole),
        layout_of(architecture),
        tuple(layout_of(whole.of_rank(Shard(rank, size))) for rank in range(size)),
    )
    try:
        return AdapterStore(root, layouts, config.max_loras, config.max_lora_rank, dtype, device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        num_bytes = adapter_store_bytes(config, architecture, dtype)
        what = (
            f"{config.max_loras} adapters of rank {config.max_lora_rank}, {spell_bytes(num_bytes)}, do not fit "
            "(max_loras, max_lora_rank)"
        )
        raise EngineError(f"{what}: {str(error).splitlines()[0]}") from None


def adapter_store_bytes(config: EngineConfig, architecture: Architecture, dtype: torch.dtype) -> int:
    """What `allocate_adapter_store` takes."""
    if not config.lora_directory:
        return 0
    return layout_of(architecture).size * config.max_lora_rank * config.max_loras * dtype.itemsize
