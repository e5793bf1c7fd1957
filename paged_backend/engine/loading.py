"""From options to an engine: checkpoint, pool, scheduler. Importing this module takes seconds, for it imports torch and transformers."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import zmq
from tokenizers import Tokenizer

from paged_backend.config import EngineConfig, kv_event_addresses
from paged_backend.engine.checked_runner import CheckedRunner, TableBounds
from paged_backend.engine.engine import Engine, Runner
from paged_backend.engine.kv_event_publisher import KvEventPublisher
from paged_backend.grammar.grammars import Grammars
from paged_backend.messages import Ready
from paged_backend.models.architecture import read_architecture
from paged_backend.models.checkpoint import Checkpoint, open_checkpoint
from paged_backend.models.generation_config import GenerationConfig, find_stop_ids, recommended_sampling
from paged_backend.models.pooling_config import recommended_pooling
from paged_backend.models.tokenizer import export
from paged_backend.runner.builder import build_runner
from paged_backend.scheduler.adapter_slots import AdapterSlots
from paged_backend.scheduler.grammar_masks import GrammarMasks
from paged_backend.scheduler.kv_events import KvEvents
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler

log = logging.getLogger("paged")


def prepare_to_load(config: EngineConfig) -> None:
    """What `load_engine` would import later: transformers imports most of itself, and of torch, when it reads a config; more for a tokenizer. No device is
    touched."""
    from transformers import AutoTokenizer  # noqa: F401

    if torch.version.cuda is not None and config.device != "cpu":
        import paged_kernels.cuda_ops  # noqa: F401
    folder = config.model_folder()
    if folder is not None:
        read_architecture(folder)


def load_engine(config: EngineConfig, directory: Path) -> tuple[Engine, Scheduler, Ready]:
    """The real engine: checkpoint, pool, scheduler. Exports the tokenizer for the front ends into `directory`.

    Raises:
        EngineError: one sentence for the operator.
    """
    started = time.monotonic()
    kv_events = _kv_events(config)  # before the weights are read: the port may be taken
    checkpoint, tokenizer_path = _open(config, directory / "tokenizer.json")
    runner = build_runner(config, log.info, checkpoint)
    limits = runner.limits
    scheduler = Scheduler(
        SchedulerLimits(
            page_size=config.page_size,
            num_pages=limits.num_pages,
            max_model_len=limits.max_model_len,
            max_num_sequences=config.max_num_sequences,
            max_batched_tokens=config.max_batched_tokens,
            vocab_size=limits.vocab_size,
            max_queue_size=config.max_queue_size,
            max_waiting_seconds=config.max_waiting_seconds,
            request_deadline_seconds=config.request_deadline_seconds,
            prefix_cache=config.prefix_cache,
            preemption=config.preemption,
            eos_ids=limits.eos_ids,
            seed=config.seed,
        ),
        guides=GrammarMasks(Grammars(tokenizer_path, limits.vocab_size, limits.eos_ids)),
        adapters=None if runner.adapter_slots is None else AdapterSlots(len(runner.adapter_slots), runner.adapter_slots),
    )
    log.info("engine ready after %.1f s", time.monotonic() - started)
    ready = Ready(
        tokenizer_path=None if tokenizer_path is None else str(tokenizer_path),
        vocab_size=limits.vocab_size,
        max_model_len=limits.max_model_len,
        max_pool_tokens=limits.num_pages * config.page_size,
        page_size=config.page_size,
        num_pages=limits.num_pages,
        sampling=_recommended(config, checkpoint.generation, limits.max_model_len),
        pooling=recommended_pooling(checkpoint.folder),
        embedding_size=checkpoint.architecture.hidden_size,
        makes_text=checkpoint.architecture.has_head,
    )
    stepped: Runner = runner
    if config.debug_checks:
        max_sequences = min(config.max_num_sequences, config.max_batched_tokens)
        bounds = TableBounds(max_sequences, limits.num_pages, config.page_size, limits.max_model_len, config.max_batched_tokens)
        stepped = CheckedRunner(runner, bounds, scheduler.check)
    return Engine(scheduler, stepped, steps_ahead=1 if runner.device.type == "cuda" else 0, kv_events=kv_events), scheduler, ready


def _kv_events(config: EngineConfig) -> KvEvents | None:
    """
    Raises:
        EngineError: the address cannot be used.
    """
    addresses = kv_event_addresses(config.kv_events)
    return None if addresses is None else KvEvents(config.page_size, KvEventPublisher(zmq.Context(), *addresses, config.page_size).send)


def _open(config: EngineConfig, path: Path) -> tuple[Checkpoint, Path | None]:
    """The checkpoint, and its tokenizer's export at `path`, if it has one: all that can be refused before the weights are read, which takes longest."""
    checkpoint = open_checkpoint(config)
    tokenizer = export(checkpoint.folder, path)
    stop_ids = find_stop_ids(checkpoint.architecture, checkpoint.generation, None if tokenizer is None else tokenizer.eos_id)
    log.info("%s", _about_ends(stop_ids, None if tokenizer is None else path))
    return replace(checkpoint, eos_ids=tuple(stop_ids)), None if tokenizer is None else path


def _recommended(config: EngineConfig, generation: GenerationConfig, max_model_len: int) -> dict[str, float]:
    """generation_config.json's sampling; the log says what it is and who gets it."""
    sampling, warnings = recommended_sampling(generation, max_model_len)
    for warning in warnings:
        log.warning("%s", warning)
    if sampling:
        whom = "requests that leave them open have" if config.generation_defaults else "only requests that ask for generation_defaults have"
        values = ", ".join(f"{key} {value:g}" for key, value in sampling.items())
        log.info("sampling that %s from generation_config.json (generation_defaults=%s): %s", whom, "on" if config.generation_defaults else "off", values)
    return sampling


def _about_ends(stop_ids: Mapping[int, str], tokenizer_path: Path | None) -> str:
    """Sentences for the log: where answers end and why, and whether text can be read at all."""
    words = Tokenizer.from_file(str(tokenizer_path)) if tokenizer_path is not None else None
    named = [f"{token_id}{f' {word}' if words is not None and (word := words.id_to_token(token_id)) else ''} ({why})" for token_id, why in stop_ids.items()]
    ends = (
        f"answers end at {', '.join(named)}" if named else "no token ends an answer: neither generation_config.json nor config.json nor the tokenizer names one"
    )
    return ends if words is not None else f"no tokenizer beside the checkpoint: requests must bring input_ids; {ends}"


def leave_a_core(environment: Mapping[str, str]) -> None:
    """Takes torch's threads of this process down to one less than there are processors, unless OMP_NUM_THREADS says otherwise.

    The server, its front ends and clients need a processor too, and threads that wait for one another at every op stand still while one of them has none:
    on two busy cores the demo model's stream ran at 7 tokens/s with two threads and at 70 with one.
    """
    if "OMP_NUM_THREADS" not in environment:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) - 1)))
