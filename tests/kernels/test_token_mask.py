"""Sets of allowed tokens: the kernel against the reference, the reference against sets of Python."""

from __future__ import annotations

import pytest
import torch

from paged_kernels.logit_edits import apply_token_mask
from paged_kernels.reference import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def case(vocab: int, num_masks: int = 5, spare_words: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, masks and rows: of masks, full and empty ones among them."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(6, vocab, generator=generator)
    words = -(-vocab // 32) + spare_words
    masks = torch.randint(-(2**31), 2**31, (num_masks, words), generator=generator).int()
    masks[0], masks[1] = -1, 0
    return logits.to(DEVICE), masks.to(DEVICE), torch.tensor([3, -1, 0, 1, 3, 4], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000, 3100])
def test_the_reference_bans_what_is_not_in_a_rows_set(vocab: int) -> None:
    logits, masks, rows = case(vocab)
    out = reference.apply_token_mask(logits, masks, rows)
    for m, row in enumerate(rows.tolist()):
        for token in range(vocab):
            allowed = row < 0 or masks[row, token // 32].item() >> (token % 32) & 1
            assert out[m, token] == (logits[m, token] if allowed else -torch.inf)


def test_the_reference_takes_many_rows_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case(100)
    whole = reference.apply_token_mask(*arguments)
    monkeypatch.setattr("paged_kernels.reference_logits.SAMPLING_BYTES", 1)  # a row at a time
    assert torch.equal(reference.apply_token_mask(*arguments), whole)


@pytest.mark.parametrize("spare_words", [0, 3])
@pytest.mark.parametrize("vocab", [1, 33, 1024, 2100])
def test_the_kernel_bans_what_the_reference_bans_and_changes_nothing_else(vocab: int, spare_words: int) -> None:
    logits, masks, rows = case(vocab, spare_words=spare_words)
    expected = reference.apply_token_mask(logits, masks, rows)
    assert apply_token_mask(logits, masks, rows) is logits
    assert torch.equal(logits, expected)


def test_rows_of_a_wider_tensor_are_masked_in_place() -> None:
    logits, masks, rows = case(70)
    wide = torch.full((6, 80), 7.0, device=DEVICE)
    wide[:, :70] = logits
    apply_token_mask(wide[:, :70], masks, rows)
    assert torch.equal(wide[:, :70], reference.apply_token_mask(logits, masks, rows))
    assert (wide[:, 70:] == 7).all()


def test_refuses_what_does_not_fit() -> None:
    logits, masks, rows = case(70)
    with pytest.raises(ValueError, match="masks"):
        apply_token_mask(logits, masks[:, :2], rows)
    with pytest.raises(ValueError, match="masks"):
        apply_token_mask(logits, masks.long(), rows)
    with pytest.raises(ValueError, match="float32"):
        apply_token_mask(logits.half(), masks, rows)


@pytest.mark.gpu
def test_a_large_vocabulary_is_masked_like_the_references() -> None:
    vocab = 128_256
    logits = torch.randn(256, vocab, device=DEVICE)
    masks = torch.randint(-(2**31), 2**31, (256, -(-vocab // 32)), device=DEVICE).int()
    rows = torch.randperm(256, device=DEVICE).int()
    rows[::3] = -1
    expected = reference.apply_token_mask(logits, masks, rows)
    assert torch.equal(apply_token_mask(logits, masks, rows, launch_pdl=True), expected)
