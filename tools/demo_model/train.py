"""Rebuilds the demo model: `python tools/demo_model/train.py` writes its five files, and the losses beside this script. README.md has the results."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from generator import documents
from packing import batches, token_rows
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from vocabulary import BOS_ID, EOS_ID, for_transformers, train_tokenizer

HERE = Path(__file__).resolve().parent
MODEL_FOLDER = HERE.parents[1] / "model_repository" / "paged_llm" / "1" / "demo_model"
TOKENIZER_SEED, VALIDATION_SEED, TRAIN_SEED = 1, 2, 10  # a stage's seed is TRAIN_SEED plus its number
_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Stage:
    """A part of the training. Lengths in tokens."""

    num_steps: int
    num_rows: int  # in a step's batch
    row_len: int
    sketch_share: float  # of the documents


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the generator.

    Short rows of single facts come first: in long stories alone, a model this small does not find out within minutes that names and things are to be looked up.
    """

    vocab_size: int = 1280
    hidden_size: int = 128
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 4  # of 32 each
    num_kv_heads: int = 2
    max_model_len: int = 2048
    initial_deviation: float = 0.09  # 1 / sqrt(hidden_size)
    stages: tuple[Stage, ...] = (Stage(500, 12, 96, sketch_share=1.0), Stage(1700, 8, 256, sketch_share=0.25))
    warmup_steps: int = 40
    peak_learning_rate: float = 3e-3
    final_learning_rate: float = 1e-4
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    tokenizer_documents: int = 8000
    validation_rows: int = 128
    steps_between_validations: int = 100
    seed: int = 0

    @property
    def num_steps(self) -> int:
        return sum(stage.num_steps for stage in self.stages)

    @property
    def num_tokens(self) -> int:
        return sum(stage.num_steps * stage.num_rows * stage.row_len for stage in self.stages)


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """The untrained model, float32."""
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.hidden_size // recipe.num_heads,
        max_position_embeddings=recipe.max_model_len,
        tie_word_embeddings=True,
        initializer_range=recipe.initial_deviation,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # what the residual adds up, layer by layer
                parameter.div_(math.sqrt(2 * recipe.num_layers))
    return model


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to the final rate."""
    if step < recipe.warmup_steps:
        return recipe.peak_learning_rate * step / recipe.warmup_steps
    share = (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps)
    return recipe.final_learning_rate + (recipe.peak_learning_rate - recipe.final_learning_rate) * (1 + math.cos(math.pi * share)) / 2


def make_optimizer(recipe: Recipe, model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """AdamW; the norms' gains are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=(0.9, 0.98), fused=True)


def batch_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean loss in nats per token of ids and labels, both int64 [num_rows, row_len]. A token sees those before it in its own document only."""
    document_of = (ids == BOS_ID).cumsum(1)
    is_seen = (document_of[:, :, None] == document_of[:, None, :]).tril()
    loss: Tensor = model(input_ids=ids, labels=labels, attention_mask=is_seen[:, None], use_cache=False).loss
    return loss


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, rows: tuple[Tensor, Tensor]) -> float:
    """Mean loss in nats per token over `rows`: (ids, labels), each int64 [num_rows, row_len]."""
    total, count = 0.0, 0
    for ids, labels in zip(rows[0].split(_ROWS_AT_ONCE), rows[1].split(_ROWS_AT_ONCE), strict=True):
        num_tokens = int((labels[:, 1:] >= 0).sum())
        total += float(batch_loss(model, ids, labels)) * num_tokens
        count += num_tokens
    return total / count


def training_batches(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (ids, labels) of every step, each int64 [num_rows, row_len]."""
    for number, stage in enumerate(recipe.stages):
        rows = token_rows(tokenizer, documents(TRAIN_SEED + number, stage.sketch_share), stage.row_len, EOS_ID)
        yield from islice(batches(rows, stage.num_rows), stage.num_steps)


def validation_rows(recipe: Recipe, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Rows as those of the last stage, of documents that training does not see."""
    stage = recipe.stages[-1]
    rows = token_rows(tokenizer, documents(VALIDATION_SEED, stage.sketch_share), stage.row_len, EOS_ID)
    return next(batches(rows, recipe.validation_rows))


def train(recipe: Recipe, model: LlamaForCausalLM, tokenizer: Tokenizer, curve: Path) -> None:
    """Trains `model` in place; `curve` gets one JSON line at every validation."""
    optimizer = make_optimizer(recipe, model)
    validation = validation_rows(recipe, tokenizer)
    started, num_tokens = time.monotonic(), 0
    losses: list[float] = []
    curve.write_text("")
    for step, (ids, labels) in enumerate(training_batches(recipe, tokenizer), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = batch_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        num_tokens += ids.numel()
        if step % recipe.steps_between_validations and step != recipe.num_steps:
            continue
        seconds = time.monotonic() - started
        point = {"step": step, "tokens": num_tokens, "loss": fmean(losses), "validation_loss": mean_loss(model, validation), "seconds": round(seconds)}
        losses.clear()
        with curve.open("a") as file:
            file.write(json.dumps(point) + "\n")
        left = seconds / num_tokens * (recipe.num_tokens - num_tokens)
        print(f"step {step}/{recipe.num_steps}  loss {point['loss']:.4f}  validation {point['validation_loss']:.4f}  {left:.0f} s left", flush=True)


def save(recipe: Recipe, model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes configuration, tokenizer and bfloat16 weights."""
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID)
    model.to(torch.bfloat16).save_pretrained(folder)
    for_transformers(tokenizer, recipe.max_model_len).save_pretrained(folder)
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size:9} {file.name}")


def main() -> None:
    """The whole rebuild; the options are for trying things out."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", type=Path, default=MODEL_FOLDER, help="folder for the model's files")
    options.add_argument("--curve", type=Path, default=HERE / "loss.jsonl", help="file for the losses")
    options.add_argument("--threads", type=int, default=2, help="the sums' order, and so the last digits, depend on it")
    chosen = options.parse_args()
    recipe = Recipe()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(islice(documents(TOKENIZER_SEED, recipe.stages[-1].sketch_share), recipe.tokenizer_documents), recipe.vocab_size)
    model = build_model(recipe)
    print(json.dumps(asdict(recipe)), f"{model.num_parameters()} parameters, {recipe.num_tokens} training tokens", sep="\n", flush=True)
    train(recipe, model, tokenizer, chosen.curve)
    save(recipe, model, tokenizer, chosen.output)


if __name__ == "__main__":
    main()
