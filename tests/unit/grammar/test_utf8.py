"""The table of UTF-8 against Python's decoder."""

from __future__ import annotations

import random

import pytest

from paged_backend.grammar.utf8 import CLEAN, STATES, advance

ENDINGS = [b"", *(bytes([first]) + b"\x80" * more for first in (0x80, 0x90, 0xA0) for more in range(3))]


def fits(text: bytes) -> bool:
    """With some bytes after it, Python takes it for UTF-8. (Its incremental decoder waits for the third byte before it
    judges the second.)
    """
    return any(decodes(text + ending) for ending in ENDINGS)


def decodes(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_every_pair_of_bytes_is_judged_as_python_judges_it() -> None:
    for first in range(256):
        for second in range(256):
            text = bytes([first, second])
            assert (advance(CLEAN, text) is not None) == fits(text), text


@pytest.mark.parametrize("seed", range(4))
def test_longer_texts_are_judged_as_python_judges_them(seed: int) -> None:
    randomly = random.Random(seed)
    edges = [
        0x00,
        0x41,
        0x7F,
        0x80,
        0x8F,
        0x90,
        0x9F,
        0xA0,
        0xBF,
        0xC1,
        0xC2,
        0xDF,
        0xE0,
        0xE1,
        0xEC,
        0xED,
        0xEE,
        0xEF,
        0xF0,
        0xF1,
        0xF3,
        0xF4,
        0xF5,
        0xFF,
    ]
    verdicts = set()
    for _ in range(5000):
        text = (
            "a\u0080\ud7ff\ue000é日😀\U0010ffff".encode()
            if randomly.random() < 0.01
            else bytes(randomly.choices(edges, k=randomly.randint(3, 5)))
        )
        judged = advance(CLEAN, text) is not None
        assert judged == fits(text), text
        verdicts.add(judged)
    assert verdicts == {True, False}


def test_cut_anywhere_a_text_leads_to_the_same_state() -> None:
    text = "é\ud7ff日本😀\U0010ffff\u0800\U00010000".encode()
    states = set()
    for cut in range(len(text) + 1):
        middle = advance(CLEAN, text[:cut])
        assert middle is not None and advance(middle, text[cut:]) == CLEAN
        states.add(middle)
    assert states == set(STATES) - {3}  # no character here begins with F1, F2 or F3
