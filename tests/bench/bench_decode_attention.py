"""Paged decode attention on one GPU: microseconds and share of the read bandwidth measured in the same run. Prints JSON
lines, and a table to stderr.

    python -m tests.bench.bench_decode_attention [--cases '1x8k;32x2k'] [--shape 64:3:2:4 ...] [--pdl] [--kv fp8]
        [--verify 4]

floor_us: the bytes of K and V over the measured read bandwidth. Each case replays a CUDA graph of launches over several
KV stores, together larger than the L2 cache, with shuffled pages; medians. The plan, shared by a step's layers, is
timed apart (plan_us). error: relative RMS against float64. --shape tile:stages:programs per multiprocessor:warps tries
other launch shapes than the tuned one. --pdl: as within a step, the launches overlap and the plan is older than the
launch before. --kv fp8: K and V of 8 bits (float8_e4m3fn), queries of 16. --verify: each sequence has so many drafts,
which are decodes, too; measured are decodes that each read the keys and values, and those of a sequence together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.decode_attention import (
    DecodePlan,
    make_decode_plan,
    make_decode_workspace,
    packed_queries,
    paged_decode_attention,
    plan_decode_attention,
)


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    target: float | None = None  # share of the bandwidth

    def kv_bytes(self, kv_dtype: torch.dtype) -> int:
        return sum(self.lengths) * self.num_kv_heads * self.head_dim * 2 * kv_dtype.itemsize


def uniform(count: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(0)).tolist())


CASES = {
    "1x8k": Case((8192,), target=0.66),
    "1x64k": Case((65536,), target=0.84),
    "8x4k": Case((4096,) * 8, target=0.78),
    "32x2k": Case((2048,) * 32, target=0.90),
    "128x1k": Case((1024,) * 128),
    "256x1k": Case((1024,) * 256, target=0.93),
    "64xU(16,8192)": Case(uniform(64, 16, 8192), target=0.92),
    "256xU(16,2048)": Case(uniform(256, 16, 2048)),
    "64x2k D64": Case((2048,) * 64, head_dim=64, target=0.90),
    "256xU(128,384)": Case(uniform(256, 128, 384)),
    "32xU(128,384)": Case(uniform(32, 128, 384)),
    "256xU(128,384) D64": Case(uniform(256, 128, 384), head_dim=64),
    "32x2k 32/32": Case((2048,) * 32, num_kv_heads=32),
    "32x8k 32/2": Case((8192,) * 32, num_kv_heads=2),
    "32x4k 28/4": Case((4096,) * 32, num_q_heads=28, num_kv_heads=4, target=0.90),
    "1x512": Case((512,)),
}
PAGE_SIZE = 16
KV_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
ROTATED_BYTES = 300 * 2**20


@triton.jit
def _read_kernel(source, sums, PER_PROGRAM: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    start = tl.program_id(0).to(tl.int64) * PER_PROGRAM
    acc = tl.zeros([BLOCK], tl.int32)
    for i in range(0, PER_PROGRAM, BLOCK):
        acc ^= tl.load(source + start + i + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(sums + tl.program_id(0), tl.sum(acc))


def replay_us(launch: Callable[[int], None], count: int, replays: int = 15) -> float:
    """Median microseconds of one of `count` launches captured in a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            launch(i)
    times = []
    for _ in range(replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(500_000)  # the device is busy until everything is queued: the host's time stays out
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / count)
    return statistics.median(times[2:])


def read_bandwidth() -> float:
    """Bytes a second of the fastest of a few ways to read 2 GiB once."""
    source = torch.randint(-(2**31), 2**31 - 1, (2**29,), dtype=torch.int32, device="cuda")
    best = 0.0
    for block, per_program in ((4096, 4096), (4096, 16384), (8192, 8192), (8192, 32768)):
        programs = source.numel() // per_program
        sums = torch.empty(programs, dtype=torch.int32, device="cuda")

        def launch(
            _: int,
            programs: int = programs,
            sums: torch.Tensor = sums,
            block: int = block,
            per_program: int = per_program,
        ) -> None:
            _read_kernel[(programs,)](source, sums, PER_PROGRAM=per_program, BLOCK=block, num_warps=8)

        best = max(best, source.numel() * 4 / (replay_us(launch, 4, 9) * 1e-6))
    return best


@dataclass(frozen=True)
class Stores:
    """One case's tensors; `kv_pages` and `page_tables` are several stores to go round."""

    q: torch.Tensor
    kv_pages: list[torch.Tensor]
    page_tables: list[torch.Tensor]
    seq_lens: torch.Tensor
    rows: torch.Tensor  # whose each decode is


