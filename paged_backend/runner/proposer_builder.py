"""From a checkpoint to a proposer beside the target: its weights, its store, its ops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.architecture import Architecture
from paged_backend.models.checkpoint import Checkpoint
from paged_backend.models.decoder import Decoder
from paged_backend.models.eagle3 import Eagle3Head, Eagle3Weights, allocate_eagle3
from paged_backend.models.layer_spec import LatentSpec
from paged_backend.models.mtp import MtpHead, MtpWeights, allocate_mtp
from paged_backend.models.proposal_head import ProposalHead
from paged_backend.models.proposer_checkpoint import Kind, ProposerCheckpoint
from paged_backend.models.rope import rope_tensors
from paged_backend.models.step import LayerPages, StepShape
from paged_backend.models.weight_files import find_tensors
from paged_backend.models.weights import Weights, allocate_weights, load_weights, randomise_weights, weight_bytes
from paged_backend.runner.kv_store import PoolSize, allocate_kv_store, page_bytes_of
from paged_backend.runner.make_ops import make_ops, with_formats_of
from paged_backend.runner.placement import Placement, dtype_name
from paged_backend.runner.proposer import DraftModel, DraftPasses, HeadProposer, Proposer
from paged_backend.runner.step_tensors import DeviceRows
from paged_backend.units import spell_bytes
from paged_kernels.rank_ops import Ranks
from paged_kernels.reference import Ops


@dataclass(frozen=True)
class Target:
    """What a proposer stands beside."""

    weights: Weights
    decoder: Decoder
    rows: DeviceRows
    shapes: Sequence[StepShape]  # of steps
    max_tokens: int  # of a step

    @property
    def vocab_size(self) -> int:
        return len(self.weights.embedding)


class ProposerBuilder(ABC):
    """Builds one proposer, with the target's types on its device."""

    words: str  # what guesses, for the log

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
        """At most."""
        return weight_bytes(self._architecture, self._place.dtype)

    @property
    def page_bytes(self) -> int:
        """K and V of a page's tokens in its layers."""
        a = self._architecture
        return page_bytes_of(a.attention, a.num_layers, self._config.page_size, self._place.kv_dtype)

    def read_weights(self, target: Weights, tell: Callable[[str], None]) -> None:
        """
        Raises:
            EngineError: a tensor is missing or broken, or does not fit.
        """
        a = self._architecture
        tell(
            f"{self.words}: {a.name}, {a.num_layers} {'layers' if a.num_layers > 1 else 'layer'}, in "
            f"{dtype_name(self._place.dtype)}, at most {self._config.num_drafts} drafts a sequence and step; K and V "
            f"of {spell_bytes(self.page_bytes)} a page beside the model's"
        )
        if self._checkpoint.warning:
            tell(f"{self.words}: {self._checkpoint.warning}")
        tell(f"{self.words}: {self._read(target, tell)}")

    def assemble(self, size: PoolSize, target: Target) -> Proposer:
        """A proposer with a store of its own for the pool's pages, which the rows copy, too."""
        a, place = self._architecture, self._place
        store = allocate_kv_store(
            size.num_pages, a.attention, a.num_layers, self._config.page_size, place.kv_dtype, place.device
        )
        num_logits = min(a.vocab_size, target.vocab_size)
        with_shared_ids = replace(a, vocab_size=num_logits)
        ops = make_ops(
            with_shared_ids, place, self._uses_kernels, target.shapes, Ranks(), num_drafts=self._config.num_drafts
        )
        target.rows.copy_pages_also(partial(ops.copy_pages, store))
        return self._assemble(ops, [LayerPages(tensor) for tensor in store], size.max_model_len, target)

    @abstractmethod
    def _read(self, target: Weights, tell: Callable[[str], None]) -> str:
        """Returns a sentence on what was read."""

    @abstractmethod
    def _assemble(self, ops: Ops, kv_pages: Sequence[LayerPages], max_len: int, target: Target) -> Proposer:
        """After `read_weights`, perhaps several times. max_len: of a sequence, in tokens."""


class DraftModelBuilder(ProposerBuilder):
    words = "draft model"

    def _read(self, target: Weights, tell: Callable[[str], None]) -> str:
        a, config = self._architecture, self._config
        self._weights = allocate_weights(a, self._place.dtype, self._place.device)
        if config.load_format == "dummy":
            return randomise_weights(self._weights, a, config.seed)
        return load_weights(self._weights, self._checkpoint.folder, tell)

    def _assemble(self, ops: Ops, kv_pages: Sequence[LayerPages], max_len: int, target: Target) -> Proposer:
        ropes = rope_tensors(self._architecture.ropes, max_len, self._place.device)
        decoder, passes = Decoder(self._weights, ropes, ops), DraftPasses(target.rows, max_len)
        return DraftModel(decoder, ops, kv_pages, passes, (self._architecture.vocab_size, target.vocab_size))


