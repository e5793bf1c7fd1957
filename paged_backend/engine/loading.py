"""From options to an engine: checkpoint, pool, scheduler. Importing this module takes seconds, for it imports torch and
transformers.
"""

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

from paged_backend.batch import Batch
from paged_backend.config import EngineConfig, kv_event_addresses
from paged_backend.engine.checked_runner import CheckedRunner, TableBounds
from paged_backend.engine.engine import Engine, Runner
from paged_backend.engine.kv_event_publisher import KvEventPublisher
from paged_backend.grammar.grammars import Grammars
from paged_backend.messages import KV_SOCKET, Ready
from paged_backend.models.architecture import read_architecture
from paged_backend.models.checkpoint import Checkpoint, open_checkpoint
from paged_backend.models.generation_config import GenerationConfig, find_stop_ids, recommended_sampling
from paged_backend.models.pooling_config import recommended_pooling
from paged_backend.models.shard import Shard
from paged_backend.models.tokenizer import export_tokenizer
from paged_backend.runner.builder import build_runner
from paged_backend.runner.model_runner import ModelRunner, RunnerLimits
from paged_backend.runner.parallel.rank_processes import LeadingRunner, RankProcesses, RankStart
from paged_backend.runner.placement import device_of, leave_a_core
from paged_backend.scheduler.adapter_slots import AdapterSlots
from paged_backend.scheduler.grammar_masks import GrammarMasks
from paged_backend.scheduler.kv_events import KvEvents
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from paged_backend.scheduler.step_budget import LEAST_TOKENS

log = logging.getLogger("paged")


def prepare_to_load(config: EngineConfig) -> None:
    """What `load_engine` would import later: transformers imports most of itself, and of torch, when it reads a config;
    more for a tokenizer. No device is touched.
    """
    from transformers import AutoTokenizer  # noqa: F401

    if torch.version.cuda is not None and config.device != "cpu":
        import paged_kernels.cuda_ops  # noqa: F401
    folder = config.model_folder()
    if folder is not None:
        read_architecture(folder)


def load_engine(
    config: EngineConfig,
    directory: Path,
    others: RankProcesses | None = None,
    captures_later: bool = False,
) -> tuple[Engine, Scheduler, Ready]:
    """The real engine: checkpoint, pool, scheduler. Exports the tokenizer for the front ends into `directory`.

    others: the ranks beside this one, if tensor_parallel_size asks for any; they are started here if they were not
        before. captures_later: `Engine.use_spare_time` captures what the first requests need not; else the start does.

    Raises:
        EngineError: one sentence for the operator.
    """
    started = time.monotonic()
    kv_events = _kv_events(config, directory)  # before the weights are read: the port may be taken
    checkpoint, tokenizer_path = _open(config, directory / "tokenizer.json")
    runner, stepped = _build(config, checkpoint, directory, others, captures_later)
    limits = runner.limits
    scheduler = Scheduler(
        _scheduler_limits(config, limits, drafts_from_text=checkpoint.proposer is None),
        guides=GrammarMasks(Grammars(tokenizer_path, limits.vocab_size, limits.eos_ids)),
        adapters=None
        if runner.adapter_slots is None
        else AdapterSlots(len(runner.adapter_slots), runner.adapter_slots),
    )
    if runner.timed is not None:
        scheduler.expect(*runner.timed)
    log.info("%s", about_pace(config.max_step_seconds, runner.timed))
    log.info("engine ready after %.1f s", time.monotonic() - started)
    ready = Ready(
        tokenizer_path=None if tokenizer_path is None else str(tokenizer_path),
        vocab_size=limits.vocab_size,
        max_model_len=limits.max_model_len,
        max_pool_tokens=limits.num_pages // len(limits.windows) * config.page_size,
        page_size=config.page_size,
        num_pages=limits.num_pages,
        max_num_sequences=limits.max_num_sequences,
        sampling=_recommended(config, checkpoint.generation, limits.max_model_len),
        pooling=recommended_pooling(checkpoint.folder),
        embedding_size=checkpoint.architecture.hidden_size,
        makes_text=checkpoint.architecture.has_head,
        proposer=_proposer(config, checkpoint),
    )
    if config.debug_checks:
        max_sequences = runner.num_rows
        bounds = TableBounds(
            max_sequences,
            limits.num_pages,
            config.page_size,
            limits.max_model_len,
            config.max_batched_tokens,
            limits.windows,
        )
        stepped = CheckedRunner(stepped, bounds, scheduler.check)
    return (
        Engine(scheduler, stepped, 1 if runner.device.type == "cuda" else 0, kv_events, runner.later),
        scheduler,
        ready,
    )


def _build(
    config: EngineConfig,
    checkpoint: Checkpoint,
    directory: Path,
    others: RankProcesses | None,
    captures_later: bool,
) -> tuple[ModelRunner, Runner]:
    """This process's runner, and the one to launch steps with, which tells the other ranks of them if there are any."""
    if config.tensor_parallel_size == 1:
        runner = build_runner(config, log.info, checkpoint, captures_later=captures_later)
        return runner, runner
    from paged_backend.runner.parallel.process_ranks import ProcessRanks

    checkpoint.architecture.of_rank(Shard(0, config.tensor_parallel_size))  # what cannot be divided, and
    device = device_of(config, 0)  # GPUs that are not there are refused before anybody is waited for
    others = others or RankProcesses(config)
    leave_a_core(os.environ, config.tensor_parallel_size * config.replicas)
    with others.blamed():
        others.start(RankStart(str(directory), str(checkpoint.folder), checkpoint.eos_ids))
        ranks = ProcessRanks(0, config.tensor_parallel_size, directory, device)
        runner = build_runner(config, log.info, checkpoint, ranks)
    return runner, LeadingRunner(runner, others)


