"""Drafts from a row's own text, against a search that goes token by token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from paged_kernels.ngram import propose_ngram, propose_repeated
from paged_kernels.reference import reference
from paged_kernels.reference_rows import NGRAM_LONGEST, NGRAM_SEARCHED, NGRAM_SHORTEST

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROPOSE = pytest.mark.parametrize("propose", [propose_ngram, reference.propose_ngram], ids=["kernel", "reference"])
REPEAT = pytest.mark.parametrize("repeat", [propose_repeated, reference.propose_repeated], ids=["kernel", "reference"])
OTHERS = 7777  # drafts that somebody else made


def naive(tokens: list[int], count: int, least: int = NGRAM_SHORTEST) -> list[int]:
    """What follows the last place before which most tokens are those at the end, `least` or more."""
    best, found = least - 1, None
    for place in range(1, len(tokens)):
        alike = 0
        while alike < min(NGRAM_LONGEST, place) and tokens[place - 1 - alike] == tokens[-1 - alike]:
            alike += 1
        if alike >= max(best, least):
            best, found = alike, place
    drafts: list[int] = []
    for _ in range(count):
        otherwise = tokens[-1] if least == NGRAM_SHORTEST else OTHERS
        drafts.append(otherwise if found is None else (tokens + drafts)[found + len(drafts)])
    return drafts


def proposed(propose: Callable[..., None], texts: list[list[int]], counts: list[int]) -> list[list[int]]:
    width = max(map(len, texts)) + 20
    history = torch.full((len(texts) + 2, width), OTHERS, dtype=torch.int32)
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
        assert line[: len(text)] == text and set(line[len(text) + count :]) == {OTHERS}, (
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


@REPEAT
def test_a_text_that_repeats_itself_is_gone_on_with_and_of_others_the_drafts_stay(repeat: Callable[..., None]) -> None:
    random = np.random.default_rng(2)
    texts = [random.integers(0, values, length).tolist() for values in (2, 3) for length in (1, 7, 9, 50, 400)]
    told = random.integers(0, 50, 30).tolist()
    texts += [told + told[:length] for length in range(NGRAM_LONGEST - 1, NGRAM_LONGEST + 3)]
    counts = random.integers(1, 16, len(texts)).tolist()
    expected = [naive(text, n, NGRAM_LONGEST) for text, n in zip(texts, counts, strict=True)]
    assert proposed(repeat, texts, counts) == expected
    assert [drafts[0] == OTHERS for drafts in expected[-4:]] == [True, False, False, False]


@REPEAT
def test_a_circle_goes_round(repeat: Callable[..., None]) -> None:
    assert proposed(repeat, [[4] * (NGRAM_LONGEST + 1), [4] * NGRAM_LONGEST], [3, 2]) == [[4] * 3, [OTHERS] * 2]
