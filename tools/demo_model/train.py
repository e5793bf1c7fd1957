"""Trains the demo model: `python -m tools.demo_model.train --minutes 8.5 --total-minutes 16`, and again with `--resume`
until it says that it is done.

Writes the model's files into --output, what a later command needs to go on into --state, and a line of losses after
every --report-seconds. README.md has the results. With --total-tokens the result depends on the seeds alone (and on how
the device rounds), else also on how fast the device is.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from tools.demo_model import model_files
from tools.demo_model.model import (
    Attention,
    DemoModel,
    attention_by_document,
    causal_attention,
    documents_of,
    masked_attention,
)
from tools.demo_model.optimizer import Optimizer
from tools.demo_model.recipe import BALANCE_WEIGHT, Pace, Recipe, rate_share, timed_share
from tools.demo_model.saved_state import Progress, load_state, read_progress, save_state
from tools.demo_model.shards import ShardPlan, make_tokenizer, shard_stream, write_shard
from tools.demo_model.validation import split_rows, validate
from tools.demo_model.vocabulary import with_later_tokens
from tools.demo_model.world import Split

HERE = Path(__file__).resolve().parent
MODEL_FOLDER = HERE.parents[1] / "model_repository" / "paged_llm" / "1" / "demo_model"
_STARTED = time.monotonic()
_SAVING_SECONDS = 6.0  # at the end of a command
_SAVE_EVERY = 30.0
_MOST_PROCESSES = 14  # each writes some 200,000 tokens a second
_PACE_SHARDS = (4, 16)  # of this command: the rate is measured from the first number to the second

Loss = Callable[[Tensor], Tensor]  # int16 rows [B, T] -> the mean loss of what counts


def weighted_loss(model: DemoModel, rows: Tensor, attention: Attention, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean loss in nats per token, each weighed by its code; with experts also how unevenly they are used. rows:
    int16 [B, T].
    """
    ids, codes = split_rows(rows)
    logits, unevenness = model.with_balance(ids, attention, dtype)
    labels, counted = ids.roll(-1, 1), weights[codes].roll(-1, 1)
    counted = torch.cat((counted[:, :-1], torch.zeros_like(counted[:, :1])), 1)  # the last token has no next one
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return (losses * counted.flatten()).sum() / counted.sum() + BALANCE_WEIGHT * unevenness


