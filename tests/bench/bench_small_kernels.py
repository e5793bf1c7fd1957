"""The small kernels of a decode step on one GPU: microseconds and share of the bandwidth measured in the same run.
Prints JSON lines, and a table to stderr.

    python -m tests.bench.bench_small_kernels [--only sample,norm] [--batches 1,32,256]

us: one launch of a CUDA graph of launches, median; us_pdl: the same with programmatic dependent launch; torch_us: the
op of reference.py on the GPU.
floor_us: the bytes that must be read and written over the measured bandwidth (of reading for what only reads, of
copying for the others). Inputs are as hot in the L2 cache as a step leaves them, so small cases can be faster than the
floor; what bounds them is a launch: `empty` is a kernel that does nothing. Layers are Llama-3.2-1B's (hidden 2048) and
Llama-3.1-8B's (hidden 4096) in bfloat16; logits are float32 over 128,256 tokens, *flat* normal with deviation 1,
*peaked* deviation 2 and 50 tokens 10 higher.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton

from paged_kernels.activation import gate
from paged_kernels.logit_edits import apply_penalties
from paged_kernels.norm import norm
from paged_kernels.norm_value import Norm
from paged_kernels.page_copy import copy_pages, make_page_layers
from paged_kernels.reference import reference
from paged_kernels.rope_kv import rope_write_kv
from paged_kernels.row_update import gather_step, update_page_tables, write_tokens
from paged_kernels.sampling import argmax, logprobs, make_sampling_workspace, sample
from paged_kernels.top_logprobs import top_logprobs
from paged_kernels.truncation import truncation_thresholds
from tests.bench.bench_decode_attention import read_bandwidth, replay_us

VOCAB = 128256
PAGE_SIZE = 16
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    moved_bytes: int
    launch: Callable[[bool], object]  # with or without programmatic dependent launch
    twin: Callable[[], object] | None = None
    reads_only: bool = False


@triton.jit
def _empty_kernel():
    pass


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device-to-device copy of 1 GiB."""
    source = torch.randint(-(2**31), 2**31 - 1, (2**28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (replay_us(lambda _: target.copy_(source), 4, 9) * 1e-6)


def randn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def layer_cases(batch: int, hidden: int, head_dim: int, intermediate: int) -> Iterator[Case]:
    x, weight, out = randn(batch, hidden), randn(hidden), randn(batch, hidden)
    row = 2 * batch * hidden
    yield Case(
        f"rms_norm {hidden}",
        batch,
        2 * row,
        lambda pdl: norm(x, Norm(weight, 1e-5), out=out, launch_pdl=pdl),
        lambda: reference.norm(x, Norm(weight, 1e-5)),
    )
    gate_up, gated = randn(batch, 2 * intermediate), randn(batch, intermediate)
    yield Case(
        f"silu_mul {intermediate}",
        batch,
        3 * gated.nbytes,
        lambda pdl: gate(gate_up, out=gated, launch_pdl=pdl),
        lambda: reference.gate(gate_up),
    )
    num_heads, num_kv_heads = 32, 8
    qkv, q = randn(batch, (num_heads + 2 * num_kv_heads) * head_dim), randn(batch, num_heads, head_dim)
    kv_pages, table = randn(4 * batch, 2, num_kv_heads, PAGE_SIZE, head_dim), randn(4096, head_dim, dtype=torch.float32)
    positions = torch.randint(0, 4096, (batch,), device="cuda")
    slots = torch.randperm(4 * batch * PAGE_SIZE, device="cuda")[:batch]
    norms = (Norm(randn(head_dim), 1e-6), Norm(randn(head_dim), 1e-6))
    for label, qk_norm in (("", None), (" with norm", norms)):
        yield Case(
            f"rope_write_kv 32/8x{head_dim}{label}", batch, 2 * qkv.nbytes,
            lambda pdl, qk_norm=qk_norm: rope_write_kv(
                qkv, num_heads, qk_norm, table, positions, kv_pages, slots, out=q, launch_pdl=pdl
            ),
        )  # fmt: skip


def row_cases(batch: int) -> Iterator[Case]:
    def ints(*shape: int, high: int = 1) -> torch.Tensor:
        return torch.randint(0, high, shape, dtype=torch.int32, device="cuda")

    layers = make_page_layers([randn(64, 2, 8, PAGE_SIZE, 128) for _ in range(32)])
    copies = torch.stack((torch.arange(min(batch, 32)), torch.arange(min(batch, 32)) + 32), dim=1).int().cuda()
    yield Case(
        f"copy_pages 32 layers of {layers.page_bytes} B",
        len(copies),
        2 * 32 * layers.page_bytes * len(copies),
        lambda pdl: copy_pages(layers, copies, launch_pdl=pdl),
    )
    history, page_tables = ints(batch, 8192, high=VOCAB), ints(batch, 512, high=9999)
    rows = torch.arange(batch, dtype=torch.int32, device="cuda")
    starts, counts = ints(batch, high=2048) + 1, torch.ones_like(rows)
    outputs = {name: torch.empty_like(rows) for name in ("input_ids", "positions", "slot_mapping", "seq_lens")}
    table, tokens, updates = (
        torch.empty_like(page_tables),
        ints(batch, high=VOCAB),
        torch.stack((rows, rows, rows), dim=1),
    )
    yield Case(
        "gather_step, lengths to 2k", batch, 4 * 2 * batch * 64,
        lambda pdl: gather_step(
            rows, starts, counts, rows, history, page_tables, PAGE_SIZE, **outputs, page_table=table, launch_pdl=pdl
        ),
    )  # fmt: skip
    yield Case(
        "update_page_tables", batch, 16 * batch, lambda pdl: update_page_tables(page_tables, updates, launch_pdl=pdl)
    )
    yield Case(
        "write_tokens", batch, 16 * batch, lambda pdl: write_tokens(history, rows, starts, tokens, launch_pdl=pdl)
    )


class Sampling:
    """A batch of logits, and how a token of each row is drawn."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.workspace = make_sampling_workspace(256, VOCAB, torch.device("cuda"))
        self.flat, self.peaked = randn(batch, VOCAB, dtype=torch.float32), 2 * randn(batch, VOCAB, dtype=torch.float32)
        self.peaked.scatter_add_(
            1, torch.randint(0, VOCAB, (batch, 50), device="cuda"), torch.full((batch, 50), 10.0, device="cuda")
        )
        self.tokens = torch.empty(batch, dtype=torch.int64, device="cuda")
        self.values = torch.empty(batch, device="cuda")
        self.temperature = torch.full_like(self.values, 0.8)
        self.seeds, self.positions = torch.arange(batch, device="cuda"), torch.arange(batch, device="cuda")

    def case(self, name: str, launch: Callable[[bool], object], twin: Callable[[], object] | None = None) -> Case:
        """It reads all logits once."""
        return Case(name, self.batch, self.peaked.nbytes, launch, twin, reads_only=True)


def sampling_cases(batch: int) -> Iterator[Case]:
    of = Sampling(batch)
    yield from choice_cases(of)
    yield from threshold_cases(of)
    yield penalty_case(of)


def choice_cases(of: Sampling) -> Iterator[Case]:
    peaked, workspace, tokens, values = of.peaked, of.workspace, of.tokens, of.values
    half, temperature, drawn = peaked.to(BF16), of.temperature, (of.temperature, of.seeds, of.positions)
    yield of.case(
        "argmax",
        lambda pdl: argmax(peaked, workspace=workspace, out=tokens, launch_pdl=pdl),
        lambda: reference.argmax(peaked),
    )
    yield Case(
        "argmax of bfloat16",
        of.batch,
        half.nbytes,
        lambda pdl: argmax(half, workspace=workspace, out=tokens, launch_pdl=pdl),
        lambda: reference.argmax(half),
        True,
    )
    yield of.case(
        "logprobs",
        lambda pdl: logprobs(peaked, tokens, workspace=workspace, out=values, launch_pdl=pdl),
        lambda: reference.logprobs(peaked, tokens),
    )
    yield of.case(
        "sample",
        lambda pdl: sample(peaked, *drawn, workspace=workspace, out=tokens, launch_pdl=pdl),
        lambda: reference.sample(reference.apply_temperature(peaked, temperature), of.seeds, of.positions),
    )
    cut = truncation_thresholds(
        peaked, torch.full_like(tokens, 50), torch.full_like(values, 0.9), torch.zeros_like(values), workspace=workspace
    )
    yield of.case(
        "sample above thresholds",
        lambda pdl: sample(peaked, *drawn, workspace=workspace, thresholds=cut, out=tokens, launch_pdl=pdl),
    )
    for n in (1, 20):
        tops = (torch.empty(of.batch, n, dtype=torch.int64, device="cuda"), torch.empty(of.batch, n, device="cuda"))
        yield of.case(
            f"top_logprobs {n}",
            lambda pdl, n=n, tops=tops: top_logprobs(peaked, n, workspace=workspace, out=tops, launch_pdl=pdl),
            lambda n=n: reference.top_logprobs(peaked, n),
        )


def threshold_cases(of: Sampling) -> Iterator[Case]:
    temperature, thresholds = of.temperature, torch.empty_like(of.values)
    cuts = {
        "top-k 50, top-p 0.9": (50, 0.9, 0.0),
        "top-p 0.9": (0, 0.9, 0.0),
        "min-p 0.05": (0, 1.0, 0.05),
        "no cut": (0, 1.0, 0.0),
        "top-k 6000": (6000, 1.0, 0.0),
    }
    for logits, shape in ((of.peaked, "peaked"), (of.flat, "flat")):
        for label, (k, p, least) in cuts.items():
            cut = torch.full_like(of.tokens, k), torch.full_like(of.values, p), torch.full_like(of.values, least)
            yield of.case(
                f"thresholds, {label}, {shape}",
                lambda pdl, logits=logits, cut=cut: truncation_thresholds(
                    logits, *cut, workspace=of.workspace, temperature=temperature, out=thresholds, launch_pdl=pdl
                ),
                lambda logits=logits, cut=cut, k=k: reference.truncate(
                    reference.apply_temperature(logits, temperature), *cut, k
                ),
            )


def penalty_case(of: Sampling) -> Case:
    history = torch.randint(0, VOCAB, (of.batch, 2048), dtype=torch.int32, device="cuda")
    penalty = torch.full_like(of.values, 1.1)
    given = (
        of.flat,
        history,
        torch.full_like(of.positions, 500),
        torch.full_like(of.positions, 1000),
        *(penalty,) * 3,
    )
    counts = torch.zeros(of.batch, VOCAB, dtype=torch.int32, device="cuda")
    return Case(
        "apply_penalties, 1,000 tokens",
        of.batch,
        of.batch * 1000 * 24,
        lambda pdl: apply_penalties(*given, counts=counts, launch_pdl=pdl),
        lambda: reference.apply_penalties(*given),
    )


def cases(batches: list[int]) -> Iterator[Case]:
    yield Case("empty", 0, 0, lambda pdl: _empty_kernel[(1,)](launch_pdl=pdl))
    for batch in batches:
        yield from layer_cases(batch, 2048, 64, 8192)
        yield from layer_cases(batch, 4096, 128, 14336)
        yield from row_cases(batch)
        yield from sampling_cases(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="beginnings of names, joined by ','")
    parser.add_argument("--batches", default="1,32,256")
    options = parser.parse_args()
    reading, copying = read_bandwidth(), copy_bandwidth()
    print(
        f"reading {reading / 1e12:.2f} TB/s, copying {copying / 1e12:.2f} TB/s, {torch.cuda.get_device_name()}",
        file=sys.stderr,
    )
    for case in cases([int(batch) for batch in options.batches.split(",")]):
        if not case.name.startswith(tuple(options.only.split(","))):
            continue
        plain, pdl = (
            replay_us(lambda _, case=case: case.launch(False), 20),
            replay_us(lambda _, case=case: case.launch(True), 20),
        )
        twin = case.twin and round(replay_us(lambda _, case=case: case.twin(), 2, 5), 1)
        floor = case.moved_bytes / (reading if case.reads_only else copying) * 1e6
        row = {
            "bench": "small_kernels", "case": case.name, "batch": case.batch, "us": round(plain, 2),
            "us_pdl": round(pdl, 2), "torch_us": twin, "floor_us": round(floor, 2),
            "share": round(floor / min(plain, pdl), 3), "read_tb_s": round(reading / 1e12, 3),
            "copy_tb_s": round(copying / 1e12, 3), "device": torch.cuda.get_device_name(),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        print(
            "{case:36} {batch:4} {us:8.2f} us, pdl {us_pdl:8.2f}, torch {torch_us}, floor {floor_us:7.2f}, share "
            "{share:.2f}".format(**row),
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
