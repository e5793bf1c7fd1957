"""Which lone tokens the kernel of lone_attention is for, and that the others get what the reference gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from paged_kernels import lone_attention as lone
from paged_kernels.cuda_ops import CudaOps
from paged_kernels.cuda_rank_ops import CudaRankOps
from paged_kernels.norm_value import Norm
from paged_kernels.rank_ops import Ranks, VocabularyPart
from tests.kernels.test_lone_attention import DEVICE, EPS, Case, expected_of, make


def _cuda_ops(case: Case) -> dict[str, Any]:
    return {
        "num_heads": case.num_q_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "sliding_windows": [case.window or None],
        "vocab_size": 8,
        "max_sequences": 4,
        "max_outputs": 4,
        "kv_dtype": case.dtype,
        "device": DEVICE,
    }


@pytest.mark.parametrize(
    "make_ops",
    [CudaOps, partial(CudaRankOps, Ranks(), VocabularyPart(0, 8, 8, 8))],
    ids=["of one rank alone", "of a rank"],
)
@pytest.mark.parametrize("kind", ["head", "projection", "projection of ranks", "8 bits"])
def test_the_op_is_the_reference_whether_the_kernel_reaches_or_not(
    make_ops: Callable[..., CudaOps], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm of all heads together, perhaps those of other ranks, and a store of 8 bits are left to two launches."""
    case, launches, launch = Case(37, norm=True, window=30), [], lone.lone_attention
    tensors = make(case)
    if kind.startswith("projection"):
        weight = torch.linspace(0.5, 1.5, 64, device=DEVICE)
        norms = Norm(weight, EPS, partial=kind != "projection"), Norm(weight[:32], EPS, partial=kind != "projection")
        tensors = replace(tensors, heads=replace(tensors.heads, qk_norm=norms))
    if kind == "8 bits":
        tensors = replace(tensors, kv_pages=tensors.kv_pages.nan_to_num(0).to(torch.float8_e4m3fn))
    ops = make_ops(**_cuda_ops(replace(case, dtype=tensors.kv_pages.dtype)))
    ops.plan_attention(tensors.at.seq_len, torch.tensor([0, 1], dtype=torch.int32, device=DEVICE), 1, 0)
    launch = lone.lone_attention
    monkeypatch.setattr(
        lone, "lone_attention", lambda *given, **options: launches.append(1) or launch(*given, **options)
    )
    pages = tensors.kv_pages.clone()
    expected = expected_of(case, replace(tensors, qkv=tensors.qkv.clone(), kv_pages=pages))
    options = case.head_dim**-0.5, case.window
    found = ops.lone_attention(tensors.qkv, tensors.heads, tensors.kv_pages, tensors.at, *options)
    # a key whose last bits differ may be rounded to the next number of 8 bits
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 if kind == "8 bits" else 1e-5)
    assert len(launches) == (kind == "head")
