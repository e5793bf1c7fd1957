"""One decode step of the engine: milliseconds against the floor of its bytes and operations, and where the time goes.
Prints JSON lines, profiles to stderr.

    python -m tests.bench.bench_step --model llama-3.1-8b --batches 1 8 32 128 256 --context 256 [--profile]

Random weights at true geometries; every sequence has `--context` tokens when the clock starts. ms: median wall time of
a step through scheduler, runner and results (the engine's own loop). floor_ms: weights, as they are stored, and K and V
read at the bandwidth measured in this run, or the products at the rate of a large one measured in this run, whichever
is more (step_floor.py).
--profile lists the kernels of a step, and how long the GPU had nothing to run between the first and the last of the
steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Submit
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.request import SamplingParams
from tests.bench.bench_decode_attention import read_bandwidth, replay_us
from tests.bench.geometries import GEOMETRIES, write_geometry
from tests.bench.step_floor import step_floor

_STEPS = 60
_OPTIONS = {
    "load_format": "dummy",
    "prefix_cache": False,
    "max_model_len": 4096,
    "max_batched_tokens": 16384,
    "speculation": "off",  # random weights repeat themselves
}
_PROFILED = 12


def matmul_rate() -> float:
    """Operations a second of a large bfloat16 product."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / (replay_us(lambda _: torch.mm(a, b), 4, 5) * 1e-6)


class Steps:
    """An engine with `batch` sequences that do nothing but decode."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self._engine, self._vocab_size, self._serial = engine, vocab_size, 0

    def start(self, batch: int, context: int, sampling: SamplingParams) -> None:
        generator = np.random.default_rng(batch)
        for _ in range(batch):
            self._serial += 1
            prompt = generator.integers(0, self._vocab_size, context).astype(np.int32)
            self._engine.submit(Submit(self._serial, prompt.tobytes(), sampling, (), "", time.monotonic()))
        waiting = set(range(self._serial - batch + 1, self._serial + 1))
        while waiting:  # until each has its first token
            for output in self._engine.step():
                waiting -= set(output.request_ids.tolist())

    def run(self, count: int) -> list[float]:
        times = []
        for _ in range(count):
            started = time.perf_counter()
            self._engine.step()
            times.append(time.perf_counter() - started)
        return times

    def stop(self, batch: int) -> None:
        for request_id in range(self._serial - batch + 1, self._serial + 1):
            self._engine.abort(request_id)
        while not self._engine.idle:
            self._engine.step()


def kernel_table(steps: Steps) -> tuple[list[dict[str, Any]], float]:
    """Kernels of a step with their mean microseconds, the longest first; and the share of the time in which no kernel
    ran.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        steps.run(_PROFILED)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    spans = spans[len(spans) // 4 :]  # the profiler's own start
    steps_seen = _PROFILED * 0.75
    busy, reach = 0.0, spans[0][0]
    for start, end, _ in spans:
        busy += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    totals: dict[str, list[float]] = {}
    for start, end, name in spans:
        totals.setdefault(name, []).append(end - start)
    rows = [
        {
            "kernel": name[:90],
            "per_step": round(len(t) / steps_seen, 1),
            "us_each": round(sum(t) / len(t), 2),
            "us": round(sum(t) / steps_seen, 1),
        }
        for name, t in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["us"]), 1 - busy / (reach - spans[0][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GEOMETRIES, default="llama-3.2-1b")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32, 128, 256])
    parser.add_argument("--context", type=int, default=256, help="tokens of each sequence")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="KEY=VALUE", help="any tunable of the engine"
    )
    args = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    bandwidth, rate = read_bandwidth(), matmul_rate()
    options: dict[str, Any] = dict(_OPTIONS) | dict(option.split("=", 1) for option in args.options)
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig.parse({"model": str(write_geometry(args.model, Path(folder) / "model")), **options})
        architecture, kv_bytes = open_checkpoint(config).architecture, 1 if config.kv_dtype.startswith("fp8") else 2
        engine = load_engine(config, Path(folder))[0]
    steps = Steps(engine, GEOMETRIES[args.model]["vocab_size"])
    sampling = SamplingParams(max_tokens=2000, temperature=args.temperature, top_p=args.top_p, ignore_eos=True)
    first: tuple[float, float] | None = None
    for batch in args.batches:
        steps.start(batch, args.context, sampling)
        steps.run(10)
        ms = 1000 * statistics.median(steps.run(_STEPS))
        floor = 1000 * step_floor(
            architecture, batch, args.context + 40, bandwidth=bandwidth, rate=rate, kv_bytes=kv_bytes
        )
        first = first or (ms, floor)
        row = {
            "bench": "step",
            "model": args.model,
            "batch": batch,
            "context": args.context,
            "temperature": args.temperature,
            "ms": round(ms, 3),
        }
        row |= {
            "floor_ms": round(floor, 3),
            "share": round(floor / ms, 3),
            "growth_over_floor": round(ms / first[0] / (floor / first[1]), 3),
        }
        row |= {
            "read_tb_s": round(bandwidth / 1e12, 3),
            "matmul_tflop_s": round(rate / 1e12),
            "device": torch.cuda.get_device_name(),
        }
        if args.profile:
            table, idle = kernel_table(steps)
            row["gpu_idle"] = round(idle, 4)
            for kernel in table[:24]:
                print("  {us:9.1f} us = {per_step:6.1f} x {us_each:8.2f}  {kernel}".format(**kernel), file=sys.stderr)
        print(json.dumps(row), flush=True)
        steps.stop(batch)


if __name__ == "__main__":
    main()
