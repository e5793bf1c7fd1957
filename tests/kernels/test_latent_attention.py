"""Attention over latents against a float64 oracle: decode and prefill. Everything a kernel must not read is NaN: unused
pages, slots past a length.

Without a CUDA device the kernels run in the Triton language's interpreter, in float32 (it computes bfloat16 wrongly),
on tiny shapes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton

from paged_kernels.decode_plan import DecodePlan, make_decode_plan, plan_decode_attention
from paged_kernels.latent_decode import latent_decode_attention, make_latent_workspace
from paged_kernels.latent_prefill import latent_prefill_attention
from paged_kernels.latent_tiles import head_blocks
from paged_kernels.prefill_attention import PrefillShape
from paged_kernels.reference import reference

gpu = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Rounding of the output alone is 2^-9 / sqrt(3) = 1.1e-3 in bfloat16 and 1.4e-4 in float16; the weights are rounded
# once too. Sums are float32.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 2e-5}
SMALL = PrefillShape(16, 16, 4, 1)


@dataclass(frozen=True)
class Case:
    lens: tuple[tuple[int, int], ...]  # (query_len, seq_len)
    num_heads: int = 4
    rank: int = 32
    rotary: int = 16
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None  # as dtype
    tile: int | None = None  # of decodes
    items: int | None = None
    shape: PrefillShape | None = None  # of prefills
    spare_queries: int = 3  # rows of q and out that belong to no sequence


@dataclass(frozen=True)
class Tensors:
    q: torch.Tensor
    pages: torch.Tensor
    page_table: torch.Tensor
    query_starts: torch.Tensor
    seq_lens: torch.Tensor
    scale: float


def decodes(*lengths: int, **options: object) -> Case:
    return Case(tuple((min(length, 1), length) for length in lengths), **options)  # type: ignore[arg-type]


def make(case: Case, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    width = case.rank + case.rotary
    needed = [-(-n // case.page_size) for _, n in case.lens]
    num_pages = sum(needed) + 2
    pages = torch.full((num_pages, case.page_size, width), float("nan"), dtype=case.kv_dtype or case.dtype)
    poison = num_pages // 2  # stays NaN
    ids = [page for page in torch.randperm(num_pages, generator=generator).tolist() if page != poison]
    page_table = torch.full((len(case.lens), max(needed, default=0) + 2), poison, dtype=torch.int32)
    for row, ((_, length), count) in enumerate(zip(case.lens, needed, strict=True)):
        page_table[row, :count] = torch.tensor([ids.pop() for _ in range(count)], dtype=torch.int32)
        tokens = torch.arange(length)
        page = page_table[row, tokens // case.page_size].long()
        pages[page, tokens % case.page_size] = torch.randn(length, width, generator=generator).to(pages.dtype)
    starts = torch.tensor([0, *(query_len for query_len, _ in case.lens)]).cumsum(0)
    q = torch.randn(int(starts[-1]) + case.spare_queries, case.num_heads, width, generator=generator)
    lengths = torch.tensor([n for _, n in case.lens], dtype=torch.int32, device=DEVICE)
    tables = page_table.to(DEVICE), starts.to(DEVICE, torch.int32), lengths
    return Tensors(q.to(DEVICE, case.dtype), pages.to(DEVICE), *tables, width**-0.5)


def oracle(case: Case, tensors: Tensors) -> torch.Tensor:
    """float64 [tokens of sequences, num_heads, rank]."""
    out, at = [torch.empty(0, case.num_heads, case.rank, dtype=torch.float64, device=DEVICE)], 0
    for row, (query_len, length) in enumerate(case.lens):
        tokens = torch.arange(length, device=DEVICE)
        page = tensors.page_table[row].long()[tokens // case.page_size]
        latents = tensors.pages[page, tokens % case.page_size].double()
        queries = tensors.q[at : at + query_len].double()
        scores = queries @ latents.T * tensors.scale  # [queries, heads, tokens]
        hidden = tokens > torch.arange(length - query_len, length, device=DEVICE)[:, None]
        scores.masked_fill_(hidden[:, None], float("-inf"))
        out.append(scores.softmax(-1) @ latents[:, : case.rank])
        at += query_len
    return torch.cat(out)


def plan_for(case: Case, max_sequences: int | None = None) -> DecodePlan:
    workspace = make_latent_workspace(
        case.num_heads, case.rank, case.dtype, DEVICE, tile=case.tile, num_work_items=case.items
    )
    return make_decode_plan(workspace, max_sequences or len(case.lens))


def decode(case: Case, tensors: Tensors, plan: DecodePlan, **launch: bool) -> torch.Tensor:
    """[num_sequences, num_heads, rank]; rows of length 0 have no query."""
    filled = [row for row, (query_len, _) in enumerate(case.lens) if query_len]
    q = tensors.q.new_full((len(case.lens), *tensors.q.shape[1:]), float("nan"))
    q[filled] = tensors.q[: len(filled)]
    out = q.new_full((*q.shape[:2], case.rank), float("nan"))
    plan_decode_attention(tensors.seq_lens, plan)
    latent_decode_attention(q, tensors.pages, tensors.page_table, out, plan, scale=tensors.scale, **launch)
    twin = reference.latent_decode_attention(
        q, tensors.pages, tensors.page_table, tensors.seq_lens, tensors.scale, case.rank
    )
    empty = [row for row in range(len(case.lens)) if row not in filled]
    assert out[empty].isnan().all(), "a padding row was written"
    assert not twin[empty].any()
    if case.dtype == torch.float32:
        assert_close(case, twin[filled], oracle(case, tensors))
    return out[filled]


def prefill(case: Case, tensors: Tensors) -> torch.Tensor:
    """[tokens of sequences, num_heads, rank]."""
    out = tensors.q.new_full((*tensors.q.shape[:2], case.rank), float("nan"))
    latent_prefill_attention(
        tensors.q, tensors.pages, tensors.page_table, tensors.query_starts, tensors.seq_lens, out, scale=tensors.scale,
        shape=case.shape,
    )  # fmt: skip
    num_tokens = len(out) - case.spare_queries
    assert out[num_tokens:].isnan().all(), "a row of no sequence was written"
    twin = reference.latent_prefill_attention(
        tensors.q[:num_tokens], tensors.pages, tensors.page_table, case.lens, tensors.scale, case.rank
    )
    if case.dtype == torch.float32:
        assert_close(case, twin, oracle(case, tensors))
    return out[:num_tokens]


def assert_close(case: Case, out: torch.Tensor, expected: torch.Tensor) -> None:
    error, size = (out.double() - expected).norm(), expected.norm()
    assert error <= TOLERANCE[case.dtype] * size, f"relative RMS error {error / size:.2e}"  # NaN fails too


DECODES = {
    "one token": decodes(1),
    "one sequence over all programs": decodes(200, tile=16),
    "many pieces of one sequence": decodes(200, tile=16, items=13),
    "page and tile edges": decodes(15, 16, 17, 31, 32, 33, 64, 65, tile=16),
    "padding rows": decodes(0, 5, 0, 0, 40, 0, tile=16),
    "only padding rows": decodes(0, 0, 0),
    "more sequences than items": decodes(3, 20, 1, 9, 33, 2, 18, 7, tile=16, items=3),
    "page of one token": decodes(1, 7, 40, page_size=1, tile=16),
    "page larger than tile": decodes(1, 70, 128, page_size=64, tile=16),
    "heads over several programs": decodes(3, 37, num_heads=48, tile=16),
    "heads no power of two": decodes(37, 3, num_heads=5, tile=16, items=2),
    "latents of 16 bits": decodes(3, 37, kv_dtype=torch.float16, tile=16),
    "wider latents": decodes(3, 20, rank=64, rotary=32, num_heads=2, tile=16),
}
PREFILLS = {
    "one token": Case(((1, 1),), shape=SMALL),
    "whole prompts": Case(((5, 5), (17, 17), (33, 33)), shape=SMALL),
    "chunks": Case(((5, 21), (17, 50), (1, 64)), shape=SMALL),
    "page and tile edges": Case(((15, 31), (16, 32), (17, 33)), shape=SMALL),
    "padding rows": Case(((0, 0), (7, 20), (0, 0)), shape=SMALL),
    "page of one token": Case(((9, 20),), page_size=1, shape=SMALL),
    "page larger than tile": Case(((9, 70),), page_size=64, shape=SMALL),
    "heads over several programs": Case(((3, 20), (2, 2)), num_heads=48, shape=SMALL),
    "heads no power of two": Case(((9, 20), (4, 4)), num_heads=5, shape=SMALL),
    "latents of 16 bits": Case(((9, 20),), kv_dtype=torch.float16, shape=SMALL),
}


@pytest.mark.parametrize("case", DECODES.values(), ids=DECODES.keys())
def test_decode_equals_float64_on_tiny_shapes(case: Case) -> None:
    tensors = make(case, seed=1)
    assert_close(case, decode(case, tensors, plan_for(case)), oracle(case, tensors))


@pytest.mark.parametrize("case", PREFILLS.values(), ids=PREFILLS.keys())
def test_prefill_equals_float64_on_tiny_shapes(case: Case) -> None:
    tensors = make(case, seed=2)
    assert_close(case, prefill(case, tensors), oracle(case, tensors))


def test_a_plan_serves_batches_of_other_sizes() -> None:
    plan = plan_for(decodes(1, tile=16, items=5), max_sequences=8)
    for seed, lengths in enumerate([(90, 3, 0, 17, 50, 2, 8, 31), (5,), (0, 70)]):
        case = decodes(*lengths, tile=16, items=5)
        tensors = make(case, seed)
        assert_close(case, decode(case, tensors, plan), oracle(case, tensors))


def test_heads_are_divided_into_equal_blocks() -> None:
    assert [head_blocks(count) for count in (1, 16, 20, 64, 96, 128, 67)] == [1, 1, 1, 1, 2, 2, 67]


def test_what_does_not_fit_is_refused() -> None:
    case = decodes(20, 40)
    tensors, plan = make(case, seed=4), plan_for(case)
    out = tensors.q[:2, :, :32].contiguous()
    options = {"scale": 1.0}
    with pytest.raises(ValueError, match="do not fit"):
        latent_decode_attention(tensors.q[:2, :3], tensors.pages, tensors.page_table, out[:, :3], plan, **options)
    with pytest.raises(ValueError, match="no power of two"):
        latent_decode_attention(
            tensors.q[:2], tensors.pages[:, :12].contiguous(), tensors.page_table, out, plan, **options
        )
    with pytest.raises(ValueError, match="contiguous latents"):
        latent_decode_attention(tensors.q[:2], tensors.pages[..., :16], tensors.page_table, out, plan, **options)
    starts, lens = tensors.query_starts, tensors.seq_lens
    with pytest.raises(ValueError, match="not of powers of two"):
        latent_prefill_attention(
            tensors.q[:2], tensors.pages, tensors.page_table, starts, lens, out[..., :24].contiguous(), **options
        )
    with pytest.raises(ValueError, match="do not fit"):
        latent_prefill_attention(tensors.q[:2], tensors.pages, tensors.page_table, starts, lens, out.half(), **options)


TRUE = {
    "DeepSeek-V3": {"num_heads": 128},
    "Kimi K2": {"num_heads": 64},
    "DeepSeek-V2-Lite": {"num_heads": 16},
    "GLM-4.7-Flash": {"num_heads": 20},
}
TYPES = (torch.bfloat16, torch.float16, torch.float32)


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("name", TRUE)
def test_true_shapes_on_a_gpu(name: str, page_size: int, dtype: torch.dtype) -> None:
    sizes = {"rank": 512, "rotary": 64, "page_size": page_size, "dtype": dtype}
    for case in (decodes(1, 31, 32, 33, 0, 700, 5000, **sizes, **TRUE[name]), decodes(20000, **sizes, **TRUE[name])):
        tensors = make(case, seed=5)
        on_time = {"launch_pdl": True, "plan_settled": True}
        assert_close(case, decode(case, tensors, plan_for(case), **on_time), oracle(case, tensors))
    case = Case(((1, 1), (70, 70), (40, 1000), (3, 2048)), **sizes, **TRUE[name])  # type: ignore[arg-type]
    tensors = make(case, seed=6)
    assert_close(case, prefill(case, tensors), oracle(case, tensors))
