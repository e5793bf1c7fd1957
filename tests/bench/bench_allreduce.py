"""Microseconds of the sum over ranks plus the residual: our one kernel over peer memory; and with an addition, NCCL and
torch's one shot over symmetric memory. In CUDA graphs of many sums.

    python -m tests.bench.bench_allreduce --ranks 2 --hidden 8192 --rows 1 8 64

Needs as many GPUs as ranks. Before anything is timed, each result is compared with float64's; `--check` does only that.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from paged_backend.runner.parallel.process_ranks import ProcessRanks

Sum = Callable[[Tensor, Tensor], Tensor]
_SUMS = 50  # of a graph
_REPLAYS = 20


def part_of(rank: int, rows: int, hidden: int) -> Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(rank)).bfloat16()


def run_rank(rank: int, options: argparse.Namespace) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    ranks = ProcessRanks(rank, options.ranks, Path(options.folder), device)
    sentence = ranks.share_memory(max(options.rows) * options.hidden, torch.bfloat16, device)
    ways: dict[str, Callable[[], Sum]] = {
        "one kernel": lambda: ranks.add_sum,
        "NCCL": lambda: by_nccl,
        "torch": lambda: OneShot(max(options.rows) * options.hidden, device),
    }
    if rank == 0:
        print(f"{options.ranks} x {torch.cuda.get_device_name()}; {sentence}", flush=True)
    for name, make in ways.items():
        way = make()
        for rows in options.rows:
            check(way, rank, rows, options)
            if not options.check:
                microseconds = timed(way, part_of(rank, rows, options.hidden).to(device))
                if rank == 0:
                    print(f"{rows:4} x {options.hidden}  {name:10}  {microseconds:6.1f} us", flush=True)


def by_nccl(x: Tensor, residual: Tensor) -> Tensor:
    torch.distributed.all_reduce(x)
    return residual.add_(x)


class OneShot:
    """torch's own: x is copied to symmetric memory first, as it would have to be."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        group = torch.distributed.group.WORLD
        assert group is not None
        self._name = group.group_name
        self._memory = symmetric_memory.empty(capacity, dtype=torch.bfloat16, device=device)
        self._met = symmetric_memory.rendezvous(self._memory, group)

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        mine = self._memory[: x.numel()]
        mine.copy_(x.view(-1))
        return residual.add_(torch.ops.symm_mem.one_shot_all_reduce(mine, "sum", self._name).view_as(x))


def check(way: Sum, rank: int, rows: int, options: argparse.Namespace) -> None:
    """A few times over, for what a call leaves behind; bfloat16 rounds the sum of a library's partial sums several
    times.
    """
    residual = part_of(99, rows, options.hidden)
    expected = sum((part_of(other, rows, options.hidden).double() for other in range(options.ranks)), residual.double())
    for _ in range(5):
        found = way(part_of(rank, rows, options.hidden).cuda(), residual.cuda()).cpu().double()
        error = float((found - expected).norm() / expected.norm())
        assert error < 4e-3 * options.ranks, f"relative RMS error {error:.2e}"


def timed(way: Sum, x: Tensor) -> float:
    """Of one sum, in microseconds."""
    x.zero_()  # it is written over, again and again
    residual = torch.zeros_like(x)
    way(x, residual)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_SUMS):
            way(x, residual)
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(_REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000 / _SUMS / _REPLAYS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        run_rank(options.rank, options)
        sys.stdout.flush()
        os._exit(0)  # the libraries would take their time to part
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.bench.bench_allreduce", *sys.argv[1:], "--folder", folder]
        processes = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(options.ranks)]
        return max(abs(process.wait()) for process in processes)


if __name__ == "__main__":
    sys.exit(main())
