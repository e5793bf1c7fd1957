"""What the experts' kernels take of a multiprocessor, compiled for sm_90 without a card. Prints JSON lines: registers,
spilled bytes, shared memory.

    python -m tests.bench.compile_experts [--formats plain,fp8_block,int4] [--models qwen3-30b-a3b] [--tokens 16,8192]

ptxas of the installed Triton language reads the PTX again and says what it says with -v. Nothing is run, and no time is
measured.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from paged_kernels import expert_codes, expert_products, expert_routing, expert_tiles, expert_vectors, expert_words
from paged_kernels.experts import ExpertLinear, Gate, empty_experts
from paged_kernels.jit import Kernel
from paged_kernels.quant_tile import packs
from tests.bench.expert_formats import EXPERT_FORMATS, format_of

# name, kernel, constants and registers of a thread if there is a limit (maxnreg), pointers' types, warps
Case = tuple[str, Kernel, dict[str, Any], dict[str, str], int]

_GEOMETRIES = {  # hidden, intermediate, experts, of a token
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "gpt-oss-20b": (2880, 2880, 32, 4),
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "minimax-m2": (3072, 1536, 256, 8),
}
_KINDS = dict.fromkeys(("expert_ids", "order", "tiles", "arrivals"), "i32")
_KINDS |= dict.fromkeys(("weights", "pair_weights", "logits", "correction"), "fp32")
_SCALARS = {
    "num_sequences": "i32",
    "q_stride": "i32",
    "table_stride": "i32",
    "num_tiles": "i32",
    "num_tokens": "i32",
    "x_stride": "i32",
    "out_stride": "i32",
    "eps": "fp32",
    "scale": "fp32",
    "soft_cap": "fp32",
}
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}


def compiled(
    kernel: Kernel, constants: dict[str, Any], kinds: dict[str, str], num_warps: int, num_stages: int = 3
) -> dict[str, Any]:
    """Constants: all of the kernel's, and maxnreg as its launcher gives it; activations are bfloat16."""
    names = kernel.jitted.arg_names
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": constants.get("maxnreg")}
    constants = {name: value for name, value in constants.items() if name in names}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in _SCALARS and name not in kinds:
            return _SCALARS[name]
        return f"*{(_KINDS | kinds).get(name, 'bf16')}"

    signature = {name: kind(name) for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("stride")
    }
    source = ASTSource(
        kernel.jitted, signature, {(names.index(name),): value for name, value in constants.items()}, aligned
    )
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {**_read_again(result.asm["ptx"]), "shared_bytes": result.metadata.shared, "num_warps": num_warps}


