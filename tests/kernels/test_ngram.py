"""Drafts from a row's own text, against a search that goes token by token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from paged_kernels.ngram import propose_ngram
from paged_kernels.reference import reference
from paged_kernels.reference_rows import NGRAM_LONGEST, NGRAM_SEARCHED, NGRAM_SHORTEST

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROPOSE = pytest.mark.parametrize("propose", [propose_ngram, reference.propose_ngram], ids=["kernel", "reference"])


def naive(tokens: list[int], count: int) -> list[int]:
    """What follows the last place before which most tokens are those at the end."""
    best, found = NGRAM_SHORTEST - 1, None
    for place in range(1, len(tokens)):
        alike = 0
        while alike < min(NGRAM_LONGEST, place) and tokens[place - 1 - alike] == tokens[-1 - alike]:
            alike += 1
        if alike >= max(best, NGRAM_SHORTEST):
            best, found = alike, place
    drafts: list[int] = []
    for _ in range(count):
        drafts.append(tokens[-1] if found is None else (tokens + drafts)[found + len(drafts)])
    return drafts


def proposed(propose: Callable[..., None], texts: list[list[int]], counts: list[int]) -> list[list[int]]:
    width = max(map(len, texts)) + 20
    history = torch.full((len(texts) + 2, width), 7777, dtype=torch.int32)
    rows = np.random.default_rng(0).permutation(len(texts) + 2)[: len(texts)].tolist()
    lengths = torch.zeros(len(texts) + 2, dtype=torch.int32)
    for row, text in zip(rows, texts, strict=True):
        history[row, : len(text)], lengths[row] = torch.tensor(text, dtype=torch.int32), len(text)
    history = history.to(DEVICE)
    ints = [torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (rows, counts)]
    propose(history, lengths.to(DEVICE), *ints)
    found = []
    for row, text, count in zip(rows, texts, counts, strict=True):
        line = history[row].tolist()
        assert line[: len(text)] == text and set(line[len(text) + count :]) == {7777}, (
            "more than the drafts was written"
        )
        found.append(line[len(text) : len(text) + count])
    return found


@PROPOSE
def test_the_drafts_are_what_followed_the_longest_likeness(propose: Callable[..., None]) -> None:
    random = np.random.default_rng(1)
    texts = [random.integers(0, values, length).tolist() for values in (2, 3, 9) for length in (1, 2, 3, 9, 50, 700)]
    counts = random.integers(1, 16, len(texts)).tolist()
    assert proposed(propose, texts, counts) == [naive(text, n) for text, n in zip(texts, counts, strict=True)]


@PROPOSE
@pytest.mark.parametrize(
    ("text", "drafts"),
    [
        ([1, 2, 3, 4, 5, 9, 9, 1, 2, 3], [4, 5, 9, 9]),  # a beginning comes again
        ([5, 1, 2, 6, 1, 2, 7, 1, 2], [7, 1, 2, 7]),  # of equals the last; beyond the end it begins again
        ([8, 1, 2, 6, 9, 1, 2, 7, 8, 1, 2], [6, 9, 1, 2]),  # more alike is better than later
        ([1, 2, 3, 4], [4, 4, 4, 4]),  # nothing comes again
        ([3, 1, 4, 1], [1, 1, 1, 1]),  # one token alike is too few
        ([6], [6, 6, 6, 6]),
        ([4, 4, 4], [4, 4, 4, 4]),
    ],
    ids=["copy", "last", "longest", "none", "one", "single", "circle"],
)
def test_it_proposes_as_one_would(propose: Callable[..., None], text: list[int], drafts: list[int]) -> None:
    assert proposed(propose, [text], [4]) == [drafts]


@PROPOSE
def test_what_lies_farther_back_is_not_found(propose: Callable[..., None]) -> None:
    """Both of two tokens must be among those that are searched."""
    near = list(range(10, 10 + NGRAM_SEARCHED - 4))
    assert proposed(propose, [[1, 2, 3, *near, 1, 2]], [2]) == [[2, 2]]
    assert proposed(propose, [[1, 2, 3, *near[1:], 1, 2]], [2]) == [[3, near[1]]]
