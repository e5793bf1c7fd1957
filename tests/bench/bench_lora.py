"""Adapters of many sequences in one step on one GPU: what they add to a decoder layer. Prints JSON lines, and a table
to stderr.

    python -m tests.bench.bench_lora [--model llama-3.1-8b] [--tokens 1,8,64,256,2048] [--adapters 1,8,32] [--rank 16]

A case is a layer's four products with everybody's adapter added: tokens of a step, spread over so many adapters. Times
are medians of CUDA graphs in which layer follows layer, so that weights come from memory as they do in a model.
plain_us: the products without adapters, as a server without adapters computes them; adapted_us: with; added: the share
on top. floor_us: the bytes of the adapters that are read, over the bandwidth measured in the same run. loop_us: one
torch product after another for each adapter, which is what a batch of several adapters costs without grouping.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from paged_backend.models.adapter_layout import AdapterLayout
from paged_backend.models.architecture import read_architecture
from paged_backend.models.blocks.products import AdaptedProducts, Products
from paged_backend.models.decoder import Layer
from paged_backend.models.weights import allocate_weights, randomise_weights
from paged_kernels.cuda_ops import CudaOps
from paged_kernels.reference import reference
from tests.bench.bench_decode_attention import read_bandwidth, replay_us
from tests.bench.geometries import GEOMETRIES, write_geometry

_LAYERS = 8  # of weights, so that the L2 cache holds none when its turn comes again
EPS = 1e-5


class Reference:
    """The ops of adapters in plain torch, the others by kernels: one product after another."""

    def __init__(self, ops: CudaOps) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        adapters = ("num_tiles", "num_splits", "assign_adapters", "group_tokens", "adapter_shrink", "adapter_expand")
        return getattr(reference if name in adapters else self._ops, name)


class Case:
    def __init__(self, model: str, folder: Path, num_tokens: int, num_adapters: int, rank: int) -> None:
        device, dtype = torch.device("cuda"), torch.bfloat16
        a = read_architecture(write_geometry(model, folder))
        a = replace(a, layers=a.layers[:1] * _LAYERS, vocab_size=1024)
        weights = allocate_weights(a, dtype, device)
        randomise_weights(weights, a, 0)
        self.layers = weights.layers
        self.ops = CudaOps(
            num_heads=a.attention.num_heads,
            num_kv_heads=a.attention.num_kv_heads,
            head_dim=a.attention.head_dim,
            sliding_windows=a.sliding_windows,
            vocab_size=a.vocab_size,
            max_sequences=256,
            max_outputs=256,
            kv_dtype=dtype,
            device=device,
        )
        self.layout = AdapterLayout.of(a.layers, a.hidden_size)
        sites = dict(zip(weights.linears, self.layout.sites, strict=True))
        adapters = torch.randn(num_adapters, self.layout.size * rank, device=device, dtype=dtype) * 0.01
        ranks = torch.full((num_adapters,), rank, dtype=torch.int32, device=device)
        rows = torch.arange(num_tokens, dtype=torch.int32, device=device)
        self.arguments = (sites, self.layout, adapters, ranks, rows % num_adapters, num_tokens)
        starts = torch.arange(num_tokens + 1, dtype=torch.int32, device=device)
        self.step: Any = SimpleNamespace(
            shape=SimpleNamespace(num_tokens=num_tokens), plan={"rows": rows}, query_starts=starts
        )
        self.x = torch.randn(num_tokens, a.hidden_size, device=device, dtype=dtype)
        self.attended = torch.randn(num_tokens, a.num_heads * a.head_dim, device=device, dtype=dtype)
        self.bytes = adapters.nbytes // _LAYERS * min(num_tokens, num_adapters) // num_adapters

    def layer(self, products: Products, layer: Layer) -> None:
        attention, mlp = layer.attention, layer.mlp
        products.norm_linear(self.x, attention.residual.before, attention.qkv)
        x = products.add_linear(self.attended, attention.out, self.x)
        products.add_linear(products.norm_gated_linear(x, mlp.residual.before, mlp.gate_up), mlp.down, x)

    def time(self, products: Products) -> float:
        if isinstance(products, AdaptedProducts):
            products.begin(self.step)
        return replay_us(lambda index: self.layer(products, self.layers[index % _LAYERS]), 2 * _LAYERS, 9)

    def loop(self) -> float:
        """Launched, not captured: it asks the device which tokens are whose."""
        products = AdaptedProducts(Reference(self.ops), *self.arguments)
        products.begin(self.step)
        times = []
        for _ in range(5):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for layer in self.layers:
                self.layer(products, layer)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1000 / _LAYERS)
        return sorted(times)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GEOMETRIES, default="llama-3.1-8b")
    parser.add_argument("--tokens", default="1,8,64,256,2048")
    parser.add_argument("--adapters", default="1,8,32")
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    reading = read_bandwidth()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for num_tokens in map(int, options.tokens.split(",")):
            for num_adapters in map(int, options.adapters.split(",")):
                case = Case(options.model, Path(folder) / "model", num_tokens, num_adapters, options.rank)
                plain, adapted = case.time(case.ops), case.time(AdaptedProducts(case.ops, *case.arguments))
                row = {
                    "bench": "lora",
                    "model": options.model,
                    "tokens": num_tokens,
                    "adapters": num_adapters,
                    "rank": options.rank,
                }
                row |= {
                    "plain_us": round(plain, 2),
                    "adapted_us": round(adapted, 2),
                    "added": round(adapted / plain - 1, 3),
                }
                row |= {
                    "floor_us": round(case.bytes / reading * 1e6, 2),
                    "loop_us": round(case.loop(), 1),
                    "device": torch.cuda.get_device_name(),
                }
                print(json.dumps(row), flush=True)
                print(
                    f"{num_tokens:5} tokens, {num_adapters:3} adapters: plain {plain:8.1f}, adapted "
                    f"{adapted:8.1f} us a layer",
                    file=sys.stderr,
                )


if __name__ == "__main__":
    main()
