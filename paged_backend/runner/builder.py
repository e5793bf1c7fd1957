"""From a checkpoint to a runner that is ready for its first request: `RunnerBuilder.build` is the order of a start, a
line each.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.checkpoint import Checkpoint, open_checkpoint
from paged_backend.models.decoder import Decoder
from paged_backend.models.quantization.kv_scales import load_kv_scales
from paged_backend.models.quantization.quantization import Quantization
from paged_backend.models.rope import rope_tensors
from paged_backend.models.shard import Shard
from paged_backend.models.step import LayerPages
from paged_backend.models.weights import (
    Weights,
    allocate_weights,
    load_weights,
    packs_experts,
    randomise_weights,
    weight_bytes,
)
from paged_backend.runner.adapter_store import AdapterStore, adapter_store_bytes, allocate_adapter_store
from paged_backend.runner.cuda_graphs import captured_shapes, first_shapes
from paged_backend.runner.kernel_cache import keep_kernels
from paged_backend.runner.kv_store import MemoryNeeds, PoolSize, allocate_kv_store, free_bytes, of_smallest, size_pool
from paged_backend.runner.make_ops import kernels_reach, make_ops, queries_at_once, with_formats_of
from paged_backend.runner.measured_memory import NUM_PAGES, in_one_sentence, measure
from paged_backend.runner.model_runner import ModelRunner, RunnerLimits
from paged_backend.runner.parallel.agreement import agreed
from paged_backend.runner.placement import (
    devices_of,
    dtype_name,
    name_of,
    place,
    place_words,
)
from paged_backend.runner.proposer_builder import Target, builder_of
from paged_backend.runner.sampler import Sampler
from paged_backend.runner.sequence_limit import about_limit, affordable, sequence_limits
from paged_backend.runner.sizing_lock import alone_on
from paged_backend.runner.step_tensors import DeviceRows
from paged_backend.units import spell_bytes
from paged_kernels.rank_ops import Ranks

Tell = Callable[[str], None]

# of a step's tokens and the ranks: more are summed by NCCL even with fused_all_reduce. Every rank reads all others'
# shares, which between two is the least that any way of summing moves, and grows with their number
_TOKENS_OF_ONE_SHOT = 512
ALONE = Ranks()


def build_runner(
    config: EngineConfig,
    tell: Tell,
    checkpoint: Checkpoint | None = None,
    ranks: Ranks = ALONE,
    captures_later: bool = False,
) -> ModelRunner:
    """Reads the checkpoint, sizes the pool, allocates everything a step needs. `tell` hears of progress and of every
    decision, a sentence each.

    checkpoint: if it was opened already. ranks: those that share the model; each builds its own runner. captures_later:
    most steps are captured by `ModelRunner.later`, while others are served.

    Raises:
        EngineError: the checkpoint cannot be run, or does not fit; one sentence for the operator.
    """
    # it may be fetched first, and nobody waits for that
    return RunnerBuilder(config, tell, checkpoint or open_checkpoint(config), ranks, captures_later).build()


class RunnerBuilder:
    """Builds one runner. What it found out on the way stays readable, for benchmarks."""

    def __init__(
        self,
        config: EngineConfig,
        tell: Tell,
        checkpoint: Checkpoint,
        ranks: Ranks = ALONE,
        captures_later: bool = False,
    ) -> None:
        """captures_later: most steps are captured by `ModelRunner.later`, not by the start; not with several ranks,
        which would have to agree on when.

        Raises:
            EngineError: there is no such device, or it cannot compute in such a type.
        """
        self._config, self._tell, self._checkpoint, self._ranks = config, tell, checkpoint, ranks
        self._architecture = checkpoint.architecture.of_rank(Shard(ranks.rank, ranks.size))
        self._place = place(config, self._architecture)
        self._captures_later = captures_later and ranks.size == 1
        self._uses_kernels = kernels_reach(config.page_size, self._place)
        self._architecture = with_formats_of(self._architecture, self._place, self._uses_kernels)
        self._proposer = builder_of(config, checkpoint, self._architecture, self._place, self._uses_kernels)
        self._allow(config.max_num_sequences)
        self.size: PoolSize | None = None  # as decided
        self.needs = MemoryNeeds()  # as measured
        self.seconds: dict[str, float] = {}  # of each phase

    @torch.inference_mode()
    def build(self) -> ModelRunner:
        """The checkpoint and its tokenizer were checked before (engine/loading.py). Nobody else takes the device's
        memory meanwhile. Several ranks build at
        once: what only one of them may not be able to do is agreed upon, and the rest they do in the same order."""
        with self._alone_on_devices():
            self._tell_what_comes()
            at_most = self._equal(agreed(self._ranks, self._refuse_what_cannot_fit))
            if self._config.fused_all_reduce and self._uses_kernels and self._ranks.size > 1:
                self._tell(
                    self._ranks.share_memory(
                        _TOKENS_OF_ONE_SHOT // self._ranks.size * self._architecture.hidden_size,
                        self._place.dtype,
                        self._place.device,
                    )
                )
            with self._phase("weights"):
                weights, adapter_slots = agreed(self._ranks, self._read_weights)
            with (
                self._phase("largest step"),
                in_one_sentence("the largest step", "max_batched_tokens, max_num_sequences"),
            ):
                self._measure(weights, adapter_slots, at_most)
            with (
                self._phase("pool"),
                in_one_sentence("rows beside the pool", "pool_memory_fraction, num_pages, pool_bytes"),
            ):
                runner = self._assemble(weights, adapter_slots, self._size_pool())
            with (
                self._phase("graphs"),
                in_one_sentence(
                    "captured steps beside the pool", "pool_memory_fraction, num_pages, pool_bytes, cuda_graphs"
                ),
            ):
                if self._captures:
                    runner.capture(
                        self._shapes, self._tell, first_shapes(self._shapes) if self._captures_later else None
                    )
            with (
                self._phase("warm-up"),
                in_one_sentence("a step beside the pool", "pool_memory_fraction, num_pages, pool_bytes"),
            ):
                self._warm_up(runner)
            self._ranks.tell_all("ready")
        return runner

    @property
    def device(self) -> torch.device:
        return self._place.device

    @contextmanager
    def _alone_on_devices(self) -> Iterator[None]:
        """Rank 0 waits for the devices of all ranks, one after another: two engines that wait for each other's would
        wait for ever.
        """
        with ExitStack() as locks:
            if self._ranks.rank == 0:
                for device in devices_of(self._config):
                    locks.enter_context(alone_on(device, self._tell))
            self._ranks.tell_all("begin")
            yield

    def _allow(self, max_num_sequences: int) -> None:
        """0: not decided yet, 1 until then."""
        config = self._config = self._config.model_copy(update={"max_num_sequences": max_num_sequences})
        self._max_sequences = min(max_num_sequences or 1, config.max_batched_tokens)  # of a step
        self._shapes = captured_shapes(
            self._max_sequences,
            config.max_batched_tokens,
            bool(config.lora_directory),
            config.num_drafts,
            packs_runs=queries_at_once(self._architecture, self._uses_kernels, config.num_drafts) > 1,
        )

    @property
    def _captures(self) -> bool:
        return self._config.cuda_graphs and self._uses_kernels

    def _tell_what_comes(self) -> None:
        a, place = self._architecture, self._place
        sizes = f"{a.num_layers} layers, vocabulary {a.vocab_size}"
        if self._ranks.size > 1:
            heads = f"{a.attention.num_heads} heads, {a.attention.num_kv_heads} KV heads"
            sizes += (
                f", rank {self._ranks.rank} of {self._ranks.size} with {heads}, {a.vocabulary.count} of the vocabulary"
            )
        if self._config.replicas > 1:
            sizes += f", replica {self._config.replica} of {self._config.replicas}"
        self._tell(
            f"model: {a.name}, {sizes}, on {place_words(self._config, place.device)} in {dtype_name(place.dtype)}, "
            f"KV in {dtype_name(place.kv_dtype)}"
        )
        for warning in self._checkpoint.warnings:
            self._tell(warning)
        if self._uses_kernels:
            self._tell(keep_kernels(os.environ))
        if a.quantization is not None:
            self._tell(f"quantization: {self._about_quantization(a.quantization)}")
        if place.device.type == "cuda" and not self._uses_kernels:
            self._tell(
                "kernels: off, they want a GPU of compute capability 8.0 or more, a page_size that is a power of two, "
                "and K and V of no more bits than the weights; plain torch computes, slowly"
            )

    def _about_quantization(self, quantization: Quantization) -> str:
        """Which formats there are, and what they save."""
        a, dtype = self._architecture, self._place.dtype
        if quantization.keeps_nothing:
            return (
                f"{quantization.words}; dequantised into {dtype_name(dtype)} while loading: "
                f"{name_of(self._place.device)} has no kernels for it"
            )
        plain, taken = weight_bytes(replace(a, quantization=None), dtype), weight_bytes(a, dtype)
        experts = ""
        if quantization.rules and not packs_experts(a):
            experts = f" (experts {'stay as they are' if quantization.online else 'are dequantised'})"
        floats = ", ".join(quantization.words_of_floats)
        if floats:
            floats = f"; {floats}: dequantised, {name_of(self._place.device)} has no kernels for it"
        return (
            f"{quantization.words}{experts}{floats}; {spell_bytes(taken)} instead of {spell_bytes(plain)} in "
            f"{dtype_name(dtype)}, {spell_bytes(plain - taken)} saved"
        )

    def _refuse_what_cannot_fit(self) -> PoolSize:
        """By the bytes that are known before anything is read. Returns the largest pool there may be.

        A CPU's memory is promised before it is there: a process that takes more than there is gets killed, without a
        word.
        """
        a, place = self._architecture, self._place
        needed, free = weight_bytes(a, place.dtype), free_bytes(place.device)
        if self._proposer is not None:
            needed += self._proposer.weight_bytes
        if needed > free:
            where = f"the weights do not fit into the memory of {name_of(place.device)}"
            raise EngineError(
                f"{where}: {spell_bytes(needed)} in {dtype_name(place.dtype)}, {spell_bytes(free)} are free"
            )
        needs = MemoryNeeds(weights=needed + adapter_store_bytes(self._config, a, place.dtype))
        return self._size_of(needs)

    def _read_weights(self) -> tuple[Weights, AdapterStore | None]:
        """Memory for adapters is taken before the weights are read: it may not be there."""
        a, place = self._architecture, self._place
        weights = allocate_weights(a, place.dtype, place.device)
        adapter_slots = allocate_adapter_store(
            self._config, a, self._checkpoint.architecture, place.dtype, place.device
        )
        if adapter_slots is not None:
            self._tell(adapter_slots.reported)
        if self._config.load_format == "dummy":
            self._tell(randomise_weights(weights, a, self._config.seed))
        else:
            self._tell(load_weights(weights, self._checkpoint.folder, self._tell))
            if place.kv_dtype == torch.float8_e4m3fn:
                scaled = load_kv_scales(
                    weights.attentions, self._checkpoint.folder, a.renames, adapters=bool(self._config.lora_directory)
                )
                if scaled:
                    self._tell(scaled)
        if self._proposer is not None:
            self._proposer.read_weights(weights, self._tell)
        return weights, adapter_slots

    def _measure(self, weights: Weights, adapter_slots: AdapterStore | None, at_most: PoolSize) -> None:
        """Of as many sequences as may run, or the most that are affordable on every rank."""
        given = self._config.max_num_sequences
        whole = agreed(self._ranks, lambda: self._size_of(MemoryNeeds()))  # a pool of all that is free
        num_tokens = whole.num_pages // len(whole.groups.groups) * self._config.page_size
        limits = [given] if given else sequence_limits(self._place.device, whole.free_bytes, num_tokens)
        most = min(int(limit) for limit in self._ranks.tell_all(str(limits[0])))
        for limit in (limit for limit in limits if limit <= most):
            self._allow(limit)
            self._measure_steps(weights, adapter_slots, at_most)
            affords = affordable(self.needs, whole.free_bytes) or limit == limits[-1]
            if all(said == str(True) for said in self._ranks.tell_all(str(affords))):
                break
        if not given:
            self._tell(about_limit(limit, whole.free_bytes, num_tokens))

    def _measure_steps(self, weights: Weights, adapter_slots: AdapterStore | None, at_most: PoolSize) -> None:
        """On a CPU nothing is measured: a tenth of its memory is left for steps (kv_store.py)."""
        if self._place.device.type != "cuda":
            return
        few = replace(at_most, num_pages=NUM_PAGES)
        shapes = self._shapes if self._captures else []
        started = time.monotonic()
        self.needs = measure(
            partial(self._assemble, weights, adapter_slots, few),
            self._config.max_batched_tokens,
            shapes,
            self._place.device,
        )
        words = f"the largest step of {self._max_sequences} sequences takes {spell_bytes(self.needs.step)}"
        if shapes:
            words += f", {len(shapes)} captured shapes of steps at most {spell_bytes(self.needs.graphs)}"
        self._tell(f"measured: {words}, in {time.monotonic() - started:.1f} s")

    def _size_of(self, needs: MemoryNeeds) -> PoolSize:
        place, proposer = self._place, self._proposer
        proposer_bytes = 0 if proposer is None else proposer.page_bytes
        return size_pool(self._config, self._architecture, place.kv_dtype, place.device, needs, proposer_bytes)

    def _size_pool(self) -> PoolSize:
        size = agreed(
            self._ranks,
            lambda: self._size_of(self.needs),
        )
        self.size = self._equal(size)
        self._tell(self.size.decided_by)
        return self.size

    def _equal(self, size: PoolSize) -> PoolSize:
        """Of the rank with the least room: steps of other lengths would not meet."""
        rooms = [int(num_pages) for num_pages in self._ranks.tell_all(str(size.num_pages))]
        return of_smallest(size, rooms, self._config.page_size)

    def _assemble(self, weights: Weights, adapter_slots: AdapterStore | None, size: PoolSize) -> ModelRunner:
        """A runner with a pool of that size; nothing is captured yet."""
        a, config, place = self._architecture, self._config, self._place
        store = allocate_kv_store(
            size.num_pages, a.attention, size.groups.num_layers, config.page_size, place.kv_dtype, place.device
        )
        # no other is ever chosen
        eos_ids = tuple(token_id for token_id in self._checkpoint.eos_ids if 0 <= token_id < a.vocab_size)
        limits = RunnerLimits(
            size.max_model_len,
            size.num_pages,
            config.page_size,
            a.vocab_size,
            eos_ids,
            self._checkpoint.bos_id,
            config.max_num_sequences,
            size.groups.windows,
        )
        ops = make_ops(a, place, self._uses_kernels, self._shapes, self._ranks, config.num_drafts)
        copy_pages = partial(ops.copy_pages, store)
        kv_pages = [LayerPages(store[place], group) for group, place in size.groups.places]
        num_groups = len(size.groups.groups)
        rows = DeviceRows(
            self._max_sequences,
            size.max_model_len,
            config.page_size,
            len(eos_ids),
            place.device,
            ops,
            copy_pages,
            num_groups,
        )
        if config.num_drafts and self._checkpoint.proposer is None:
            rows.speculate(ops.propose_ngram, config.num_drafts)
        largest_step = max(config.max_batched_tokens, max(shape.num_tokens for shape in self._shapes))
        adapted = (
            None if adapter_slots is None else adapter_slots.products(ops, weights, rows.adapter_slots, largest_step)
        )
        decoder = Decoder(weights, rope_tensors(a.ropes, size.max_model_len, place.device), ops, adapted)
        runner = ModelRunner(self._checkpoint.folder, a, limits, decoder, Sampler(ops), kv_pages, rows, adapter_slots)
        if self._proposer is not None:
            target = Target(weights, decoder, rows, self._shapes, largest_step)
            runner.speculate(self._proposer.assemble(size, target), config.num_drafts)
            if config.speculation == "auto":
                rows.repeat_with(ops.propose_repeated)
        return runner

    def _warm_up(self, runner: ModelRunner) -> None:
        if not self._uses_kernels:
            return
        started = time.monotonic()
        runner.warm_up(self._max_sequences, self._config.max_batched_tokens)
        self._tell(f"kernels warmed up in {time.monotonic() - started:.1f} s")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started
