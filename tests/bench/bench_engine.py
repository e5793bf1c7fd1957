"""The engine alone, without a server: output tokens a second at true geometries with random weights. Prints JSON lines.

    python -m tests.bench.bench_engine --model llama-3.2-1b --batches 1 32 256 --mix

Steady: `--batches` requests at once, 128 random tokens in, 256 out, greedy, end of sequence ignored; the best of the
repeats is not taken, their median is. With `--rounds 4` each of them is followed by three more, one after the other, as
`paged bench` asks a server: prompts are then computed beside streams. Mix: nano-vllm's bench, 256 requests at once,
lengths uniform in 100 … 1024 for prompt and answer (random, seed 0), temperature 0.6. The prefix cache is off. A
warm-up of the same kind runs first.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from tests.bench.geometries import GEOMETRIES, write_geometry
from tests.bench.yardstick import print_row


class Load:
    """Feeds requests to an engine and drains it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._serial = 0

    def run(self, requests: list[tuple[np.ndarray, SamplingParams]], at_once: int | None = None) -> dict[str, float]:
        """All requests at once, or so many: then another one takes the place of each that ends. Tokens out, seconds,
        and seconds to the first token of the first request.
        """
        started = time.perf_counter()
        waiting = deque(requests)
        for _ in range(len(requests) if at_once is None else at_once):
            self._submit(*waiting.popleft())
        num_tokens, first = 0, 0.0
        steps = self._engine.num_steps
        while not self._engine.idle:
            for output in self._engine.step():
                num_tokens += len(output.token_ids)
                first = first or (time.perf_counter() - started if num_tokens else 0.0)
                for _ in output.finishes[: len(waiting)]:
                    self._submit(*waiting.popleft())
        seconds = time.perf_counter() - started
        return {"tokens": num_tokens, "seconds": seconds, "first": first, "steps": self._engine.num_steps - steps}

    def _submit(self, prompt: np.ndarray, sampling: SamplingParams) -> None:
        self._serial += 1
        self._engine.submit(Submit(self._serial, prompt.astype(np.int32).tobytes(), sampling, (), "", time.monotonic()))


def steady(batch: int, vocab_size: int, seed: int) -> list[tuple[np.ndarray, SamplingParams]]:
    generator = np.random.default_rng(seed)
    sampling = SamplingParams(max_tokens=256, temperature=0.0, ignore_eos=True)
    return [(generator.integers(0, vocab_size, 128), sampling) for _ in range(batch)]


def mix(vocab_size: int) -> list[tuple[np.ndarray, SamplingParams]]:
    """The lengths of nano-vllm's bench.py: random.seed(0), prompts first."""
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    answers = [random.randint(100, 1024) for _ in range(256)]
    return [
        (np.array(prompt) % vocab_size, SamplingParams(max_tokens=answer, temperature=0.6, ignore_eos=True))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GEOMETRIES, default="llama-3.2-1b")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32, 256])
    parser.add_argument("--mix", action="store_true", help="nano-vllm's mix of lengths too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="requests of each stream, one after the other")
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="KEY=VALUE", help="any tunable of the engine"
    )
    args = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    vocab_size = GEOMETRIES[args.model]["vocab_size"]
    options: dict[str, Any] = {
        "load_format": "dummy",
        "prefix_cache": False,
        "max_model_len": 4096,
        "max_batched_tokens": 16384,
        "speculation": "off",  # random weights repeat themselves
    }
    options |= dict(option.split("=", 1) for option in args.options)
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig.parse({"model": str(write_geometry(args.model, Path(folder) / "model")), **options})
        engine = load_engine(config, Path(folder))[0]
    load = Load(engine)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    common = {"bench": "engine", "model": args.model, "device": device}
    for batch in args.batches:
        load.run(steady(batch, vocab_size, 0))
        many = batch * args.rounds
        runs = [load.run(steady(many, vocab_size, repeat + 1), batch) for repeat in range(args.repeats)]
        rates = sorted(run["tokens"] / run["seconds"] for run in runs)
        figures = {
            "tokens_per_second": round(statistics.median(rates), 1),
            "lowest": round(rates[0], 1),
            "highest": round(rates[-1], 1),
            "ms_per_step": round(statistics.median(1000 * run["seconds"] / run["steps"] for run in runs), 3),
            "first_token_ms": round(statistics.median(1000 * run["first"] for run in runs), 2),
        }
        print_row({**common, "kind": "128 in, 256 out", "batch": batch, "rounds": args.rounds, **figures})
    if args.mix:
        load.run(steady(256, vocab_size, 0))
        run = load.run(mix(vocab_size))
        print(
            json.dumps(
                {
                    **common,
                    "kind": "mix",
                    "tokens": run["tokens"],
                    "tokens_per_second": round(run["tokens"] / run["seconds"], 1),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
