"""Trains a head that guesses what the demo model says next: `OMP_NUM_THREADS=1 python -m tools.demo_model.train_head
--minutes 45 --bfloat16`.

The model is read from --model and stays as it is; the head's labels are the model's own probabilities, since a guess is
right if it is what the model says. Writes the head into --output (by default where a server finds it beside the model)
and a line of acceptance on held-out text after every --report-seconds. README.md has the results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from tools.demo_model import model_files
from tools.demo_model.chat import Weight
from tools.demo_model.draft_head import DraftHead, Starts
from tools.demo_model.model import DemoModel, Shape, attention_by_document, documents_of
from tools.demo_model.optimizer import Optimizer
from tools.demo_model.recipe import HeadRecipe, timed_share
from tools.demo_model.shards import ID_BITS, shard_stream, token_ids, write_shard
from tools.demo_model.train import HERE, MODEL_FOLDER
from tools.demo_model.validation import split_rows
from tools.demo_model.world import Split

NUM_GUESSES = 4  # a server's default
_LATER_WEIGHT = 0.8  # each guess counts so much of the one before: it is checked if that was right (the paper's value)
_COUNTED_SHARD = 1 << 20  # number of the shard whose tokens are counted: training never comes so far


@dataclass(frozen=True)
class Said:
    """What a batch of rows holds for a head: where guesses begin, and what the model says there."""

    starts: Starts
    answers: list[Tensor]  # of the model's layers, [B, T, hidden] each
    chances: Tensor  # float32 [places, vocab]: the model's probabilities of the next token, wherever that counts
    place_of: Tensor  # int64 [B * T]: which row of `chances` is of the token after this one
    counted: Tensor  # bool [S, NUM_GUESSES]: all tokens from a start to the guessed one are of one answer
    text: Tensor  # int64 [B * T]

    def place(self, number: int) -> Tensor:
        """Rows of `chances` for guess `number` from 0 of the starts that have it."""
        return self.place_of[self.starts.indices[self.counted[:, number]] + number + 1]


@torch.no_grad()
def listen(model: DemoModel, rows: Tensor, dtype: torch.dtype) -> Said:
    """rows: int16 [B, T], as shards.py writes them."""
    ids, codes = split_rows(rows)
    documents = documents_of(ids)
    answers: list[Tensor] = []
    states, _ = model.states(ids, attention_by_document(documents), dtype, answers)
    is_said = functional.pad((codes >= Weight.FREE.value).flatten(), (0, NUM_GUESSES + 1))
    counted = torch.stack([is_said[1 + number : ids.numel() + 1 + number] for number in range(NUM_GUESSES + 1)], 1)
    counted = counted.cumprod(1).bool()  # [B * T, ...]: the next token is of an answer, the one after it, too, ...
    places = counted[:, 0].nonzero().flatten()
    place_of = torch.zeros(ids.numel(), dtype=torch.int64).index_put_((places,), torch.arange(len(places)))
    indices = counted[:, 1].nonzero().flatten()
    positions = indices % ids.shape[1]
    starts = Starts(indices, positions, _spans(documents, indices))
    chances = model.head(states.flatten(0, 1)[places]).float().softmax(-1)
    return Said(starts, answers, chances, place_of, counted[indices, 1:], ids.flatten())


def _spans(documents: Tensor, starts: Tensor) -> list[tuple[slice, slice]]:
    """Of conversations that have starts."""
    rows = torch.arange(len(documents))[:, None] * (documents.shape[1] + 1)
    lengths = torch.unique_consecutive((documents + rows).flatten(), return_counts=True)[1]
    ends = lengths.cumsum(0)
    before = [0, *torch.searchsorted(starts, ends).tolist()]
    found = zip((ends - lengths).tolist(), ends.tolist(), before[:-1], before[1:], strict=True)
    return [(slice(begin, end), slice(first, last)) for begin, end, first, last in found if last > first]


def loss_of(head: DraftHead, rows: Tensor, said: Said) -> Tensor:
    """Cross entropy with the model's probabilities, in nats a guess, of all guesses of all starts. A token that the head
    does not know counts nothing.
    """
    total, weight = torch.zeros(()), 1.0
    for number, logits in enumerate(head.guesses(split_rows(rows)[0], said.answers, said.starts, NUM_GUESSES)):
        wanted = said.chances[said.place(number)][:, head.token_ids]
        found = logits[said.counted[:, number]].float().log_softmax(-1)
        total = total - weight * (wanted * found).sum(-1).mean()
        weight *= _LATER_WEIGHT
    return total / sum(_LATER_WEIGHT**number for number in range(NUM_GUESSES))


@torch.no_grad()
def acceptance(head: DraftHead, model: DemoModel, rows: Tensor, dtype: torch.dtype) -> list[float]:
    """Of each guess that is checked, since those before it were right, the share that is what the model finds likeliest.
    Guesses behind a token that the model finds less likely do not count: the text goes on otherwise than the model.
    """
    right, checked = torch.zeros(NUM_GUESSES), torch.zeros(NUM_GUESSES)
    for some in rows.split(2):
        said = listen(model, some, dtype)
        likeliest = said.chances.argmax(-1)
        alive = torch.ones(len(said.starts.indices), dtype=torch.bool)
        for number, logits in enumerate(head.guesses(split_rows(some)[0], said.answers, said.starts, NUM_GUESSES)):
            alive = alive & said.counted[:, number]
            at = said.starts.indices + number + 1
            wanted = likeliest[said.place_of[at.clamp(max=len(said.text) - 1)]]
            is_right = alive & (head.token_ids[logits.argmax(-1)] == wanted)
            checked[number] += alive.sum()
            right[number] += is_right.sum()
            alive = is_right & (wanted == said.text[(at + 1).clamp(max=len(said.text) - 1)])
    return [round(share, 4) for share in (right / checked.clamp(min=1)).tolist()]


def frequent_tokens(tokenizer: Tokenizer, recipe: HeadRecipe) -> Tensor:
    """int64 [the head's vocab_size], ascending: the tokens that answers are made of most often."""
    count = recipe.shape.vocab_size
    rows = write_shard(tokenizer, replace(recipe.plan, rows_per_shard=recipe.counted_rows), _COUNTED_SHARD)
    said = token_ids(rows)[rows >> ID_BITS >= Weight.FREE.value]
    counts = np.bincount(said, minlength=tokenizer.get_vocab_size())
    chosen = np.argsort(-counts, kind="stable")[:count]
    print(f"{count} tokens are {counts[chosen].sum() / counts.sum():.2%} of what is said", flush=True)
    return torch.from_numpy(np.sort(chosen))


class HeadTraining:
    """A head, the model that it is for, and its optimizer."""

    def __init__(self, recipe: HeadRecipe, head: DraftHead, model: DemoModel, settings: argparse.Namespace) -> None:
        self._recipe, self._head, self._model, self._settings = recipe, head, model, settings
        self._dtype = torch.bfloat16 if settings.bfloat16 else torch.float32
        self._optimizer = Optimizer(head, recipe.rates, self._dtype)
        self._begun = self._reported = time.monotonic()
        self._num_tokens = self._num_steps = 0

    def run(self, shards: Iterator[Any], validation: Tensor) -> None:
        """Until the minutes are used up."""
        losses: list[float] = []
        for shard in shards:
            batches = torch.from_numpy(shard).split(self._recipe.rows_per_step)
            heard = [(rows, listen(self._model, rows, self._dtype)) for rows in batches]
            for rows, said in self._recipe.passes * heard:
                elapsed = (time.monotonic() - self._begun) / (self._settings.minutes * 60)
                value = loss_of(self._head, rows, said)
                value.backward()
                self._optimizer.step(rate := timed_share(self._recipe, self._num_tokens, elapsed))
                losses.append(value.item())
                self._num_tokens += rows.numel()
                self._num_steps += 1
                if elapsed >= 1 or time.monotonic() - self._reported >= self._settings.report_seconds:
                    self._report(sum(losses) / len(losses), rate, validation)
                    losses.clear()
                if elapsed >= 1:
                    return

    def _report(self, loss: float, rate: float, validation: Tensor) -> None:
        model_files.save_head(self._head, self._model.shape, self._settings.output)
        point = {
            "step": self._num_steps,
            "tokens": self._num_tokens,
            "seconds": round(time.monotonic() - self._begun),
            "loss": round(loss, 4),
            "rate": round(rate, 4),
            "acceptance": acceptance(self._head, self._model, validation, self._dtype),
        }
        with self._settings.curve.open("a") as file:
            file.write(json.dumps(point) + "\n")
        print(json.dumps(point), flush=True)
        self._reported = time.monotonic()


def main() -> None:
    settings = _read_options()
    recipe = HeadRecipe()
    torch.manual_seed(recipe.seed)
    model = DemoModel(Shape()).requires_grad_(False)
    tokenizer = model_files.load(model, settings.model)
    head = DraftHead(recipe.shape, model, frequent_tokens(tokenizer, recipe))
    print(json.dumps(asdict(recipe)), f"{sum(map(torch.numel, head.parameters()))} parameters", sep="\n", flush=True)
    plan = replace(recipe.plan, rows_per_shard=recipe.validation_rows)
    validation = torch.from_numpy(write_shard(tokenizer, plan, 0, Split.HELD_OUT))
    settings.curve.parent.mkdir(parents=True, exist_ok=True)
    settings.curve.write_text("")
    with shard_stream(tokenizer, recipe.plan, 0, settings.processes) as shards:
        HeadTraining(recipe, head, model, settings).run(shards, validation)


def _read_options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=Path, default=MODEL_FOLDER, help="folder of the model")
    options.add_argument("--output", type=Path, default=MODEL_FOLDER / "draft_head", help="folder for the head's files")
    options.add_argument("--curve", type=Path, default=HERE / "acceptance.jsonl", help="file for the course of it")
    options.add_argument("--minutes", type=float, default=45.0, help="the learning rate falls to nothing when they end")
    options.add_argument("--bfloat16", action="store_true", help="for a CPU that has instructions for it (avx512_bf16)")
    options.add_argument("--processes", type=int, default=0, help="that write text; 0: the training does")
    options.add_argument("--report-seconds", type=float, default=180.0)
    return options.parse_args()


if __name__ == "__main__":
    main()
