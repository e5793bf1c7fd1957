"""What the experts' kernels take of a multiprocessor, compiled for sm_90 without a card. Prints JSON lines: registers,
spilled bytes, shared memory.

    python -m tests.bench.compile_experts

ptxas of the installed Triton language reads the PTX again and says what it says with -v. Nothing is run, and no time is
measured.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from paged_kernels import expert_products, expert_routing, expert_vectors
from paged_kernels.experts import Gate
from paged_kernels.jit import Kernel

_GEOMETRIES = {  # hidden, intermediate, experts, of a token, mxfp4
    "qwen3-30b-a3b": (2048, 768, 128, 8, False),
    "gpt-oss-20b": (2880, 2880, 32, 4, False),
    "gpt-oss-20b, mxfp4": (2880, 2880, 32, 4, True),
    "mixtral-8x7b": (4096, 14336, 8, 2, False),
}
_INTS = ("expert_ids", "order", "tiles", "arrivals")
_FLOATS = ("weights", "pair_weights", "logits", "correction")
_SCALARS = {
    "num_tiles": "i32",
    "num_tokens": "i32",
    "x_stride": "i32",
    "out_stride": "i32",
    "eps": "fp32",
    "scale": "fp32",
}


def compiled(kernel: Kernel, constants: dict[str, Any], num_warps: int) -> dict[str, Any]:
    """Constants: all of the kernel's; activations are bfloat16."""
    names = kernel.jitted.arg_names

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in _SCALARS:
            return _SCALARS[name]
        element = (
            "i32"
            if name in _INTS
            else "fp32"
            if name in _FLOATS
            else "u8"
            if constants.get("MXFP4") and name in ("weight", "scales")
            else "bf16"
        )
        return f"*{element}"

    signature = {name: kind(name) for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("stride")
    }
    source = ASTSource(
        kernel.jitted, signature, {(names.index(name),): value for name, value in constants.items()}, aligned
    )
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
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


def _vectors(hidden: int, size: int, top_k: int, mxfp4: bool) -> list[tuple[str, Kernel, dict[str, Any], int]]:
    found = []
    for name, kernel, rows, columns in (
        ("one gate_up", expert_vectors._gate_up_kernel, size, hidden),
        ("one down", expert_vectors._down_kernel, hidden, size),
    ):
        at_once, block = expert_vectors.vector_shape(columns)
        constants = {
            "N": rows,
            "K": columns,
            "SCALES": -(-columns // 128) * 4 if mxfp4 else 0,
            "ROWS": at_once,
            "BLOCK": block,
            "LANES": 8,
        }
        constants |= {"MXFP4": mxfp4, "BIAS": hidden == size, "LAUNCH_PDL": True}
        constants |= {"TOP_K": top_k} if name == "one down" else _gate(hidden == size)
        found.append((name, kernel, constants, 4))
    return found


def _products(
    hidden: int, size: int, num_experts: int, top_k: int, mxfp4: bool, num_tokens: int
) -> list[tuple[str, Kernel, dict[str, Any], int]]:
    found = []
    for name, rows, columns in (("gate_up", size, hidden), ("down", hidden, size)):
        gated = name == "gate_up"
        shape = expert_products.product_shape(num_tokens * top_k, num_experts, gated=gated, mxfp4=mxfp4)
        constants = {
            "N": rows,
            "K": columns,
            "SCALES": -(-columns // 128) * 4 if mxfp4 else 0,
            "TOP_K": top_k,
            "TOKENS": shape.tokens,
            "ROWS": shape.rows,
        }
        constants |= {
            "BLOCK": shape.block,
            "STAGES": shape.stages,
            "GATED": gated,
            **_gate(gated and hidden == size),
            "BIAS": hidden == size,
        }
        constants |= {"MXFP4": mxfp4, "LAUNCH_PDL": True, "PRECISION": "ieee"}
        found.append((f"{name}, {num_tokens} tokens", expert_products._products_kernel, constants, shape.num_warps))
    return found


def _routing(hidden: int, num_experts: int, top_k: int, num_tokens: int) -> tuple[str, Kernel, dict[str, Any], int]:
    tokens, part, padded = expert_routing.route_shape(num_tokens, num_experts)
    constants = {
        "K": hidden,
        "NUM_EXPERTS": num_experts,
        "EXPERTS": padded,
        "TOKENS": tokens,
        "PART": part,
        "BLOCK": 128,
        "STAGES": 3,
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
    constants |= {"TOP_GROUPS": 1, "LAUNCH_PDL": True, "PRECISION": "ieee"}
    return f"route, {num_tokens} tokens", expert_routing._route_kernel, constants, 4


def _gate(clamped: bool) -> dict[str, object]:
    return expert_vectors.gate_constants(Gate(limit=7.0, alpha=1.702, interleaved=True) if clamped else Gate())


def main() -> None:
    for model, (hidden, size, num_experts, top_k, mxfp4) in _GEOMETRIES.items():
        cases = _vectors(hidden, size, top_k, mxfp4)
        for num_tokens in (16, 256, 8192):
            cases += [
                *_products(hidden, size, num_experts, top_k, mxfp4, num_tokens),
                _routing(hidden, num_experts, top_k, num_tokens),
            ]
        for name, kernel, constants, num_warps in cases:
            row = {"bench": "compile_experts", "model": model, "kernel": name, **compiled(kernel, constants, num_warps)}
            print(json.dumps({**row, "triton": triton.__version__}), flush=True)


if __name__ == "__main__":
    main()