def _flex_loss(model: DemoModel, weights: Tensor, dtype: torch.dtype, compiled_mask: bool) -> Loss:
    """The loss with attention within conversations, by flex_attention: skips what no token sees."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    make_mask = torch.compile(create_block_mask, dynamic=False) if compiled_mask else create_block_mask

    def mask_of(documents: Tensor) -> BlockMask:
        def is_seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (documents[row, query] == documents[row, key]) & (query >= key)

        rows, length = documents.shape
        return make_mask(is_seen, rows, None, length, length, device=documents.device.type)

    def loss(rows: Tensor, mask: BlockMask) -> Tensor:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

        return weighted_loss(model, rows, attention, weights, dtype)

    compiled = torch.compile(loss, dynamic=False)
    return lambda rows: compiled(rows, mask_of(documents_of(split_rows(rows)[0]).int()))


def _causal_loss(model: DemoModel, weights: Tensor, dtype: torch.dtype, compiled: bool) -> Loss:
    def loss(rows: Tensor) -> Tensor:
        return weighted_loss(model, rows, causal_attention, weights, dtype)

    return torch.compile(loss, dynamic=False) if compiled else loss


def _masked_loss(model: DemoModel, weights: Tensor, dtype: torch.dtype) -> Loss:
    return lambda rows: weighted_loss(model, rows, masked_attention(documents_of(split_rows(rows)[0])), weights, dtype)


def _loss_by_document(model: DemoModel, weights: Tensor, dtype: torch.dtype) -> Loss:
    """`weighted_loss` as a CPU computes it fastest: no logits where nothing counts."""

    def loss(rows: Tensor) -> Tensor:
        ids, codes = split_rows(rows)
        states, unevenness = model.states(ids, attention_by_document(documents_of(ids)), dtype)
        counted = weights[codes][:, 1:].flatten()
        found = counted.nonzero().flatten()
        logits = model.head(states[:, :-1].flatten(0, 1)[found])
        losses = functional.cross_entropy(logits.float(), ids[:, 1:].flatten()[found], reduction="none")
        return (losses * counted[found]).sum() / counted.sum() + BALANCE_WEIGHT * unevenness

    return loss


def first_that_works(
    losses: dict[str, Callable[[], Loss]], batches: Sequence[Tensor], model: DemoModel
) -> tuple[str, Loss]:
    """The first loss that can be computed and differentiated here; the others are slower. batches: to try it on, so
    many that compiling anew shows.
    """
    for name, make in losses.items():
        try:
            loss = make()
            for batch in batches:
                loss(batch).backward()
        except Exception as error:  # a compiler may fail with anything
            if name == list(losses)[-1]:
                raise
            print(
                f"attention {name} does not work here ({type(error).__name__}: {str(error).splitlines()[:1]}): trying the next",
                flush=True,
            )
        else:
            return name, loss
        finally:
            model.zero_grad(set_to_none=True)
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    output: Path
    state: Path
    curve: Path
    minutes: float
    total_minutes: float
    total_tokens: int | None
    resume: bool
    attention: str
    processes: int
    by_time: bool
    bfloat16: bool
    start_from: Path | None
    tokenizer: Path | None
    report_seconds: float


class Training:
    """A model, its optimizer and how far they are."""

    def __init__(self, recipe: Recipe, settings: Settings) -> None:
        self.recipe, self.settings = recipe, settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" or settings.bfloat16 else torch.float32
        torch.manual_seed(recipe.seed)
        torch.set_float32_matmul_precision("high")
        self.model = DemoModel(recipe.shape).to(self.device)
        self.optimizer = Optimizer(self.model, recipe.rates, self.dtype)
        self.progress = Progress()
        self.weights = torch.tensor(recipe.token_weights, device=self.device)
        self.pace = Pace(settings.minutes * 60, settings.total_minutes * 60)
        self.stopping = False
        self._num_trials = 1
        if self.device.type == "cuda":
            if hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
                # else what is compiled over and over runs on uncompiled, and slowly
                torch._dynamo.config.fail_on_recompile_limit_hit = True
            self._num_trials = 10
        self._last_saved = self._last_reported = time.monotonic()
        self._began = 0.0  # seconds after the command's start: the first step

    def run(self, tokenizer: Tokenizer, shards: Iterator[Any], validation: Tensor) -> bool:
        """Trains until the tokens or the minutes are used up; whether it was the tokens."""
        progress, settings, total = self.progress, self.settings, self.progress.total_tokens
        loss: Loss | None = None
        for number, shard in enumerate(shards):
            rows = self._on_device(torch.from_numpy(shard))
            if loss is None:
                name, loss = first_that_works(
                    self._losses(), rows.split(self.recipe.rows_per_step)[: self._num_trials], self.model
                )
                print(
                    f"{time.monotonic() - _STARTED:.0f} s: training with attention {name} on {self.device}", flush=True
                )
                start_seconds = self._began = time.monotonic() - _STARTED
            mean = self._train_on(rows, loss, total)
            progress.shard += 1
            if number == _PACE_SHARDS[0]:
                mark = (time.monotonic(), progress.num_tokens)
            elif number == _PACE_SHARDS[1] and settings.total_tokens is None and not settings.by_time:
                rate = (progress.num_tokens - mark[1]) / (time.monotonic() - mark[0])
                total = self.pace.total_tokens(
                    progress.num_tokens, rate, progress.used_seconds, time.monotonic() - _STARTED, start_seconds
                )
                progress.total_tokens = total
                print(f"{rate:,.0f} tokens/s: {total:,} tokens in all", flush=True)
            done = total is not None and progress.num_tokens >= total
            late = self.stopping or time.monotonic() - _STARTED > settings.minutes * 60 - _SAVING_SECONDS
            self._report(mean, validation, total, at_once=done or late)
            self._save(tokenizer, at_once=done or late)
            if done or late:
                return done
        raise AssertionError("the shards do not end")

    def _train_on(self, rows: Tensor, loss: Loss, total: int | None) -> float:
        """All of a shard. The mean loss; asking for it is the only time that the host waits for the device."""
        losses = []
        for batch in rows.split(self.recipe.rows_per_step):
            value = loss(batch)
            value.backward()
            self.optimizer.step(self._rate_share(total))
            losses.append(value.detach())
            self.progress.num_tokens += batch.numel()
            self.progress.num_steps += 1
        return float(torch.stack(losses).mean())

    def _rate_share(self, total: int | None) -> float:
        """Of the peak learning rate, now."""
        if not self.settings.by_time:
            return rate_share(self.recipe, self.progress.num_tokens, total)
        whole = self.settings.minutes * 60 - _SAVING_SECONDS - self._began
        return timed_share(self.recipe, self.progress.num_tokens, (time.monotonic() - _STARTED - self._began) / whole)

    def _losses(self) -> dict[str, Callable[[], Loss]]:
        model, weights, dtype = self.model, self.weights, self.dtype
        every: dict[str, Callable[[], Loss]] = {
            "flex": lambda: _flex_loss(model, weights, dtype, compiled_mask=True),
            "flex with a plain mask": lambda: _flex_loss(model, weights, dtype, compiled_mask=False),
            "causal": lambda: _causal_loss(model, weights, dtype, compiled=True),
            "eager": lambda: _causal_loss(model, weights, dtype, compiled=False),
            "by document": lambda: _loss_by_document(model, weights, dtype),
            "masked": lambda: _masked_loss(model, weights, dtype),
        }
        if self.settings.attention != "auto":
            return {self.settings.attention: every[self.settings.attention]}
        return {
            name: every[name]
            for name in (
                ("flex", "flex with a plain mask", "causal", "eager")
                if self.device.type == "cuda"
                else ("by document",)
            )
        }

    def _on_device(self, rows: Tensor) -> Tensor:
        return rows.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else rows

    def _report(self, loss: float, validation: Tensor, total: int | None, at_once: bool) -> None:
        if not at_once and time.monotonic() - self._last_reported < self.settings.report_seconds:
            return
        self._last_reported = time.monotonic()
        progress = self.progress
        seconds = progress.used_seconds + time.monotonic() - _STARTED
        point: dict[str, Any] = {
            "step": progress.num_steps,
            "tokens": progress.num_tokens,
            "seconds": round(seconds),
            "loss": round(loss, 4),
        }
        point |= {
            "rate": round(self._rate_share(total), 4),
            "validation": validate(self.model, validation, self.dtype),
        }
        with self.settings.curve.open("a") as file:
            file.write(json.dumps(point) + "\n")
        print(json.dumps(point), flush=True)

    def _save(self, tokenizer: Tokenizer, at_once: bool) -> None:
        if not at_once and time.monotonic() - self._last_saved < _SAVE_EVERY:
            return
        self._last_saved = time.monotonic()
        model_files.save(self.model, tokenizer, self.settings.output)
        used = self.progress.used_seconds + time.monotonic() - _STARTED
        save_state(self.settings.state, self.model, self.optimizer, self.progress.after(used), tokenizer)


def main() -> None:
    """The whole training, or as much of it as --minutes allow."""
    settings, recipe = _read_options()
    progress = read_progress(settings.state) if settings.resume else Progress()
    settings.curve.parent.mkdir(parents=True, exist_ok=True)
    if not settings.resume:
        settings.curve.write_text("")
    tokenizer = _tokenizer(settings, recipe)
    print(f"{time.monotonic() - _STARTED:.0f} s: tokenizer of {tokenizer.get_vocab_size()} entries", flush=True)
    # before CUDA: its processes are forked
    with shard_stream(tokenizer, recipe.plan, progress.shard, settings.processes) as shards:
        training = Training(recipe, settings)
        signal.signal(signal.SIGTERM, lambda *_: setattr(training, "stopping", True))
        training.progress = progress
        if settings.resume:
            load_state(settings.state, training.model, training.optimizer, progress)
        elif settings.start_from is not None:
            model_files.load(training.model, settings.start_from)
        if settings.total_tokens is not None:
            progress.total_tokens = settings.total_tokens
        print(
            json.dumps(asdict(recipe)),
            f"{sum(map(torch.numel, training.model.parameters()))} parameters",
            sep="\n",
            flush=True,
        )
        plan = ShardPlan(
            recipe.validation_rows,
            recipe.plan.row_len,
            early_shards=recipe.plan.early_shards if recipe.plan.early_shards > 1000 else 0,
            mixture=recipe.plan.mixture,
        )
        validation = torch.from_numpy(write_shard(tokenizer, plan, 0, Split.HELD_OUT)).to(training.device)
        done = training.run(tokenizer, shards, validation)
    print(f"{progress.num_tokens:,} tokens: {'done' if done else 'go on with --resume'}", flush=True)


def _tokenizer(settings: Settings, recipe: Recipe) -> Tokenizer:
    if settings.resume:
        return Tokenizer.from_file(str(settings.state / "tokenizer.json"))
    folder = settings.start_from or settings.tokenizer
    if folder is not None:
        return with_later_tokens(Tokenizer.from_file(str(folder / "tokenizer.json")))
    return make_tokenizer(recipe.tokenizer_conversations)


def _read_options() -> tuple[Settings, Recipe]:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=MODEL_FOLDER, help="folder for the model's files")
    options.add_argument(
        "--state",
        type=Path,
        default=Path("build/demo_model_state"),
        help="folder for what --resume needs, in parts below 16 MB",
    )
    options.add_argument("--curve", type=Path, default=HERE / "loss.jsonl", help="file for the losses")
    options.add_argument(
        "--minutes", type=float, default=1e6, help="this command ends before that, start and saving included"
    )
    options.add_argument("--total-minutes", type=float, default=16.0, help="of all commands together")
    options.add_argument("--total-tokens", type=int, help="train on so many, however long it takes")
    options.add_argument("--resume", action="store_true", help="go on where the last command stopped")
    options.add_argument(
        "--attention",
        default="auto",
        choices=("auto", "flex", "flex with a plain mask", "causal", "eager", "by document", "masked"),
    )
    options.add_argument(
        "--processes",
        type=int,
        default=max(0, min(_MOST_PROCESSES, len(os.sched_getaffinity(0)) - 2)),
        help="that write text; 0: the training does",
    )
    options.add_argument("--report-seconds", type=float, default=20.0)
    options.add_argument(
        "--tiny", action="store_true", help="a very small model, on short rows: to see it work on a CPU"
    )
    options.add_argument(
        "--by-time",
        action="store_true",
        help="the learning rate falls to nothing when --minutes end, however many tokens that is",
    )
    options.add_argument(
        "--bfloat16", action="store_true", help="as on a GPU: for a CPU that has instructions for it (avx512_bf16, amx)"
    )
    options.add_argument(
        "--start-from", type=Path, help="folder of a demo model that is to learn calls and thoughts, too"
    )
    options.add_argument("--tokenizer", type=Path, help="folder of a model whose tokenizer is to be taken")
    options.add_argument("--experts", type=int, default=0, help="a model with so many experts, in Qwen3-MoE's form")
    options.add_argument("--top-k", type=int, default=2, help="experts that compute a token")
    chosen = vars(options.parse_args())
    tiny, experts, top_k = chosen.pop("tiny"), chosen.pop("experts"), chosen.pop("top_k")
    recipe = Recipe.tiny() if tiny and not experts else Recipe()
    if chosen["start_from"]:
        recipe = Recipe.agents() if torch.cuda.is_available() else Recipe.agents_on_cpu()
    if experts:
        recipe = recipe.of_experts(experts, top_k)
    if tiny and (experts or chosen["start_from"]):
        recipe = recipe.in_small_steps()
    return Settings(**chosen), recipe


if __name__ == "__main__":
    main()