class MtpBuilder(ProposerBuilder):
    words = "multi-token prediction"

    @property
    def weight_bytes(self) -> int:
        return self._allocate(torch.device("meta")).num_bytes

    def _allocate(self, device: torch.device) -> MtpWeights:
        a = self._architecture
        return allocate_mtp(allocate_weights(a, self._place.dtype, device), a)

    def _read(self, target: Weights, tell: Callable[[str], None]) -> str:
        weights = self._allocate(self._place.device)
        if self._config.load_format == "dummy":
            weights.randomise(self._architecture, self._config.seed)
        else:
            weights.load(self._checkpoint.folder)
        self._weights = weights.sharing(target)
        return f"weights: {spell_bytes(weights.num_bytes)}, of which what is the model's, too, is kept once"

    def _assemble(self, ops: Ops, kv_pages: Sequence[LayerPages], max_len: int, target: Target) -> Proposer:
        ropes = rope_tensors(self._architecture.ropes, max_len, self._place.device)
        return _on(target, MtpHead(self._weights, target.weights, ops, ropes), ops, kv_pages[0], max_len)


class Eagle3Builder(ProposerBuilder):
    words = "EAGLE-3 head"

    @property
    def weight_bytes(self) -> int:
        return self._allocate(torch.device("meta")).num_bytes

    def _allocate(self, device: torch.device) -> Eagle3Weights:
        folder, eagle = self._checkpoint.folder, self._checkpoint.eagle
        assert eagle is not None
        stored = find_tensors(folder) if self._config.load_format == "auto" else {}
        return allocate_eagle3(self._architecture, eagle, stored, self._place.dtype, device)

    def _read(self, target: Weights, tell: Callable[[str], None]) -> str:
        self._weights = self._allocate(self._place.device)
        if self._config.load_format == "dummy":
            self._weights.randomise(self._architecture.initializer_range, self._config.seed)
        else:
            self._weights.load(self._checkpoint.folder, len(target.embedding))
        return f"weights: {spell_bytes(self._weights.num_bytes)}"

    def _assemble(self, ops: Ops, kv_pages: Sequence[LayerPages], max_len: int, target: Target) -> Proposer:
        eagle = self._checkpoint.eagle
        assert eagle is not None
        ropes = rope_tensors(self._architecture.ropes, max_len, self._place.device)
        return _on(target, Eagle3Head(self._weights, eagle, target.weights, ops, ropes), ops, kv_pages[0], max_len)


def _on(target: Target, head: ProposalHead, ops: Ops, pages: LayerPages, max_len: int) -> Proposer:
    tapped = target.decoder.tap(head.taps, target.max_tokens)
    return HeadProposer(head, ops, pages, tapped, target.rows, max_len)


_BUILDERS: Mapping[Kind, type[ProposerBuilder]] = {
    "draft": DraftModelBuilder,
    "mtp": MtpBuilder,
    "eagle3": Eagle3Builder,
}


def builder_of(
    config: EngineConfig, checkpoint: Checkpoint, target: Architecture, place: Placement, uses_kernels: bool
) -> ProposerBuilder | None:
    """None: no model makes drafts."""
    if checkpoint.proposer is None:
        return None
    return _BUILDERS[checkpoint.proposer.kind](config, checkpoint.proposer, target, place, uses_kernels)


def _within(architecture: Architecture, target: Architecture) -> Architecture:
    """No layer looks farther back than some layer of the target does, whose pages are kept so long: beyond that, its
    drafts are those of a model that has forgotten.

    Raises:
        EngineError: a layer cannot forget.
    """
    if None in target.sliding_windows:
        return architecture
    farthest = max(window or 0 for window in target.sliding_windows)
    layers = []
    for layer in architecture.layers:
        attention = layer.attention
        if isinstance(attention, LatentSpec):
            raise EngineError(
                f"draft_model: {architecture.name} attends to all tokens, and {target.name} keeps the last {farthest}"
            )
        own = attention.sliding_window
        window = farthest if own is None else min(own, farthest)
        layers.append(replace(layer, attention=replace(attention, sliding_window=window)))
    return replace(architecture, layers=tuple(layers))
