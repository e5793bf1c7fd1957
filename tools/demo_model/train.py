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

import torch
from packing import batches, documents, token_rows
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from vocabulary import BOS_ID, EOS_ID, for_transformers, train_tokenizer

HERE = Path(__file__).resolve().parent
MODEL_FOLDER = HERE.parents[1] / "model_repository" / "paged_llm" / "1" / "demo_model"
TRAIN_SEED, VALIDATION_SEED, TOKENIZER_SEED = 1, 2, 3


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the generator. Lengths in tokens."""

    vocab_size: int = 1280
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 6
    num_heads: int = 4  # of 32 each
    num_kv_heads: int = 2
    max_model_len: int = 2048
    tokenizer_documents: int = 8000
    row_len: int = 256
    rows_per_step: int = 12
    num_steps: int = 1300
    warmup_steps: int = 60
    peak_learning_rate: float = 4e-3
    final_learning_rate: float = 1e-4
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    validation_rows: int = 128
    steps_between_validations: int = 100
    seed: int = 0


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
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to the final rate."""
    if step < recipe.warmup_steps:
        return recipe.peak_learning_rate * (step + 1) / recipe.warmup_steps
    share = (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps)
    return recipe.final_learning_rate + (recipe.peak_learning_rate - recipe.final_learning_rate) * (1 + math.cos(math.pi * share)) / 2


def make_optimizer(recipe: Recipe, model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """AdamW; the norms' gains are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=(0.9, 0.98), fused=True)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, rows: tuple[Tensor, Tensor], rows_at_once: int) -> float:
    """Mean loss in nats per token over `rows`: (ids, labels), each int64 [num_rows, row_len]."""
    total, count = 0.0, 0
    for ids, labels in zip(rows[0].split(rows_at_once), rows[1].split(rows_at_once), strict=True):
        num_tokens = int((labels[:, 1:] >= 0).sum())
        total += float(model(input_ids=ids, labels=labels, use_cache=False).loss) * num_tokens
        count += num_tokens
    return total / count


def train(recipe: Recipe, model: LlamaForCausalLM, training: Iterator[tuple[Tensor, Tensor]], validation: tuple[Tensor, Tensor], curve: Path) -> None:
    """Trains `model` in place; `curve` gets one JSON line at every validation."""
    optimizer = make_optimizer(recipe, model)
    started, since, losses = time.monotonic(), 0, 0.0
    curve.write_text("")
    for step in range(recipe.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        ids, labels = next(training)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses, since = losses + float(loss.detach()), since + 1
        done = step + 1
        if done % recipe.steps_between_validations and done != recipe.num_steps:
            continue
        seconds = time.monotonic() - started
        validation_loss = mean_loss(model, validation, recipe.rows_per_step)
        point = {"step": done, "tokens": done * ids.numel(), "loss": round(losses / since, 4), "validation_loss": round(validation_loss, 4), "seconds": round(seconds)}
        with curve.open("a") as file:
            file.write(json.dumps(point) + "\n")
        left = seconds / done * (recipe.num_steps - done)
        print(f"step {done}/{recipe.num_steps}  loss {losses / since:.4f}  validation {validation_loss:.4f}  {seconds:.0f} s, {left:.0f} s left", flush=True)
        losses, since = 0.0, 0


def save(recipe: Recipe, model: LlamaForCausalLM, tokenizer_folder: Path) -> None:
    """Writes config, generation config and bfloat16 weights."""
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, do_sample=False)
    model.to(torch.bfloat16).save_pretrained(tokenizer_folder)


def main() -> None:
    """The whole rebuild; the options are for trying things out."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", type=Path, default=MODEL_FOLDER, help="folder for the model's files")
    options.add_argument("--curve", type=Path, default=HERE / "loss.jsonl", help="file for the losses")
    options.add_argument("--threads", type=int, default=2, help="the sums' order, and so the last digits, depend on it")
    options.add_argument("--steps", type=int, default=Recipe.num_steps)
    chosen = options.parse_args()
    recipe = Recipe(num_steps=chosen.steps)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(recipe.seed)
    print("recipe", json.dumps(asdict(recipe)))

    tokenizer = train_tokenizer(islice(documents(TOKENIZER_SEED), recipe.tokenizer_documents), recipe.vocab_size)
    for_transformers(tokenizer, recipe.max_model_len).save_pretrained(chosen.output)
    validation_texts = documents(VALIDATION_SEED)
    validation = next(batches(token_rows(tokenizer, validation_texts, recipe.row_len, EOS_ID), recipe.validation_rows))
    training = batches(token_rows(tokenizer, documents(TRAIN_SEED), recipe.row_len, EOS_ID), recipe.rows_per_step)
    model = build_model(recipe)
    print(f"{model.num_parameters()} parameters")
    train(recipe, model, training, validation, chosen.curve)
    save(recipe, model, chosen.output)
    print("bytes", {file.name: file.stat().st_size for file in sorted(chosen.output.iterdir())})


if __name__ == "__main__":
    main()
