"""Copies whole pages in all layers with one launch: copy-on-write of a shared partial page.

Layers are separate allocations, so the kernel finds them through a device array of addresses, made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_begin

_BLOCK = 2048  # words of four bytes


@kernel(unaligned=["copies"])
def _copy_pages_kernel(
    addresses,
    copies,
    copies_stride,
    PAGE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    pdl_begin(LAUNCH_PDL)
    pair = copies + tl.program_id(1).to(tl.int64) * copies_stride
    source = tl.load(pair).to(tl.int64)
    target = tl.load(pair + 1).to(tl.int64)
    if source < 0:
        return
    layer = tl.multiple_of(tl.load(addresses + tl.program_id(2)).to(tl.pointer_type(tl.int32)), ALIGNMENT)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    content = tl.load(layer + source * PAGE_WORDS + word, mask=word < PAGE_WORDS)
    tl.store(layer + target * PAGE_WORDS + word, content, mask=word < PAGE_WORDS)


@dataclass(frozen=True)
class PageLayers:
    """Where the layers' pages are. addresses: int64 [num_layers] on the device; kv_pages keeps the memory alive."""

    kv_pages: tuple[torch.Tensor, ...]
    addresses: torch.Tensor
    page_bytes: int  # of one layer


def make_page_layers(kv_pages: Sequence[torch.Tensor]) -> PageLayers:
    """Note the addresses of a store's layers, each [num_pages, ...] contiguous, of one shape, dtype and device.

    Raises ValueError if they are not alike, or a page is no multiple of four bytes.
    """
    first = kv_pages[0]
    page_bytes = first[0].numel() * first.element_size()
    if any(
        layer.shape != first.shape
        or layer.dtype != first.dtype
        or layer.device != first.device
        or not layer.is_contiguous()
        for layer in kv_pages
    ):
        raise ValueError("layers must be contiguous and alike")
    if page_bytes % 4:
        raise ValueError(f"a page of {page_bytes} bytes is no multiple of four bytes")
    addresses = torch.tensor([layer.data_ptr() for layer in kv_pages], dtype=torch.int64, device=first.device)
    return PageLayers(tuple(kv_pages), addresses, page_bytes)


def copy_pages(layers: PageLayers, copies: torch.Tensor, *, launch_pdl: bool = False) -> None:
    """Page copies[i, 1] becomes a copy of page copies[i, 0], in every layer.

    copies: int32 [k, 2], rows contiguous; a source of -1 is padding. No page may be written twice, or read and written.
    launch_pdl: begin while the kernel before drains (programmatic dependent launch); reads nothing before that kernel
    is complete. Raises ValueError if copies are not [k, 2].
    """
    if copies.ndim != 2 or copies.shape[1] != 2 or copies.stride(1) != 1:
        raise ValueError(f"copies {tuple(copies.shape)} are not rows of (source, target)")
    if len(copies) == 0:
        return
    words = layers.page_bytes // 4
    alignment = 16 if all(layer.data_ptr() % 16 == 0 for layer in layers.kv_pages) else 4
    _copy_pages_kernel[(triton.cdiv(words, _BLOCK), len(copies), len(layers.kv_pages))](
        layers.addresses,
        copies,
        copies.stride(0),
        PAGE_WORDS=words,
        BLOCK=_BLOCK,
        ALIGNMENT=alignment,
        LAUNCH_PDL=launch_pdl,
        num_warps=4,
    )
