"""A runner's start on one device: seconds of each phase, and memory as it was predicted and as it came. Prints JSON
lines.

    python -m tests.bench.bench_start --models llama-3.2-1b qwen3-0.6b
    python -m tests.bench.bench_start --models llama-3.2-1b --set pool_memory_fraction=1 --set cuda_graphs=false

predicted_left_bytes: free after the weights, less pool, largest step and captured steps. left_bytes: free after the
warm-up and the captures that a server makes later, and then after the largest steps, run beside everything; what torch
keeps for the next step does not count as free. A prediction is right if as much is left as it says, or a little more:
what is more was kept for nothing. Weights are random; every model is started in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from paged_backend.config import EngineConfig
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.runner.builder import RunnerBuilder
from paged_backend.runner.kv_store import free_bytes
from paged_backend.runner.measured_memory import run_largest
from tests.bench.geometries import GEOMETRIES, write_geometry


def start(model: str, options: dict[str, Any], captures_later: bool) -> dict[str, object]:
    """Starts one runner, runs its largest steps, and says what that took."""
    told: list[str] = []

    def tell(sentence: str) -> None:
        told.append(sentence)
        logging.info("%s", sentence)

    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig.parse(
            {"model": str(write_geometry(model, Path(folder) / "model")), "load_format": "dummy", **options}
        )
        started = time.monotonic()
        builder = RunnerBuilder(config, tell, open_checkpoint(config), captures_later=captures_later)
        before = free_bytes(builder.device)
        runner = builder.build()
        seconds = time.monotonic() - started
    on_gpu = builder.device.type == "cuda"
    if runner.later is not None:
        while runner.later.advance(busy=False):
            pass
    all_seconds = time.monotonic() - started
    after_warm_up = _left(builder.device)
    if on_gpu:
        run_largest(runner, config.max_batched_tokens)
    size, needs = builder.size, builder.needs
    assert size is not None
    return {
        "bench": "start",
        "model": model,
        "device": torch.cuda.get_device_name(builder.device) if on_gpu else "CPU",
        "options": options,
        "free_before_bytes": before,
        "free_after_weights_bytes": size.free_bytes,
        "step_bytes": needs.step,
        "graph_bytes": needs.graphs,
        "pool_bytes": size.num_pages * size.page_bytes,
        "max_model_len": size.max_model_len,
        "predicted_left_bytes": size.free_bytes - needs.step - needs.graphs - size.num_pages * size.page_bytes,
        "left_bytes": after_warm_up,
        "left_after_largest_steps_bytes": _left(builder.device),
        "captured": next((sentence for sentence in told if "shapes of steps captured, up to" in sentence), None),
        "later": next((sentence for sentence in told if "all shapes of steps captured" in sentence), None),
        "seconds": round(seconds, 2),
        "seconds_until_all_is_captured": round(all_seconds, 2),
        "phase_seconds": {name: round(value, 2) for name, value in builder.seconds.items()},
    }


def _left(device: torch.device) -> int:
    """Free memory, without what torch could give back."""
    if device.type != "cuda":
        return free_bytes(device)
    torch.cuda.synchronize(device)
    return int(torch.cuda.mem_get_info(device)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=GEOMETRIES, default=["llama-3.2-1b"])
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="KEY=VALUE", help="any tunable of the engine"
    )
    parser.add_argument("--capture-all", action="store_true", help="at the start, as several ranks do")
    args = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    options = dict(option.split("=", 1) for option in args.options)
    for model in args.models:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            print(json.dumps(process.apply(start, (model, options, not args.capture_all))), flush=True)


if __name__ == "__main__":
    main()
