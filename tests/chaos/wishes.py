"""What is asked for: requests that can be repeated, with every way of sampling, and requests that must be refused."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.server.hostile_requests import CASES, HEAVY

MAX_MODEL_LEN = 512
NUM_PAGES = 40  # of 16 tokens: one longest sequence takes 32
_SHARED = "Once upon a time there was a clever baker called Mira. " * 3
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}

ADAPTERS = ("first", "second")  # more than the device has room for at once

SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "stop": ["the", "Mira"]},
    {"temperature": 1.1, "seed": 5},
    {"temperature": 0.9, "top_p": 0.8, "seed": 6, "n": 3},
    {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "seed": 7},
    {
        "temperature": 1.0,
        "min_p": 0.05,
        "seed": 8,
        "logit_bias": {"20": 2.0},
        "bad_words": ["house"],
        "n": 2,
        "logprobs": 0,
    },
    {"temperature": 0, "min_tokens": 1, "logprobs": 3},
    {"temperature": 0.7, "seed": 9, "guided_regex": "(yes|no|perhaps), [a-z]{3,9}!"},
    {"temperature": 0.9, "seed": 10, "guided_json": json.dumps(_SCHEMA)},
    {"temperature": 1.0, "seed": 11, "guided_choice": ["a fox", "a lamp", "a very long answer indeed"], "n": 2},
    {"temperature": 1.2, "seed": 2**64 - 1, "skip_prefix_cache": True, "priority_level": 1, "logprobs": 1},
    {"use_beam_search": True, "beam_width": 4, "n": 2, "length_penalty": 0.8},
    {"use_beam_search": True, "beam_width": 3, "early_stopping": True, "logprobs": 0},
    {"temperature": 1.0, "seed": 12, "allowed_token_ids": list(range(200, 900, 3)), "ignore_eos": True},
    {"temperature": 1.0, "seed": 13, "prompt_logprobs": 2, "n": 2},
    {"temperature": 0, "lora_name": ADAPTERS[0]},
    {"temperature": 0.9, "seed": 14, "lora_name": ADAPTERS[1], "n": 2, "logprobs": 1},
    {"use_beam_search": True, "beam_width": 2, "lora_name": ADAPTERS[1], "prompt_logprobs": 0},
    {"temperature": 0, "frequency_penalty": -2.0, "logprobs": 1},  # goes in circles
)


@dataclass(frozen=True)
class Wish:
    """A request that can be repeated. tensors and parameters as tests/server/calls.py takes them, without those that
    say how it is answered.
    """

    number: int
    tensors: dict[str, Any]
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        return int(self.tensors["sampling_parameters"].get("n", 1))

    @property
    def prompt_logprobs(self) -> bool:
        return "prompt_logprobs" in self.tensors["sampling_parameters"]

    @property
    def logprobs(self) -> bool:
        return "logprobs" in self.tensors["sampling_parameters"]

    def with_sampling(self, **sampling: Any) -> dict[str, Any]:
        return {**self.tensors, "sampling_parameters": {**self.tensors["sampling_parameters"], **sampling}}


def make_wishes(chance: random.Random, structured: bool = True, count: int = 76) -> list[Wish]:
    """Prompts with and without common beginnings, of all lengths up to most of the pool, for one or another tenant,
    with every way of sampling.
    """
    samplings = [
        sampling for sampling in SAMPLINGS if structured or not any(key.startswith("guided") for key in sampling)
    ]
    made = []
    for number in range(count):
        text = (_SHARED if number % 2 else "") + f"Story {number}. " * chance.choice([1, 1, 2, 3, 5, 8, 30])
        sampling = dict(samplings[number % len(samplings)])
        guided = any(key.startswith("guided") for key in sampling)
        if number % 3 and not guided:
            sampling["ignore_eos"] = True
        tensors = {
            "text_input": text,
            "max_tokens": 48 if guided else chance.choice([1, 2, 3, 5, 9, 15, 16, 17, 40]),
            "sampling_parameters": sampling,
        }
        if "logprobs" in sampling:
            tensors["return_logprobs"] = True
        if "prompt_logprobs" in sampling:
            tensors["return_prompt_logprobs"] = True
        made.append(Wish(number, tensors, {"cache_salt": f"tenant {number % 4}"} if number % 4 else {}))
    return made


def save_shallow(folder: Path, checkpoint: Path, num_layers: int) -> None:
    """Writes a checkpoint that is the first layers of another one: less sense, and more requests a second."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))


def save_adapters(folder: Path, checkpoint: Path) -> None:
    """Writes ADAPTERS for a Llama checkpoint, as PEFT would."""
    config = json.loads((checkpoint / "config.json").read_text())
    hidden, rank = config["hidden_size"], 2
    for number, name in enumerate(ADAPTERS):
        generator = np.random.default_rng(number)
        tensors = {}
        for layer, (module, width) in itertools.product(
            range(config["num_hidden_layers"]),
            {"q_proj": config["num_attention_heads"] * config["head_dim"], "o_proj": hidden}.items(),
        ):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            columns = hidden if module == "q_proj" else config["num_attention_heads"] * config["head_dim"]
            tensors[f"{stem}.lora_A.weight"] = generator.normal(0, 0.3, (rank, columns)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = generator.normal(0, 0.05, (width, rank)).astype(np.float32)
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "adapter_model.safetensors")
        asked = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "o_proj"],
            "task_type": "CAUSAL_LM",
            "bias": "none",
        }
        (folder / name / "adapter_config.json").write_text(json.dumps(asked))


def long_wish() -> Wish:
    """A prompt of nearly the longest length: it wants most of the pool, and whoever runs beside it is preempted."""
    return Wish(
        -1,
        {
            "input_ids": [5 + position % 50 for position in range(440)],
            "max_tokens": 40,
            "sampling_parameters": {"temperature": 0, "ignore_eos": True},
        },
    )


HOSTILE = tuple((name, tensors, named) for name, (tensors, named) in CASES.items() if name not in HEAVY)
