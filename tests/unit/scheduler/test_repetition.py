"""How far a text repeats itself at its end is what the proposer finds there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paged_backend.scheduler import repetition as repetition_module
from paged_backend.scheduler.repetition import LONGEST, SEARCHED, SHORTEST, Repetition, continuation, num_alike
from paged_kernels import reference_rows
from paged_kernels.reference import reference


def ends_alike(tokens: list[int]) -> int:
    """As num_alike, one place after another."""
    best = 0
    for place in range(1, len(tokens)):
        alike = 0
        while alike < min(LONGEST, place) and tokens[place - 1 - alike] == tokens[-1 - alike]:
            alike += 1
        best = max(best, alike)
    return best if best >= SHORTEST else 0


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], 0),
        ([1], 0),
        ([1, 1], 0),
        ([1, 1, 1], 2),
        ([1, 2, 3, 1, 2], 2),
        ([2, 3, 1, 2], 0),
        ([1, 2, 3, 4, 9, 2, 3, 4], 3),
        ([5] * 40, LONGEST),
        (list(range(20)) * 2, LONGEST),
    ],
    ids=str,
)
def test_it_counts_the_tokens_that_come_again(tokens: list[int], expected: int) -> None:
    assert num_alike(np.array(tokens, np.int32)) == expected


@given(st.lists(st.integers(0, 2), max_size=40))
def test_it_is_what_a_search_of_every_place_finds(tokens: list[int]) -> None:
    assert num_alike(np.array(tokens, np.int32)) == ends_alike(tokens)


@given(st.lists(st.lists(st.integers(0, 2), max_size=25), max_size=6))
def test_a_text_that_grows_repeats_itself_as_far_as_a_search_finds(parts: list[list[int]]) -> None:
    repetition, text = Repetition(), np.empty(0, np.int32)
    for part in parts:
        text = np.append(text, np.array(part, np.int32)).astype(np.int32)
        assert repetition.num_alike(text) == num_alike(text)
        assert repetition.num_alike(text) == num_alike(text)  # asked again


@given(st.lists(st.lists(st.integers(0, 2), max_size=25), max_size=6), st.lists(st.integers(0, 30), max_size=60))
def test_a_text_that_is_heard_to_repeat_nothing_repeats_nothing(parts: list[list[int]], later: list[int]) -> None:
    """Whether a look comes before each search or not; `later` grows by one token at a time."""
    repetition, text = Repetition(), np.empty(0, np.int32)
    for part in [*parts, *([token] for token in later)]:
        text = np.append(text, np.array(part, np.int32)).astype(np.int32)
        if len(text) and not repetition.hears(len(text), int(text[-1])):
            assert num_alike(text) == 0
        else:
            assert repetition.num_alike(text) == num_alike(text)


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=4), st.booleans()), max_size=40))
def test_who_is_asked_now_and_then_finds_what_a_search_does(parts: list[tuple[list[int], bool]]) -> None:
    """A step may bring several tokens, and not each is asked about."""
    repetition, text = Repetition(), np.empty(0, np.int32)
    for part, asked in parts:
        text = np.append(text, np.array(part, np.int32)).astype(np.int32)
        if part:
            repetition.hears(len(text), int(text[-1]))
        if asked:
            assert repetition.num_alike(text) == num_alike(text)


def test_a_text_whose_pairs_are_new_is_not_searched() -> None:
    repetition, text = Repetition(), np.arange(30, dtype=np.int32)
    assert repetition.hears(20, 19)  # of the tokens before it nothing was heard
    assert repetition.num_alike(text[:20]) == 0
    assert not any(repetition.hears(end, end - 1) for end in range(21, 31))
    assert repetition.hears(33, 4)  # two were not heard


def test_a_text_that_goes_on_as_before_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    search = repetition_module._last_alike
    monkeypatch.setattr(
        repetition_module, "_last_alike", lambda tokens: (searched.append(len(tokens)), search(tokens))[1]
    )
    repetition, text = Repetition(), np.array(list(range(50)) * 3 + [7], np.int32)
    found = [repetition.num_alike(text[:end]) for end in range(50, len(text) + 1)]
    assert found == [0, 0, *range(2, 8), *[8] * 93, 0]
    assert searched == [52]


def test_a_long_text_that_grows_is_searched_where_it_repeats_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    search = repetition_module._last_alike
    monkeypatch.setattr(
        repetition_module, "_last_alike", lambda tokens: (searched.append(len(tokens)), search(tokens))[1]
    )
    begun = SEARCHED + 100
    text = np.random.default_rng(0).permutation(151_000)[: begun + 200].astype(np.int32)
    text[begun + 50 : begun + 60] = text[begun - 1000 : begun - 990]
    repetition = Repetition()
    for length in range(begun, len(text)):
        found = repetition.num_alike(text[:length])
        assert found == min(max(length - begun - 50, 0), LONGEST) * (begun + 52 <= length <= begun + 60)
    assert 0 < len(searched) < 120


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_the_host_guesses_what_the_proposer_does(tokens: list[int]) -> None:
    guesses = continuation(np.array(tokens, np.int32))
    assert len(guesses) == max(num_alike(np.array(tokens, np.int32)) - 1, 0)
    history = torch.full((1, len(tokens) + len(guesses)), -1, dtype=torch.int32)
    history[0, : len(tokens)] = torch.tensor(tokens)
    one = torch.ones(1, dtype=torch.int32)
    reference.propose_ngram(history, one * len(tokens), one * 0, one * len(guesses))
    assert history[0, len(tokens) :].tolist() == guesses.tolist()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_the_proposer_copies_from_a_place_where_so_many_are_alike(tokens: list[int]) -> None:
    """Where none are it repeats the newest token."""
    history = torch.full((1, len(tokens) + 1), -1, dtype=torch.int32)
    history[0, :-1] = torch.tensor(tokens)
    one = torch.ones(1, dtype=torch.int32)
    reference.propose_ngram(history, one * len(tokens), one * 0, one)
    draft, alike = int(history[0, -1]), num_alike(np.array(tokens, np.int32))
    if not alike:
        assert draft == tokens[-1]
    else:
        places = [place for place in range(alike, len(tokens)) if tokens[place - alike : place] == tokens[-alike:]]
        assert draft == tokens[places[-1]]


def test_what_lies_too_far_back_is_not_seen() -> None:
    text = np.arange(SEARCHED + 10, dtype=np.int32)
    for first in (9, 10, 12):  # before the newest SEARCHED tokens lie the first ten of the text
        tokens = text.copy()
        tokens[-2:] = tokens[first : first + 2]
        assert num_alike(tokens) == (2 if first >= 10 else 0)


def test_its_limits_are_the_proposers() -> None:
    kernels = reference_rows.NGRAM_LONGEST, reference_rows.NGRAM_SHORTEST, reference_rows.NGRAM_SEARCHED
    assert kernels == (LONGEST, SHORTEST, SEARCHED)