def _kv_events(config: EngineConfig, directory: Path) -> KvEvents | None:
    """For routers that the operator has, or for the front ends of several replicas.

    Raises:
        EngineError: the address cannot be used.
    """
    own = f"ipc://{directory}/{KV_SOCKET}" if config.replicas > 1 and config.prefix_cache else ""
    addresses = kv_event_addresses(config.kv_events or own)
    if addresses is not None and not own:
        log.info("KV events at %s, what was missed at %s: they hold the tokens of prompts and answers", *addresses)
    return (
        None
        if addresses is None
        else KvEvents(config.page_size, KvEventPublisher(zmq.Context(), *addresses, config.page_size).send)
    )


def _open(config: EngineConfig, path: Path) -> tuple[Checkpoint, Path | None]:
    """The checkpoint, and its tokenizer's export at `path`, if it has one: all that can be refused before the weights
    are read, which takes longest.
    """
    checkpoint = open_checkpoint(config)
    tokenizer = export_tokenizer(checkpoint.folder, path)
    stop_ids = find_stop_ids(
        checkpoint.architecture, checkpoint.generation, None if tokenizer is None else tokenizer.eos_id
    )
    if config.speculation == "auto":
        log.info("speculation=auto: drafts are made by %s", _proposer(config, checkpoint))
    log.info("%s", _about_ends(stop_ids, None if tokenizer is None else path))
    return replace(checkpoint, eos_ids=tuple(stop_ids)), None if tokenizer is None else path


def _proposer(config: EngineConfig, checkpoint: Checkpoint) -> str:
    """Who makes drafts; empty: nobody."""
    if not config.num_drafts:
        return ""
    return "ngram" if checkpoint.proposer is None else checkpoint.proposer.kind


def _scheduler_limits(config: EngineConfig, limits: RunnerLimits, drafts_from_text: bool) -> SchedulerLimits:
    return SchedulerLimits(
        page_size=config.page_size,
        num_pages=limits.num_pages,
        max_model_len=limits.max_model_len,
        max_num_sequences=limits.max_num_sequences,
        max_batched_tokens=config.max_batched_tokens,
        max_step_seconds=config.max_step_seconds,
        vocab_size=limits.vocab_size,
        max_queue_size=config.max_queue_size,
        max_waiting_seconds=config.max_waiting_seconds,
        request_deadline_seconds=config.request_deadline_seconds,
        prefix_cache=config.prefix_cache,
        preemption=config.preemption,
        eos_ids=limits.eos_ids,
        seed=config.seed,
        windows=limits.windows,
        num_drafts=config.num_drafts,
        drafts_from_text=drafts_from_text,
        drafts_must_pay=config.speculation == "auto",
    )


def about_pace(max_step_seconds: float, timed: tuple[Batch, float] | None) -> str:
    """A sentence for the log. timed: a step of prompts, and the seconds that it took."""
    if not max_step_seconds:
        return "max_step_seconds=0: prompts have all tokens of a step, however long sequences that decode wait for it"
    said = (
        f"beside sequences that decode, steps have as many prompt tokens as are expected to end within "
        f"{max_step_seconds:g} s (max_step_seconds), {LEAST_TOKENS} at least"
    )
    if timed is None:
        return f"{said}; what steps take is learnt from the first ones"
    return f"{said}; {timed[0].num_tokens} take {timed[1]:.3f} s now"


def _recommended(config: EngineConfig, generation: GenerationConfig, max_model_len: int) -> dict[str, float]:
    """generation_config.json's sampling; the log says what it is and who gets it."""
    sampling, warnings = recommended_sampling(generation, max_model_len)
    for warning in warnings:
        log.warning("%s", warning)
    if sampling:
        whom = (
            "requests that leave them open have"
            if config.generation_defaults
            else "only requests that ask for generation_defaults have"
        )
        values = ", ".join(f"{key} {value:g}" for key, value in sampling.items())
        log.info(
            "sampling that %s from generation_config.json (generation_defaults=%s): %s",
            whom,
            "on" if config.generation_defaults else "off",
            values,
        )
    return sampling


def _about_ends(stop_ids: Mapping[int, str], tokenizer_path: Path | None) -> str:
    """Sentences for the log: where answers end and why, and whether text can be read at all."""
    words = Tokenizer.from_file(str(tokenizer_path)) if tokenizer_path is not None else None
    named = [
        f"{token_id}{f' {word}' if words is not None and (word := words.id_to_token(token_id)) else ''} ({why})"
        for token_id, why in stop_ids.items()
    ]
    ends = (
        f"answers end at {', '.join(named)}"
        if named
        else "no token ends an answer: neither generation_config.json nor config.json nor the tokenizer names one"
    )
    return ends if words is not None else f"no tokenizer beside the checkpoint: requests must bring input_ids; {ends}"
