"""What decode attention takes of a multiprocessor, compiled for sm_90 without a card, for ordinary decodes and for runs
of drafts. Prints JSON lines: registers, spilled bytes, shared memory.

    python -m tests.bench.compile_decode_attention [--queries 1,5] [--heads 32/8/128,64/8/64] [--kv bf16,fp8]

--queries: decodes of a sequence that are attended to together. --heads: query heads / KV heads / head_dim. Launch
shapes are those of an H200's 132 multiprocessors and pages of 16 tokens. Nothing is run, and no time is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import torch
import triton

from paged_kernels.decode_attention import _decode_kernel, launch_constants
from paged_kernels.decode_plan import launched_programs, make_decode_workspace
from tests.bench.compile_experts import compiled

_MULTIPROCESSORS = 132
_PAGE_SIZE = 16
_KINDS = dict.fromkeys(("line", "starts", "records", "arrivals", "page_table"), "i32")
_KINDS |= dict.fromkeys(("partial_acc", "partial_lse"), "fp32")
_STORES = {"bf16": (torch.bfloat16, "bf16"), "fp8": (torch.float8_e4m3fn, "i16")}


def cases() -> Iterator[tuple[str, dict[str, object]]]:
    """What a model's layers may ask for beside the plain kernel."""
    yield "plain", {"WINDOW": 0, "SOFT_CAP": False, "SINKS": False}
    yield "window, sinks", {"WINDOW": 128, "SOFT_CAP": False, "SINKS": True}
    yield "window, soft cap", {"WINDOW": 4096, "SOFT_CAP": True, "SINKS": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", default="1,2,5,8")
    parser.add_argument("--heads", default="32/8/128,64/8/128,32/8/64,64/8/64,32/32/128,16/8/256")
    parser.add_argument("--kv", default="bf16,fp8")
    parser.add_argument("--kinds", default="plain;window, sinks;window, soft cap")
    options = parser.parse_args()
    for heads in options.heads.split(","):
        num_q_heads, num_kv_heads, head_dim = map(int, heads.split("/"))
        for store in options.kv.split(","):
            dtype, kind = _STORES[store]
            pairs = dtype.itemsize == 1
            programs = launched_programs(_MULTIPROCESSORS, num_kv_heads, head_dim, dtype)
            for queries in map(int, options.queries.split(",")):
                of_cpu, rows = torch.device("cpu"), queries * num_q_heads // num_kv_heads
                workspace = make_decode_workspace(
                    num_q_heads, num_kv_heads, head_dim, dtype, of_cpu,
                    queries=queries, programs_per_multiprocessor=programs if rows <= 16 else 1,
                )  # fmt: skip
                cells = head_dim // 2 if pairs else head_dim
                head = _PAGE_SIZE * cells
                constants = {
                    **launch_constants(workspace, _PAGE_SIZE, pairs),
                    "PAGE_STRIDE": 2 * num_kv_heads * head,
                    "VALUE_STRIDE": num_kv_heads * head,
                    "HEAD_STRIDE": head,
                    "LAUNCH_PDL": True,
                    "PLAN_SETTLED": True,
                    "COMPILED": True,
                    "PRECISION": "ieee",
                }
                for name, wishes in cases():
                    if name not in options.kinds.split(";"):
                        continue
                    row = {"bench": "compile_decode_attention", "heads": heads, "kv": store, "queries": queries}
                    row |= {"kind": name, "rows": constants["ROWS"], "tile": workspace.tile}
                    row |= {"num_stages": workspace.num_stages}
                    row |= compiled(
                        _decode_kernel, constants | wishes, _KINDS | {"kv_pages": kind}, workspace.num_warps,
                        workspace.num_stages,
                    )  # fmt: skip
                    print(json.dumps({**row, "triton": triton.__version__}), flush=True)


if __name__ == "__main__":
    main()
