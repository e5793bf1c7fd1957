"""A token's rank among all tokens of the vocabulary, without a sort: how many logits are larger than its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel

_CHUNK = 4096  # logits of one program


@kernel(unaligned=["tokens", "found"])
def _ranks_kernel(logits, tokens, found, logits_stride, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    m = tl.program_id(1).to(tl.int64)
    row = logits + m * logits_stride
    own = tl.load(row + tl.load(tokens + m)).to(tl.float32)
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(row + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    tl.atomic_add(found + m, tl.sum((x > own).to(tl.int32), 0))  # whole numbers: their sum is the same in every order


def ranks(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """1 for a token than which none is more likely, one more for each that is: [M, V], [M] integers below V -> int32
    [M]. As reference.ranks.

    logits: any floating dtype, rows contiguous, may be strided. token_ids: contiguous. Raises ValueError otherwise.
    """
    if logits.stride(-1) != 1 or not token_ids.is_contiguous() or token_ids.shape != (len(logits),):
        raise ValueError(
            f"expected rows of logits and a token for each without gaps, got {tuple(logits.shape)} and "
            f"{tuple(token_ids.shape)}"
        )
    found = torch.ones(len(logits), dtype=torch.int32, device=logits.device)
    if len(logits):
        grid = triton.cdiv(logits.shape[1], _CHUNK), len(logits)
        _ranks_kernel[grid](
            logits, token_ids, found, logits.stride(0), VOCAB=logits.shape[1], CHUNK=_CHUNK, num_warps=4
        )
    return found
