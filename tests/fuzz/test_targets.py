"""Every kept input does no harm, nor do a few hundred drawn ones; long runs are by hand (`python -m tests.fuzz`)."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.corpus import read_corpus
from tests.fuzz.targets import TARGETS

NAMES = pytest.mark.parametrize("name", TARGETS)


@NAMES
def test_the_corpus_does_no_harm(name: str) -> None:
    corpus = read_corpus(name)
    assert corpus, "an empty corpus proves nothing"
    for _, content in corpus:
        TARGETS[name](content)


@pytest.mark.one_in(2)
@NAMES
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=120), seed=st.integers(0, 10**6))
def test_nor_do_changed_pieces_of_it(name: str, content: bytes, seed: int) -> None:
    chance = random.Random(seed)
    known = chance.choice(read_corpus(name))[1]
    cut = chance.randrange(len(known) + 1)
    TARGETS[name](content)
    TARGETS[name](known[:cut] + content[: chance.randint(0, 6)] + known[cut:])