def make_stores(case: Case, kv_dtype: torch.dtype, num_drafts: int) -> Stores:
    """Each sequence's decodes one after another, the last of which sees all its tokens."""
    decodes = 1 + num_drafts
    pages = [-(-n // PAGE_SIZE) for n in case.lengths]
    rounds = max(2, -(-ROTATED_BYTES // case.kv_bytes(kv_dtype)))
    kv_pages, page_tables = [], []
    for _ in range(rounds):
        kv_pages.append(
            torch.randn(
                sum(pages), 2, case.num_kv_heads, PAGE_SIZE, case.head_dim, device="cuda", dtype=torch.bfloat16
            ).to(kv_dtype)
        )
        shuffled = torch.randperm(sum(pages), dtype=torch.int32).split(pages)
        page_table = torch.nn.utils.rnn.pad_sequence(list(shuffled), batch_first=True, padding_value=-1)
        page_tables.append(page_table.repeat_interleave(decodes, dim=0).cuda())
    q = torch.randn(len(case.lengths) * decodes, case.num_q_heads, case.head_dim, device="cuda", dtype=torch.bfloat16)
    behind = torch.arange(num_drafts, -1, -1, dtype=torch.int32)
    lengths = (torch.tensor(case.lengths, dtype=torch.int32)[:, None] - behind).flatten()
    rows = torch.arange(len(case.lengths), dtype=torch.int32).repeat_interleave(decodes)
    return Stores(q, kv_pages, page_tables, lengths.cuda(), rows.cuda())


def float64_attention(case: Case, stores: Stores) -> torch.Tensor:
    out = torch.empty(stores.q.shape, dtype=torch.float64, device="cuda")
    store = stores.kv_pages[0].bfloat16()
    for row, length in enumerate(stores.seq_lens.tolist()):
        page = stores.page_tables[0][row, : -(-length // PAGE_SIZE)].long()
        # [heads, tokens, dim]
        keys, values = store[page].transpose(0, 1).transpose(1, 2).flatten(2, 3)[:, :, :length].double()
        queries = stores.q[row].double().view(case.num_kv_heads, -1, case.head_dim)
        scores = queries @ keys.transpose(1, 2) * case.head_dim**-0.5
        out[row] = (scores.softmax(-1) @ values).flatten(0, 1)
    return out


def make_plan(case: Case, shape: str | None, stores: Stores, queries: int) -> DecodePlan:
    tile, stages, programs, warps = (int(n) for n in shape.split(":")) if shape else (None,) * 4
    workspace = make_decode_workspace(
        case.num_q_heads, case.num_kv_heads, case.head_dim, stores.kv_pages[0].dtype, torch.device("cuda"),
        queries=queries, tile=tile, num_stages=stages, num_warps=warps,
        programs_per_multiprocessor=programs or (2 if len(stores.q) == 1 else None),  # as CudaOps has it
    )  # fmt: skip
    return make_decode_plan(workspace, len(stores.q))


def measure(
    name: str, shape: str | None, stores: Stores, expected: torch.Tensor, bandwidth: float, pdl: bool, queries: int
) -> dict[str, object]:
    """queries: decodes of a sequence that are attended to together."""
    kv_dtype = stores.kv_pages[0].dtype
    case, plan = CASES[name], make_plan(CASES[name], shape, stores, queries)
    rows = stores.rows if queries > 1 else None
    out = torch.full_like(stores.q, float("nan"))

    def launch(i: int) -> None:
        which = i % len(stores.kv_pages)
        paged_decode_attention(
            stores.q,
            stores.kv_pages[which],
            stores.page_tables[which],
            out,
            plan,
            scale=case.head_dim**-0.5,
            launch_pdl=pdl,
            plan_settled=pdl,
        )

    plan_decode_attention(stores.seq_lens, plan, rows)
    launch(0)
    error = ((out.double() - expected).norm() / expected.norm()).item()
    rounds = len(stores.kv_pages)
    us = replay_us(launch, rounds * -(-20 // rounds))
    floor_us = case.kv_bytes(kv_dtype) / bandwidth * 1e6
    return {
        "bench": "decode_attention", "case": name, "shape": shape or "tuned", "pdl": pdl,
        "kv_dtype": str(kv_dtype).removeprefix("torch."), "drafts": len(stores.q) // len(case.lengths) - 1,
        "queries": queries, "us": round(us, 2), "floor_us": round(floor_us, 2),
        "share": round(floor_us / us, 3), "target": case.target, "error": round(error, 5),
        "plan_us": round(replay_us(lambda _: plan_decode_attention(stores.seq_lens, plan, rows), 20), 2),
        "read_tb_s": round(bandwidth / 1e12, 3), "device": torch.cuda.get_device_name(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=";".join(CASES), help="names joined by ';'")
    parser.add_argument(
        "--shape", action="append", help="tile:stages:programs per multiprocessor:warps; may be repeated"
    )
    parser.add_argument("--pdl", action="store_true")
    parser.add_argument("--kv", choices=KV_DTYPES, default="bf16", help="type of K and V")
    parser.add_argument("--verify", type=int, default=0, metavar="K", help="drafts of each sequence, at most 15")
    options = parser.parse_args()
    bandwidth = read_bandwidth()
    for name in options.cases.split(";"):
        case = CASES[name]
        stores = make_stores(case, KV_DTYPES[options.kv], options.verify)
        expected = float64_attention(case, stores)
        packed = packed_queries(case.num_q_heads // case.num_kv_heads, case.head_dim, options.verify)
        for shape, queries in itertools.product(options.shape or [None], dict.fromkeys((1, packed))):
            row = measure(name, shape, stores, expected, bandwidth, options.pdl, queries)
            print(json.dumps(row), flush=True)
            print(
                "{case:20} {shape:14} {drafts:2} drafts, {queries:2} queries a run {us:8.1f} us  floor {floor_us:7.1f}"
                "  {share:.3f} (target {target})  error {error:.5f}".format(**row),
                file=sys.stderr,
            )
        del stores, expected
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
