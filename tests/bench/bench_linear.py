"""Products of few tokens with a model's weights on one GPU: cuBLAS against small_linear.py. Prints JSON lines, and a
table to stderr.

    python -m tests.bench.bench_linear [--model llama-3.2-1b] [--tokens 1,2,8,16,32,64,128] [--products qkv,out]
    [--sweep]
    python -m tests.bench.bench_linear --formats fp8-channel,fp8-block,int4-g128,nvfp4 [--model llama-3.1-8b]
    [--tokens 1,8,32,64,256,2048]

A case is one product of a decoder layer with its companions: qkv, gate_up and the head with the norm before them, out
and down with the addition of the residual, gate_up with silu(gate) * up. Each is replayed as a CUDA graph of launches
over copies of the weight, together larger than the L2 cache; medians.
cublas_us: torch's product and our kernels for the companions. floor_us: the weight's bytes over the read bandwidth
measured in the same run. --sweep tries many shapes and prints the best ones; without it the tuned shape is what runs.
--formats: the same products of quantised weights, by the chooser's kernels; floor_us is then the time in which weight
and scales are read, share_of_floor how near the product comes to it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from paged_kernels.activation import gate
from paged_kernels.codes import quantise
from paged_kernels.linear import Format, Rounding
from paged_kernels.norm import norm
from paged_kernels.norm_value import Norm
from paged_kernels.products import Products
from paged_kernels.small_linear import (
    NarrowShape,
    VectorShape,
    make_linear_workspace,
    narrow_linear,
    narrow_shape,
    vector_linear,
    vector_shape,
)
from tests.bench.bench_decode_attention import read_bandwidth, replay_us
from tests.bench.geometries import GEOMETRIES

FORMATS = {
    "fp8-channel": Format("fp8", rounding=Rounding("fp8")),
    "fp8-block": Format("fp8", (128, 128), Rounding("fp8", 128)),
    "int8-channel": Format("int8"),
    "int4-g128": Format("int4", (1, 128), scale_dtype=torch.bfloat16, order="quads"),
    "int4-g32-zeros": Format("int4", (1, 32), zeros=True, scale_dtype=torch.bfloat16),
    "nvfp4": Format("fp4", (1, 16), row_scales=True, scale_dtype=torch.float8_e4m3fn),
}
_COLD_BYTES = 192 * 2**20  # of weights in a graph: four times the L2 cache
EPS = 1e-5


def products(model: str) -> dict[str, tuple[int, int]]:
    """Name -> rows and columns of the weight."""
    g = GEOMETRIES[model]
    q_size, kv_size = g["num_attention_heads"] * g["head_dim"], g["num_key_value_heads"] * g["head_dim"]
    hidden, intermediate = g["hidden_size"], g["intermediate_size"]
    return {
        "qkv": (q_size + 2 * kv_size, hidden),
        "out": (hidden, q_size),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
        "head": (g["vocab_size"], hidden),
    }


class Case:
    def __init__(self, product: str, rows: int, columns: int, num_tokens: int) -> None:
        self.gated, self.adds, self.normed = (
            product == "gate_up",
            product in ("out", "down"),
            product in ("qkv", "gate_up", "head"),
        )
        self.bytes = 2 * rows * columns
        copies = max(2, -(-_COLD_BYTES // self.bytes))
        self.weights = [
            torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * columns**-0.5 for _ in range(copies)
        ]
        self.x = torch.randn(num_tokens, columns, device="cuda", dtype=torch.bfloat16)
        self.norm = torch.ones(columns, device="cuda", dtype=torch.bfloat16)
        self.y = torch.randn(num_tokens, rows // 2 if self.gated else rows, device="cuda", dtype=torch.bfloat16)
        self.wide = torch.empty(num_tokens, rows, device="cuda", dtype=torch.bfloat16)
        self.hot = torch.empty_like(self.x)
        self.workspace = make_linear_workspace(torch.device("cuda"))
        self.name, self.rows, self.columns, self.num_tokens = product, rows, columns, num_tokens

    def time(self, launch: Callable[[torch.Tensor], object]) -> float:
        return replay_us(lambda i: launch(self.weights[i % len(self.weights)]), max(16, len(self.weights)), 9)

    def cublas(self, weight: torch.Tensor) -> None:
        x = norm(self.x, Norm(self.norm, EPS), out=self.hot, launch_pdl=True) if self.normed else self.x
        if self.adds:
            self.y.addmm_(x, weight.t(), beta=1)
        else:
            torch.mm(x, weight.t(), out=self.wide)
            if self.gated:
                gate(self.wide, out=self.y, launch_pdl=True)

    def vector(self, weight: torch.Tensor, shape: VectorShape) -> None:
        norm = Norm(self.norm, EPS) if self.normed else None
        vector_linear(
            self.x,
            weight,
            norm=norm,
            gated=self.gated,
            residual=self.y if self.adds else None,
            out=self.y,
            shape=shape,
            launch_pdl=True,
        )

    def narrow(self, weight: torch.Tensor, shape: NarrowShape) -> None:
        x = norm(self.x, Norm(self.norm, EPS), out=self.hot, launch_pdl=True) if self.normed else self.x
        residual = self.y if self.adds else None
        narrow_linear(
            x,
            weight,
            gated=self.gated,
            residual=residual,
            out=self.y,
            workspace=self.workspace,
            shape=shape,
            launch_pdl=True,
        )

    def shapes(self, sweep: bool) -> Iterator[VectorShape | NarrowShape]:
        rows = len(self.y[0])
        if self.num_tokens == 1:
            yield vector_shape(rows, self.columns, self.gated)
        yield narrow_shape(self.num_tokens, rows, self.columns, self.gated)
        if not sweep:
            return
        if self.num_tokens == 1:
            for num_rows in (1, 2, 4):
                for block in (1024, 2048, 4096, 8192):
                    for warps in (2, 4, 8):
                        if (
                            block < 2 * self.columns
                            and 16 <= num_rows * block * (2 if self.gated else 1) // (32 * warps) <= 64
                        ):
                            yield VectorShape(num_rows, block, warps)
            return
        for num_rows, block, stages in itertools.product((16, 32, 64), (64, 128, 256), (4, 6)):
            for split in (1, 2, 4):
                shared = block * 2 * (num_rows * (2 if self.gated else 1) + max(16, self.num_tokens)) * stages
                if (
                    shared <= 200 * 1024
                    and 96 <= -(-rows // num_rows) * split <= 600
                    and self.columns // split >= 4 * block
                ):
                    yield NarrowShape(num_rows, block, split, stages, 4, 8)


def quantised_row(
    product: str, rows: int, columns: int, num_tokens: int, name: str, reading: float
) -> dict[str, float | str]:
    """The product by products.py, of a weight in the format of that name."""
    case, chooser = Case(product, rows, columns, num_tokens), Products(torch.device("cuda"))
    linears = [quantise(weight, FORMATS[name]) for weight in case.weights]
    linears += [
        quantise(case.weights[0], FORMATS[name])
        for _ in range(-(-_COLD_BYTES // sum(x.nbytes for x in linears[0].tensors)) - len(linears))
    ]
    norm = Norm(case.norm, EPS) if case.normed else None
    residual = case.y if case.adds else None

    def launch(i: int) -> object:
        return chooser(case.x, linears[i % len(linears)], norm_before=norm, gated=case.gated, residual=residual)

    us = replay_us(launch, max(16, len(linears)), 9)
    floor = sum(x.nbytes for x in linears[0].tensors) / reading * 1e6
    return {"format": name, "floor_us": round(floor, 2), "us": round(us, 2), "share_of_floor": round(floor / us, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GEOMETRIES, default="llama-3.2-1b")
    parser.add_argument("--tokens", default="1,2,8,16,32,64,128")
    parser.add_argument("--products", default="qkv,out,gate_up,down,head")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument(
        "--formats", default="", help=f"of quantised weights, instead of bfloat16: {', '.join(FORMATS)}"
    )
    options = parser.parse_args()
    reading = read_bandwidth()
    asked = [one for one in products(options.model).items() if one[0] in options.products.split(",")]
    for (product, (rows, columns)), tokens in itertools.product(asked, options.tokens.split(",")):
        num_tokens = int(tokens)
        head = {"bench": "linear", "model": options.model, "product": product}
        if options.formats:
            for name in options.formats.split(","):
                found = quantised_row(product, rows, columns, num_tokens, name, reading)
                print(json.dumps({**head, "tokens": num_tokens, **found}), flush=True)
            continue
        row = row_of(Case(product, rows, columns, num_tokens), reading, options.sweep)
        print(json.dumps({**head, **row, "device": torch.cuda.get_device_name()}), flush=True)


def row_of(case: Case, reading: float, sweep: bool) -> dict[str, Any]:
    """Microseconds of cuBLAS and of our shapes. reading: bytes/s of the device's memory; sweep: of all shapes."""
    found: list[tuple[float, str]] = []
    for shape in dict.fromkeys(case.shapes(sweep)):
        launch: Any = case.vector if isinstance(shape, VectorShape) else case.narrow
        try:
            found.append((round(case.time(partial(launch, shape=shape)), 2), str(shape)))
        except Exception as error:  # a shape the hardware has no room for
            found.append((1e9, f"{shape}: {type(error).__name__} {str(error)[:60]}"))
    best = sorted(found)[:4]
    row: dict[str, Any] = {
        "rows": case.rows,
        "columns": case.columns,
        "tokens": case.num_tokens,
        "floor_us": round(case.bytes / reading * 1e6, 2),
        "cublas_us": round(case.time(case.cublas), 2),
        "tuned_us": {shape: us for us, shape in found[: 2 if case.num_tokens == 1 else 1]},
        "read_tb_s": round(reading / 1e12, 3),
    }
    print(
        f"{case.name:8} {case.rows}x{case.columns} x{case.num_tokens:3}: floor {row['floor_us']:7.2f}, cublas "
        f"{row['cublas_us']:7.2f}, ours {'; '.join(f'{us} {shape}' for us, shape in best)}",
        file=sys.stderr,
    )
    return row | {"best": best} if sweep else row


if __name__ == "__main__":
    main()
