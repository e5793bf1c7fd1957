"""What both attention kernels take for granted of their tensors."""

from __future__ import annotations

import torch


def check_layout(q: torch.Tensor, kv_pages: torch.Tensor, page_table: torch.Tensor, out: torch.Tensor) -> None:
    """q, out: [T, query heads, head_dim]; kv_pages: [pages, 2, KV heads, page_size, head_dim]; page_table: int32
    [sequences, pages].

    Raises:
        ValueError: they lie in memory as no kernel reads them, or are of two types.
    """
    page_size, head_dim = kv_pages.shape[3:]
    if page_size & (page_size - 1):
        raise ValueError(f"page_size {page_size} is no power of two")
    if (
        kv_pages.stride()[3:] != (head_dim, 1)
        or q.stride()[1:] != (head_dim, 1)
        or out.stride()[1:] != (head_dim, 1)
        or page_table.stride(1) != 1
    ):
        raise ValueError("heads and pages must be contiguous")
    if q.dtype != out.dtype:
        raise ValueError(f"q {q.dtype} and out {out.dtype} must have one dtype")
