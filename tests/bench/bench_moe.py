"""A layer of experts on one GPU, in the geometries of published models. Prints JSON lines, and a table to stderr.

    python -m tests.bench.bench_moe [--models qwen3-30b-a3b,gpt-oss-20b] [--tokens 1,16,64,256] [--format fp8_block]

A case is norm, routing, experts and the addition to the residual, replayed as a CUDA graph of launches over copies of
the layer, together larger than the L2 cache; medians. floor_us is the larger of two: the bytes of all experts that some
token chose, over the read bandwidth measured in the same run, and the products' operations over those of a large
bfloat16 product of cuBLAS, measured too. share: of the time that is the floor. --format: how the experts' weights are
stored, one of tests/bench/expert_formats.py; activations are bfloat16 whatever it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from paged_kernels.expert_kernels import ExpertKernels
from paged_kernels.experts import ExpertLinear, Experts, Gate, Routing, empty_experts
from paged_kernels.linear import Linear
from paged_kernels.norm_value import Norm
from tests.bench.bench_decode_attention import read_bandwidth, replay_us
from tests.bench.expert_formats import EXPERT_FORMATS, fill_at_random, format_bytes, format_of
from tests.bench.geometries import GEOMETRIES

_COLD_BYTES = 192 * 2**20  # of experts in a graph: four times the L2 cache
_EPS = 1e-5


def sizes(model: str) -> dict[str, Any]:
    """What matters here of a published config."""
    g = GEOMETRIES[model]
    experts = g.get("num_experts") or g.get("n_routed_experts") or g["num_local_experts"]
    is_gpt_oss = g["model_type"] == "gpt_oss"
    routing = Routing(
        g["num_experts_per_tok"], "softmax_of_chosen" if is_gpt_oss else "softmax", renormalised=not is_gpt_oss
    )
    gate = Gate(limit=7.0, alpha=1.702, interleaved=True) if is_gpt_oss else Gate()
    size = g.get("moe_intermediate_size") or g["intermediate_size"]
    return {
        "hidden": g["hidden_size"],
        "size": size,
        "num_experts": experts,
        "routing": routing,
        "gate": gate,
        "bias": is_gpt_oss,
    }


class Case:
    def __init__(self, model: str, num_tokens: int, format: str) -> None:
        self.of, self.num_tokens, self.format = sizes(model), num_tokens, format
        self.kernels = ExpertKernels(torch.device("cuda"))
        hidden = self.of["hidden"]
        self.x = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16)
        self.norm = Norm(torch.ones(hidden, device="cuda", dtype=torch.bfloat16), _EPS)
        first = self._layer()
        copies = max(1, min(8, -(-_COLD_BYTES // max(1, self.chosen_bytes(first)))))
        self.layers = [first, *(self._layer() for _ in range(copies - 1))]

    def _layer(self) -> Experts:
        of, hidden, count = self.of, self.of["hidden"], self.of["num_experts"]

        def randn(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5)

        def linear(rows: int, columns: int) -> ExpertLinear:
            format, device = format_of(self.format, columns), torch.device("cuda")
            found = empty_experts(count, rows, columns, format, torch.bfloat16, device, bias=of["bias"])
            fill_at_random(found)
            return found

        router = Linear(randn(count, hidden), randn(count) if of["bias"] else None)
        return Experts(
            router, None, of["routing"], linear(2 * of["size"], hidden), of["gate"], linear(hidden, of["size"])
        )

    def expert_bytes(self) -> int:
        hidden, size = self.of["hidden"], self.of["size"]
        return format_bytes(self.format, 2 * size, hidden) + format_bytes(self.format, hidden, size)

    def chosen_bytes(self, layer: Experts) -> int:
        """Of the experts that some token of this case chose."""
        expert_ids, _ = self.kernels.route(self.x, layer)
        return int(len(expert_ids.unique()) * self.expert_bytes())

    def floor_us(self, reading: float, computing: float) -> float:
        operations = 6 * self.num_tokens * self.of["routing"].top_k * self.of["hidden"] * self.of["size"]
        return max(self.chosen_bytes(self.layers[0]) / reading, operations / computing) * 1e6

    def time_us(self) -> float:
        def launch(index: int) -> None:
            self.kernels.norm_add(self.x, self.norm, self.layers[index % len(self.layers)])

        return replay_us(launch, max(8, len(self.layers)), 9)


def operations_per_second() -> float:
    """Of a bfloat16 product of 8192 x 8192 x 8192."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (replay_us(lambda index: torch.mm(a, b), 4, 9) / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="qwen3-30b-a3b,qwen3-235b-a22b,gpt-oss-20b,gpt-oss-120b,mixtral-8x7b")
    parser.add_argument("--tokens", default="1,16,64,256,2048,8192")
    parser.add_argument("--format", choices=EXPERT_FORMATS, default="plain")
    options = parser.parse_args()
    reading, computing = read_bandwidth(), operations_per_second()
    for model in options.models.split(","):
        for num_tokens in map(int, options.tokens.split(",")):
            case = Case(model, num_tokens, options.format)
            floor, taken = case.floor_us(reading, computing), case.time_us()
            row = {
                "bench": "moe",
                "model": model,
                "format": options.format,
                "tokens": num_tokens,
            }
            row |= {"us": round(taken, 2), "floor_us": round(floor, 2), "share": round(floor / taken, 3)}
            row |= {
                "read_tb_s": round(reading / 1e12, 3),
                "tflop_s": round(computing / 1e12, 1),
                "device": torch.cuda.get_device_name(),
            }
            print(json.dumps(row), flush=True)
            print(
                f"{model:16} x{num_tokens:5}: {taken:9.2f} us, floor {floor:9.2f}, share {floor / taken:.2f}",
                file=sys.stderr,
            )
            del case
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