def _read_again(ptx: str) -> dict[str, int]:
    ptxas = get_ptxas(90).path  # which one reads the PTX depends on the version of Triton
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        said = subprocess.run(
            [ptxas, "-arch=sm_90a", "-v", "kernel.ptx", "-o", "kernel.cubin"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", said))
    return {
        "registers": max(int(count) for count in re.findall(r"Used (\d+) registers", said)),
        "spilled_bytes": spilled,
    }


def _layer(hidden: int, size: int, num_experts: int, name: str) -> dict[str, ExpertLinear]:
    """gate_up and down, without memory."""
    return {
        part: empty_experts(
            num_experts,
            rows,
            columns,
            format_of(name, columns),
            torch.bfloat16,
            torch.device("meta"),
            bias=hidden == size,
        )
        for part, rows, columns in (("gate_up", 2 * size, hidden), ("down", hidden, size))
    }


def _kinds(linear: ExpertLinear) -> dict[str, str]:
    named = expert_codes.parameters(linear, torch.empty(1, dtype=torch.bfloat16, device="meta"))
    return {
        name: _TYPES[tensor.dtype]
        for name, tensor in zip(("weight", "scale", "zero", "row_scale", "bias"), named, strict=True)
    }


def _vectors(layer: dict[str, ExpertLinear], hidden: int, size: int, top_k: int) -> list[Case]:
    found: list[Case] = []
    for part, linear in layer.items():
        gated = part == "gate_up"
        rows, block, lanes = expert_vectors.vector_shape(linear)
        constants = {"N": size if gated else hidden, "ROWS": rows, "BLOCK": block, "LANES": lanes}
        constants |= {**expert_codes.format_constants(linear), "LAUNCH_PDL": True, "PACKED": linear.format.nibbles}
        constants |= _gate(hidden == size) if gated else {"TOP_K": top_k}
        kernel = expert_vectors._gate_up_kernel if gated else expert_vectors._down_kernel
        found.append((f"one {part}", kernel, constants, _kinds(linear), 4))
    return found


def _products(layer: dict[str, ExpertLinear], hidden: int, size: int, top_k: int, num_tokens: int) -> list[Case]:
    found: list[Case] = []
    for part, linear in layer.items():
        gated = part == "gate_up"
        tokens = expert_tiles.tokens_of_tiles(num_tokens * top_k, *layer.values())
        shape = expert_tiles.product_shape(tokens, linear, gated=gated)
        constants = {"N": size if gated else hidden, "TOP_K": top_k, "TOKENS": shape.tokens, "ROWS": shape.rows}
        constants |= {"BLOCK": shape.block, "STAGES": shape.stages, "FIRST": gated, **_gate(gated and hidden == size)}
        constants |= {"GATED": gated}
        constants |= {
            **expert_codes.format_constants(linear),
            "LAUNCH_PDL": True,
            "PACKED": packs(linear.format),
        }
        constants |= {"PRECISION": "ieee"}
        kernel = expert_products._products_kernel
        found.append((f"{part}, {num_tokens} tokens", kernel, constants, _kinds(linear), shape.num_warps))
    return found


def _words(layer: dict[str, ExpertLinear], hidden: int, size: int, top_k: int, num_tokens: int) -> list[Case]:
    found: list[Case] = []
    kinds = {"x": "fp8e4nv", "x_scales": "fp32", "weight": "i32", "exponents": "i32", "row_scale": "fp32"}
    shapes = expert_tiles.words_shapes(num_tokens, num_tokens * top_k / len(layer["down"].weight), by_fp8=True)
    for (part, linear), shape in zip(layer.items(), shapes, strict=True):
        gated, one = part == "gate_up", num_tokens == 1
        parts = shape.parts if one else 1
        constants = {"N": size if gated else hidden, "K": linear.num_columns, "TOP_K": top_k, "TOKENS": shape.tokens}
        constants |= {"ROWS": shape.rows, "STAGES": shape.stages, "FIRST": gated, "PARTS": parts}
        constants |= {"BIAS": linear.bias is not None, **(_gate(hidden == size) if gated else _ungated())}
        constants |= {"SPLIT": True, "PACKED": True, "LAUNCH_PDL": True, "maxnreg": shape.max_registers}
        name, out = f"{part}, {num_tokens} tokens", "fp32" if parts > 1 else "bf16"
        found.append((name, expert_words._words_kernel, constants, {**kinds, "out": out}, shape.num_warps))
    return found


def _routing(hidden: int, num_experts: int, top_k: int, num_tokens: int) -> Case:
    tokens, part, span, padded = expert_routing.route_shape(num_tokens, num_experts, hidden)
    constants = {
        "K": hidden,
        "NUM_EXPERTS": num_experts,
        "EXPERTS": padded,
        "TOKENS": tokens,
        "PART": part,
        "SPAN": span,
        "BLOCK": 128,
        "STAGES": 4,
        "TOP_K": top_k,
    }
    constants |= {
        "CHOICES": triton.next_power_of_2(top_k),
        "SCORES": 0,
        "RENORMALISED": True,
        "BIAS": False,
        "CORRECTED": False,
        "NUM_GROUPS": 1,
    }
    constants |= {"TOP_GROUPS": 1, "GROUP_BEST": 2, "LAUNCH_PDL": True, "PRECISION": "ieee"}
    return f"route, {num_tokens} tokens", expert_routing._route_kernel, constants, {}, 4


def _gate(clamped: bool) -> dict[str, object]:
    return expert_codes.gate_constants(Gate(limit=7.0, alpha=1.702, interleaved=True) if clamped else Gate())


def _ungated() -> dict[str, object]:
    return expert_codes.gate_constants(Gate(gated=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(EXPERT_FORMATS))
    parser.add_argument("--models", default=",".join(_GEOMETRIES))
    parser.add_argument("--tokens", default="16,256,8192")
    options = parser.parse_args()
    for model in options.models.split(","):
        hidden, size, num_experts, top_k = _GEOMETRIES[model]
        for format in options.formats.split(","):
            layer = _layer(hidden, size, num_experts, format)
            words = layer["down"].format.order == "words"
            cases = [] if words else _vectors(layer, hidden, size, top_k)
            for num_tokens in map(int, options.tokens.split(",")):
                cases += (_words if words else _products)(layer, hidden, size, top_k, num_tokens)
                if format == "plain":
                    cases.append(_routing(hidden, num_experts, top_k, num_tokens))
            for name, kernel, constants, kinds, num_warps in cases:
                row = {"bench": "compile_experts", "model": model, "format": format, "kernel": name}
                row |= compiled(kernel, constants, kinds, num_warps)
                print(json.dumps({**row, "triton": triton.__version__}), flush=True)


if __name__ == "__main__":
    main()
