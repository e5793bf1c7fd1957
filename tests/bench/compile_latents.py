"""What the kernels of attention over latents take of a multiprocessor, compiled for sm_90 without a card. Prints JSON
lines: registers, spilled bytes, shared memory.

    python -m tests.bench.compile_latents [--page-sizes 1,16,64] [--models deepseek-v3,glm-4.7-flash]

Launch shapes are those of 16-bit numbers. Nothing is run, and no time is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import triton

from paged_kernels import latent_decode, latent_prefill
from paged_kernels.latent_tiles import head_blocks
from tests.bench.compile_experts import Case, compiled
from tests.bench.latent_geometries import LATENT_GEOMETRIES

_WHERE = dict.fromkeys(("line", "starts", "records", "query_starts", "seq_lens", "page_table"), "i32")
_SUMS = dict.fromkeys(("partial_acc", "partial_lse"), "fp32")


def _cases(name: str, page_size: int) -> Iterator[Case]:
    model = LATENT_GEOMETRIES[name]
    rank, rotary, num_heads = model["kv_lora_rank"], model["qk_rope_head_dim"], model["num_attention_heads"]
    blocks = head_blocks(num_heads)
    shape = {"BLOCKS": blocks, "GROUP": num_heads // blocks, "RANK": rank, "ROTARY": rotary, "PAGE_SIZE": page_size}
    tiles = {"TILE": 32, "ROWS": 64, "PRECISION": "ieee"}
    early = {"LAUNCH_PDL": True, "PLAN_SETTLED": True}
    yield "decode", latent_decode._decode_kernel, shape | tiles | early, _WHERE | _SUMS, 8
    merged = {"HEADS": 4, "NUM_HEADS": num_heads, "RANK": rank, "PARTS": 4, "LAUNCH_PDL": True}
    yield "merge", latent_decode._merge_kernel, merged, _WHERE | _SUMS, 4
    tokens = {"TOKENS": 64 // (num_heads // blocks)}
    yield "prefill", latent_prefill._prefill_kernel, shape | tiles | tokens, _WHERE, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-sizes", default="1,16,64")
    parser.add_argument("--models", default=",".join(LATENT_GEOMETRIES))
    options = parser.parse_args()
    for model in options.models.split(","):
        for page_size in map(int, options.page_sizes.split(",")):
            for name, kernel, constants, kinds, num_warps in _cases(model, page_size):
                row = {"bench": "compile_latents", "model": model, "page_size": page_size, "kernel": name}
                row |= compiled(kernel, constants, kinds, num_warps)
                print(json.dumps({**row, "triton": triton.__version__}), flush=True)


if __name__ == "__main__":
    main()
