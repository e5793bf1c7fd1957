"""From a draft model's checkpoint to a proposer beside the target: its weights, its store, its ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from paged_backend.config import EngineConfig
from paged_backend.models.architecture import Architecture
from paged_backend.models.decoder import Decoder
from paged_backend.models.proposer_checkpoint import ProposerCheckpoint
from paged_backend.models.rope import rope_tensors
from paged_backend.models.step import LayerPages, StepShape
from paged_backend.models.weights import Weights, allocate_weights, load_weights, randomise_weights, weight_bytes
from paged_backend.runner.kv_store import PoolSize, allocate_kv_store, page_bytes_of
from paged_backend.runner.make_ops import make_ops, with_formats_of
from paged_backend.runner.placement import Placement, dtype_name
from paged_backend.runner.proposer import DraftModel, Proposer
from paged_backend.runner.step_tensors import DeviceRows
from paged_backend.units import spell_bytes
from paged_kernels.rank_ops import Ranks


class ProposerBuilder:
    """Builds one proposer, with the target's types on its device."""

    def __init__(
        self,
        config: EngineConfig,
        checkpoint: ProposerCheckpoint,
        target: Architecture,
        place: Placement,
        uses_kernels: bool,
    ) -> None:
        self._config, self._checkpoint, self._place, self._uses_kernels = config, checkpoint, place, uses_kernels
        self._architecture = _within(with_formats_of(checkpoint.architecture, place, uses_kernels), target)

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self._architecture, self._place.dtype)

    @property
    def page_bytes(self) -> int:
        """K and V of a page's tokens in its layers."""
        a = self._architecture
        return page_bytes_of(a.attention, a.num_layers, self._config.page_size, self._place.kv_dtype)

    def read_weights(self, tell: Callable[[str], None]) -> Weights:
        """
        Raises:
            EngineError: a tensor is missing or broken, or does not fit.
        """
        a, config = self._architecture, self._config
        weights = allocate_weights(a, self._place.dtype, self._place.device)
        tell(
            f"draft model: {a.name}, {a.num_layers} layers, in {dtype_name(self._place.dtype)}, at most "
            f"{config.num_drafts} drafts a sequence and step; K and V of {spell_bytes(self.page_bytes)} a page beside "
            "the model's"
        )
        if self._checkpoint.warning:
            tell(f"draft model: {self._checkpoint.warning}")
        if config.load_format == "dummy":
            tell(f"draft model: {randomise_weights(weights, a, config.seed)}")
        else:
            tell(f"draft model: {load_weights(weights, self._checkpoint.folder, tell)}")
        return weights

    def assemble(self, weights: Weights, size: PoolSize, rows: DeviceRows, shapes: Sequence[StepShape]) -> Proposer:
        """A proposer with a store of its own for the pool's pages, which the rows copy, too. shapes: of steps."""
        a, place, config = self._architecture, self._place, self._config
        store = allocate_kv_store(
            size.num_pages, a.attention, a.num_layers, config.page_size, place.kv_dtype, place.device
        )
        ops = make_ops(a, place, self._uses_kernels, shapes, Ranks())
        rows.copy_pages_also(partial(ops.copy_pages, store))
        kv_pages = [LayerPages(tensor) for tensor in store]
        decoder = Decoder(weights, rope_tensors(a.ropes, size.max_model_len, place.device), ops)
        return DraftModel(decoder, ops, kv_pages, rows, size.max_model_len)


def _within(architecture: Architecture, target: Architecture) -> Architecture:
    """No layer looks farther back than some layer of the target does, whose pages are kept so long: beyond that, its
    drafts are those of a model that has forgotten.
    """
    if None in target.sliding_windows:
        return architecture
    farthest = max(window or 0 for window in target.sliding_windows)
    layers = []
    for layer in architecture.layers:
        own = layer.attention.sliding_window
        window = farthest if own is None else min(own, farthest)
        layers.append(replace(layer, attention=replace(layer.attention, sliding_window=window)))
    return replace(architecture, layers=tuple(layers))
