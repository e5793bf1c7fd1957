"""The keys of a rank's best tokens against their twins in plain torch, and what is chosen of several ranks' keys
against the choice from whole logits.
"""

from __future__ import annotations

import pytest
import torch

from paged_kernels.rank_ops import RankOps, Ranks, VocabularyPart, keys_of, tokens_of
from paged_kernels.reference import reference
from paged_kernels.shard_sampling import NO_TOKEN, best_draw_keys, best_keys

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 200


def randn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3).to(DEVICE)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def twin(first: int, count: int) -> RankOps:
    return RankOps(Ranks(), VocabularyPart(first, count, width=count, whole=VOCAB))


def parts(logits: torch.Tensor, size: int) -> list[tuple[int, torch.Tensor]]:
    width = -(-logits.shape[1] // size)
    return [(first, logits[:, first : first + width]) for first in range(0, logits.shape[1], width)]


def test_a_greater_score_has_a_greater_key_and_of_equals_the_smaller_token() -> None:
    scores = torch.tensor([-torch.inf, -3.5, -1e-30, -0.0, 0.0, 1e-30, 2.0, torch.inf])
    keys = keys_of(scores, torch.arange(8))
    assert keys.argsort().tolist() == [0, 1, 2, 4, 3, 5, 6, 7], (
        "zeros of both signs are equal, and token 3 is before token 4"
    )
    assert (keys > NO_TOKEN).all()
    assert tokens_of(keys).tolist() == list(range(8))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_best_of_all_parts_is_the_argmax(size: int, dtype: torch.dtype) -> None:
    logits = randn(6, VOCAB).to(dtype)
    logits[0, 70] = logits[0, 150] = logits[0, 20] = 30.0
    logits[1] = -1.0
    found = torch.stack([best_keys(part, first) for first, part in parts(logits, size)])
    expected = torch.stack([twin(first, part.shape[1]).best_keys(part) for first, part in parts(logits, size)])
    assert torch.equal(found, expected)
    assert tokens_of(found.amax(0)).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_winner_of_all_parts_is_the_one_of_the_race_over_the_whole_vocabulary(size: int) -> None:
    logits, temperature = randn(6, VOCAB), torch.tensor([0.7, 0.0, 1.3, 0.0, 2.0], device=DEVICE)
    seeds, positions, rows = (
        ints(3, -9, 2**62, 0, 5, dtype=torch.int64),
        ints(7, 8, 0, 1, 900, 4),
        ints(4, 0, 1, 2, 3, 4),
    )
    state = temperature, seeds, positions, rows
    expected = reference.choose(logits, temperature, seeds, positions, rows)
    for kernel in (True, False):
        keys = []
        for first, part in parts(logits, size):
            keys.append(
                best_draw_keys(part, first, *state)
                if kernel
                else twin(first, part.shape[1]).best_draw_keys(part, *state)
            )
        assert tokens_of(torch.stack(keys).amax(0)).tolist() == expected.tolist()


def test_a_row_of_padding_has_no_token() -> None:
    keys = best_draw_keys(
        randn(2, 50), 0, torch.ones(1, device=DEVICE), ints(1, dtype=torch.int64), ints(3, 3), ints(-1, 0)
    )
    assert keys[0] == NO_TOKEN and keys[1] > NO_TOKEN


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="without gaps, got"):
        best_keys(randn(8, 4).T, 0)
    with pytest.raises(ValueError, match="one entry per row"):
        best_draw_keys(randn(2, 50), 0, torch.ones(1, device=DEVICE), ints(1, dtype=torch.int64), ints(3, 3), ints(0))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 8])
def test_a_published_vocabulary_is_chosen_from_as_a_whole(size: int) -> None:
    """The same noise by the same instructions: no row differs."""
    from paged_kernels.sampling import argmax, make_sampling_workspace, sample

    logits = randn(256, 128256).bfloat16()
    workspace = make_sampling_workspace(256, 128256, DEVICE)
    temperature = torch.linspace(0.0, 1.5, 256, device=DEVICE)
    seeds, positions, rows = (
        torch.arange(256, device=DEVICE),
        torch.arange(256, device=DEVICE).int(),
        torch.arange(256, device=DEVICE).int(),
    )
    draws = torch.stack(
        [best_draw_keys(part, first, temperature, seeds, positions, rows) for first, part in parts(logits, size)]
    )
    assert torch.equal(tokens_of(draws.amax(0)), sample(logits, temperature, seeds, positions, workspace=workspace))
    likeliest = torch.stack([best_keys(part, first) for first, part in parts(logits, size)])
    assert torch.equal(tokens_of(likeliest.amax(0)), argmax(logits, workspace=workspace))
