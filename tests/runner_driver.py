"""Drives a ModelRunner with hand-made batches: a stand-in for the scheduler that scatters pages, chunks prompts and
mixes steps as it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paged_backend.arrays import Int32
from paged_backend.batch import AdapterUse, Ask, Batch, NewRow, features_of
from paged_backend.config import EngineConfig
from paged_backend.request import SamplingParams
from paged_backend.runner.builder import build_runner
from paged_backend.runner.model_runner import ModelRunner
from paged_backend.runner.step_plan import plan_step, shape_of

GREEDY = SamplingParams(temperature=0.0)


def load_runner(folder: Path, tell: Callable[[str], None] = lambda sentence: None, **options: Any) -> ModelRunner:
    """A float32 runner on the CPU; `options` are those of EngineConfig."""
    return build_runner(
        EngineConfig(**{"model": str(folder), "device": "cpu", "dtype": "float32", "num_pages": 512, **options}), tell
    )


class _Live:
    """A sequence as the driver sees it."""

    def __init__(self, index: int, row: int, new: NewRow, max_tokens: int) -> None:
        self.index, self.row, self.new, self.max_tokens = index, row, new, max_tokens
        self.num_tokens, self.num_computed, self.num_pages = len(new.token_ids), 0, 0
        self.pages: list[int] = []
        self.launched = 0  # tokens sampled or in flight


class Driver:
    """Sequences get rows in random order and pages at random, a page at a time, as their tokens need them; both come
    back when a sequence ends.
    """

    def __init__(self, runner: ModelRunner, seed: int = 0, num_rows: int = 64) -> None:
        self.runner = runner
        self._random = np.random.default_rng(seed)
        self._free_rows = list(self._random.permutation(num_rows))
        self._free_pages = list(self._random.permutation(runner.limits.num_pages))
        self._steps = 0
        self.results: list[Any] = []

    def generate(
        self,
        prompts: Sequence[Int32],
        max_tokens: int,
        sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
        chunk: int = 10_000,
        arrive_every: int = 0,
        steps_ahead: int = 0,
        seeds: Sequence[int] | None = None,
        stop_ids: tuple[int, ...] = (),
        bad_words: tuple[tuple[int, ...], ...] = (),
        adapter_slots: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Answers of exactly max_tokens tokens. A prompt is computed `chunk` tokens a step; a new one starts every
        `arrive_every` steps (0: all at once). adapter slots: of the prompts' adapters; -1: none.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        waiting = [
            NewRow(0, prompt, len(prompt), params, seed, stop_ids, bad_words, features_of(params, stop_ids, bad_words))
            for prompt, params, seed in zip(prompts, samplings, seeds or range(len(prompts)), strict=True)
        ]
        self._adapter_slots = adapter_slots or [-1] * len(prompts)
        answers: list[list[int]] = [[] for _ in prompts]
        live: list[_Live] = []
        started, turn = 0, 0
        while live or started < len(waiting) or self.runner.num_in_flight:
            new_rows = []
            while started < len(waiting) and (arrive_every == 0 or started <= turn // arrive_every) and self._free_rows:
                new = waiting[started]
                row = int(self._free_rows.pop())
                new_rows.append(replace(new, row=row))
                live.append(_Live(started, row, new_rows[-1], max_tokens))
                started += 1
            turn += 1
            running = [sequence for sequence in live if sequence.launched < sequence.max_tokens]
            if running:
                self.runner.launch(self._batch(running, new_rows, chunk))
            for batch, result in self.runner.finished(steps_ahead if running else 0):
                self.results.append((batch, result))
                for index, token in zip(
                    batch.request_ids[batch.samples].tolist(), result.token_ids.tolist(), strict=True
                ):
                    answers[index].append(token)
            live = self._drop_finished(live, answers)
        return answers

    def _batch(self, running: list[_Live], new_rows: list[NewRow], chunk: int) -> Batch:
        updates, starts, counts, samples = [], [], [], []
        for sequence in running:
            starts.append(sequence.num_computed)
            counts.append(min(chunk, sequence.num_tokens - sequence.num_computed))
            sequence.num_computed += counts[-1]
            limits = self.runner.limits
            width, num_groups = -(-limits.max_model_len // limits.page_size), len(limits.windows)
            while len(sequence.pages) // num_groups * limits.page_size < sequence.num_computed:
                index = len(sequence.pages) // num_groups
                for group in range(num_groups):
                    sequence.pages.append(int(self._free_pages.pop()))
                    updates.append((sequence.row, group * width + index, sequence.pages[-1]))
            samples.append(sequence.num_computed == sequence.num_tokens)
            sequence.num_tokens += samples[-1]
            sequence.launched += samples[-1]
        self._steps += 1
        features = 0
        for sequence in running:
            features |= sequence.new.features
        return Batch(
            step=self._steps,
            rows=np.array([sequence.row for sequence in running], np.int32),
            starts=np.array(starts, np.int32),
            counts=np.array(counts, np.int32),
            samples=np.array(samples, np.bool_),
            request_ids=np.array([sequence.index for sequence in running], np.int64),
            new_rows=tuple(new_rows),
            page_updates=np.array(updates, np.int32).reshape(-1, 3),
            features=features,
            asks=self._asks(running, new_rows),
        )

    def _asks(self, running: list[_Live], new_rows: list[NewRow]) -> tuple[Ask, ...]:
        adapted = {sequence.row: slot for sequence in running if (slot := self._adapter_slots[sequence.index]) >= 0}
        new = [(new.row, adapted[new.row]) for new in new_rows if new.row in adapted]
        return (AdapterUse((), True, np.array(new, np.int32).reshape(-1, 2)),) if adapted else ()

    def _drop_finished(self, live: list[_Live], answers: list[list[int]]) -> list[_Live]:
        for sequence in live:
            if len(answers[sequence.index]) == sequence.max_tokens:
                self._free_rows.append(sequence.row)
                self._free_pages = [*self._random.permutation([*self._free_pages, *sequence.pages])]
        return [sequence for sequence in live if len(answers[sequence.index]) < sequence.max_tokens]


def last_logits(runner: ModelRunner, prompts: list[np.ndarray]) -> torch.Tensor:
    """[len(prompts), vocab] float32 on the CPU: after each prompt, computed alone."""
    logits, limits = [], runner.limits
    width, groups = -(-limits.max_model_len // limits.page_size), range(len(limits.windows))
    for prompt in prompts:
        count = -(-len(prompt) // limits.page_size)
        places = [(0, group * width + index, group * count + index) for group in groups for index in range(count)]
        pages = np.array(places, np.int32)
        one, length = np.zeros(1, np.int32), np.array([len(prompt)], np.int32)
        new = NewRow(0, prompt, len(prompt), GREEDY, 0, (), ())
        batch = Batch(1, one, one, length, np.ones(1, np.bool_), one.astype(np.int64), (new,), pages)
        with torch.inference_mode():
            step = runner._rows.apply(batch, plan_step(batch, shape_of(batch)))
            logits.append(runner._decoder.forward(step, runner._kv_pages).float().cpu())
    return torch.cat(logits)
