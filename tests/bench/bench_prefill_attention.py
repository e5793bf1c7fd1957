"""Paged prefill attention on one GPU beside torch's contiguous attention in the same run. Prints JSON lines, and a
table to stderr.

    python -m tests.bench.bench_prefill_attention [--cases '1x8k;512 over 8k'] [--shape 128:128:8:3 ...]

floor_us: 4 * head_dim operations per query head and visible key over the rate of a bf16 matrix product of 8192³
measured in the same run. peers_us: torch's scaled_dot_product_attention, keys and values contiguous, with its flash and
cuDNN backends; of_best: the faster of them over ours. Medians of single launches with the L2 cache emptied before each.
error: relative RMS against float32. --shape rows:tile:warps:stages[:registers] tries other launches than the tuned one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from paged_kernels.prefill_attention import PrefillShape, paged_prefill_attention


@dataclass(frozen=True)
class Case:
    lens: tuple[tuple[int, int], ...]  # (query_len, seq_len)
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def operations(self) -> float:
        return (
            4.0 * self.num_q_heads * self.head_dim * sum(n * (n + 1) / 2 + n * (length - n) for n, length in self.lens)
        )


CASES = {
    "1x8k": Case(((8192, 8192),)),
    "512 over 8k": Case(((512, 8704),)),
    "2048 over 8k": Case(((2048, 10240),)),
    "12k beside 200 tails": Case(((12288, 12288), *((8, 1024),) * 200)),
    "16x512": Case(((512, 512),) * 16),
    "1x2k": Case(((2048, 2048),)),
    "1x8k pages of 128": Case(((8192, 8192),), page_size=128),
    "1x8k D64": Case(((8192, 8192),), head_dim=64),
    "1x8k 28/4": Case(((8192, 8192),), num_q_heads=28, num_kv_heads=4),
    "1x4k D256 16/8": Case(((4096, 4096),), num_q_heads=16, head_dim=256),
}
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


KV_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Tensors:
    q: torch.Tensor
    kv_pages: torch.Tensor
    page_table: torch.Tensor
    query_starts: torch.Tensor
    seq_lens: torch.Tensor


def make(case: Case, kv_dtype: torch.dtype) -> Tensors:
    pages = [-(-length // case.page_size) for _, length in case.lens]
    kv_pages = torch.randn(
        sum(pages), 2, case.num_kv_heads, case.page_size, case.head_dim, device="cuda", dtype=torch.bfloat16
    ).to(kv_dtype)
    shuffled = torch.randperm(sum(pages), dtype=torch.int32).split(pages)
    page_table = torch.nn.utils.rnn.pad_sequence(list(shuffled), batch_first=True, padding_value=-1).cuda()
    starts = torch.tensor([0, *(n for n, _ in case.lens)]).cumsum(0)
    q = torch.randn(int(starts[-1]), case.num_q_heads, case.head_dim, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([length for _, length in case.lens], dtype=torch.int32, device="cuda")
    return Tensors(q, kv_pages, page_table, starts.int().cuda(), lengths)


def contiguous(case: Case, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of sequences of equal lengths: [sequences, heads, tokens, head_dim], rows of a token together in
    memory as a model leaves them.
    """
    query_len, length = case.lens[0]
    gathered = (
        tensors.kv_pages.bfloat16()[tensors.page_table.long()]
        .permute(2, 0, 1, 4, 3, 5)
        .flatten(2, 3)[:, :, :length]
        .contiguous()
    )  # side, seq, token, head, dim
    q = tensors.q.view(len(case.lens), query_len, case.num_q_heads, case.head_dim)
    return q.transpose(1, 2), gathered[0].transpose(1, 2), gathered[1].transpose(1, 2)


