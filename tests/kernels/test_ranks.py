"""Ranks of tokens against their specification: how many logits are larger."""

from __future__ import annotations

import pytest
import torch

from paged_kernels.ranks import ranks
from paged_kernels.reference import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _some(num_rows: int, vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(num_rows, vocab_size, generator=random).mul(4).to(dtype).to(DEVICE)
    token_ids = torch.randint(0, vocab_size, (num_rows,), generator=random).int().to(DEVICE)
    token_ids[0], token_ids[1] = logits[0].argmax(), logits[1].argmin()
    return logits, token_ids


def test_ranks_equal_the_reference_whatever_the_chunks() -> None:
    for vocab_size in (200, 4096, 9001):
        logits, token_ids = _some(3, vocab_size, torch.float32)
        found = ranks(logits, token_ids)
        assert found.tolist() == reference.ranks(logits, token_ids).tolist()
        assert found[:2].tolist() == [1, vocab_size], "the likeliest and the least likely"
        assert found.dtype == torch.int32


def test_equals_share_a_rank_and_nothing_is_below_what_cannot_come() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, -torch.inf]] * 4, device=DEVICE)
    assert ranks(logits, torch.arange(4, device=DEVICE)).tolist() == [3, 1, 1, 4]
    assert ranks(logits[:0], torch.arange(0, device=DEVICE)).tolist() == []


def test_what_does_not_fit_is_refused() -> None:
    logits, token_ids = _some(3, 200, torch.float32)
    for wrong in ((logits.T, token_ids), (logits, token_ids[:2])):
        with pytest.raises(ValueError, match="a token for each"):
            ranks(*wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [32000, 32773, 151936])
def test_ranks_of_large_vocabularies_equal_the_reference(vocab_size: int, dtype: torch.dtype) -> None:
    logits, token_ids = _some(256, vocab_size, dtype)
    assert torch.equal(ranks(logits, token_ids), reference.ranks(logits, token_ids))
    assert torch.equal(ranks(logits[::2], token_ids[::2].contiguous()), reference.ranks(logits[::2], token_ids[::2])), (
        "rows with gaps between them"
    )
