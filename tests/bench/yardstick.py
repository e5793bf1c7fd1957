"""What this machine does at the moment in which a figure is taken: printed beside it, so that two figures can be
compared though their machines, or what else ran on them, cannot.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

import torch

_LOOPS = 200_000
_COPIED_BYTES = 2**28  # several times the L2 cache; little beside a pool
_SIZE = 8192  # of the matrices


def python_loops() -> float:
    """Million turns a second of an empty loop that adds: the best of five."""
    best = 0.0
    for _ in range(5):
        started, total = time.perf_counter(), 0
        for number in range(_LOOPS):
            total += number
        best = max(best, _LOOPS / (time.perf_counter() - started) / 1e6)
    return best


def copied_tb() -> float:
    """TB/s, read and written, of a copy of 256 MiB in the GPU's memory: the best of five."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / _fastest_seconds(lambda: target.copy_(source)) / 1e12


def multiplied_tflop() -> float:
    """TFLOP/s of a bfloat16 product of 8192³: the best of five."""
    a, b = torch.randn(2, _SIZE, _SIZE, device="cuda", dtype=torch.bfloat16)
    return 2 * _SIZE**3 / _fastest_seconds(lambda: torch.mm(a, b)) / 1e12


def yardstick() -> dict[str, float]:
    """As fields of a benchmark's row: the host's, and the GPU's if there is one."""
    found = {"python_mloops_s": round(python_loops(), 2)}
    if torch.cuda.is_available():
        found |= {"copy_tb_s": round(copied_tb(), 3), "matmul_tflop_s": round(multiplied_tflop(), 1)}
    return found


def print_row(row: Mapping[str, object]) -> None:
    """A benchmark's line of JSON, with the yardstick of this moment."""
    print(json.dumps({**row, "yardstick": yardstick()}), flush=True)


def _fastest_seconds(launch: Callable[[], object]) -> float:
    launch()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        launch()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return min(times)