def float32_attention(case: Case, tensors: Tensors) -> torch.Tensor:
    """Sequence by sequence, of any lengths."""
    out, group = torch.empty_like(tensors.q, dtype=torch.float32), case.num_q_heads // case.num_kv_heads
    starts = tensors.query_starts.tolist()
    for index, (query_len, length) in enumerate(case.lens):
        pages = tensors.page_table[index, : -(-length // case.page_size)].long()
        keys, values = tensors.kv_pages[pages].float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        visible = torch.ones(query_len, length, dtype=torch.bool, device="cuda").tril(length - query_len)
        for head in range(case.num_q_heads):
            q = tensors.q[starts[index] : starts[index + 1], head].float()
            scores = (q @ keys[head // group].T * case.head_dim**-0.5).masked_fill_(~visible, float("-inf"))
            out[starts[index] : starts[index + 1], head] = scores.softmax(-1) @ values[head // group]
    return out


def microseconds(launch: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(launch, warmup=5, rep=40, return_mode="median")) * 1000


def peer_us(case: Case, tensors: Tensors, backend: SDPBackend) -> float | None:
    """None where the backend does not take the case, as none takes sequences of several lengths."""
    if len(set(case.lens)) > 1:
        return None
    q, k, v = contiguous(case, tensors)
    square = case.lens[0][0] == case.lens[0][1]
    mask = None if square else causal_lower_right(q.shape[2], k.shape[2])
    try:
        with sdpa_kernel(backend):
            return microseconds(
                lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, enable_gqa=True)
            )
    except RuntimeError:
        return None


def matrix_rate() -> float:
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192.0**3 / (microseconds(lambda: a @ b) * 1e-6)


def parse_shape(text: str) -> PrefillShape:
    return PrefillShape(*(int(n) for n in text.split(":")))


def measure(
    name: str, text: str | None, tensors: Tensors, expected: torch.Tensor, peers: dict[str, float | None], rate: float
) -> dict[str, object]:
    case, out = CASES[name], torch.full_like(tensors.q, float("nan"))

    def launch() -> None:
        paged_prefill_attention(
            tensors.q, tensors.kv_pages, tensors.page_table, tensors.query_starts, tensors.seq_lens, out,
            max_query_len=max(n for n, _ in case.lens), scale=case.head_dim**-0.5,
            shape=parse_shape(text) if text else None,
        )  # fmt: skip

    launch()
    error = ((out.float() - expected).norm() / expected.norm()).item()
    us = microseconds(launch)
    best = min((x for x in peers.values() if x is not None), default=None)
    return {
        "bench": "prefill_attention", "case": name, "kv_dtype": str(tensors.kv_pages.dtype).removeprefix("torch."),
        "shape": text or "tuned", "us": round(us, 1), "floor_us": round(case.operations / rate * 1e6, 1),
        "tflops": round(case.operations / us * 1e-6, 1), "peers_us": {k: x and round(x, 1) for k, x in peers.items()},
        "of_best": best and round(best / us, 3), "error": round(error, 5), "matrix_tflops": round(rate * 1e-12, 1),
        "device": torch.cuda.get_device_name(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=";".join(CASES), help="names joined by ';'")
    parser.add_argument("--shape", action="append", help="rows:tile:warps:stages[:registers]; may be repeated")
    parser.add_argument(
        "--kv", choices=KV_DTYPES, default="bf16", help="type of K and V in the store; the peers' are bfloat16"
    )
    options = parser.parse_args()
    rate = matrix_rate()
    for name in options.cases.split(";"):
        tensors = make(CASES[name], KV_DTYPES[options.kv])
        expected = float32_attention(CASES[name], tensors)
        peers = {peer: peer_us(CASES[name], tensors, backend) for peer, backend in PEERS.items()}
        for text in options.shape or [None]:
            try:
                row = measure(name, text, tensors, expected, peers, rate)
            except triton.runtime.errors.OutOfResources as refusal:
                print(f"{name}: {text}: {refusal}", file=sys.stderr)
                continue
            print(json.dumps(row), flush=True)
            print(
                "{case:18} {shape:14} {us:8.1f} us {tflops:6.1f} TFLOP/s  {of_best} of best  error {error:.5f} "
                "{peers_us}".format(**row),
                file=sys.stderr,
            )
        del tensors, expected
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
