"""The text of a tool that takes plain text, read from JSON that arrives in pieces."""

from __future__ import annotations

import json

import pytest

from paged_client.openai.plain_text import PlainText, arguments_of, text_of

CASES = {
    "plain": ('{"input": "a b"}', "a b"),
    "empty": ('{"input": ""}', ""),
    "escapes": (json.dumps({"input": 'a\n"\\\t\u00fc\U0001f600/'}), 'a\n"\\\t\u00fc\U0001f600/'),
    "slash": (r'{ "input" : "a\/b" }', "a/b"),
    "new line as it is": ('{"input": "a\nb"}', "a\nb"),
    "no escape": (r'{"input": "a\qb\u12zc"}', r"a\qb\u12zc"),
    "half a character": (r'{"input": "a\ud83db\ude00"}', "a?b?"),
    "two halves that are no pair": (r'{"input": "\ud83d\ud83d\ude00"}', "?\U0001f600"),
    "behind it": ('{"input": "a", "more": "b"}', "a"),
    "cut off": (r'{"input": "a\u00', "a"),
    "another argument": ('{"patch": "a"}', '{"patch": "a"}'),
    "no object": ('"a"', '"a"'),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_a_text_is_the_same_however_it_is_cut(case: str) -> None:
    arguments, text = CASES[case]
    assert text_of(arguments) == text
    for size in (1, 2, 5):
        reading = PlainText()
        pieces = [reading.feed(arguments[at : at + size]) for at in range(0, len(arguments), size)]
        assert "".join([*pieces, reading.finish()]) == text


def test_a_text_comes_while_it_is_written() -> None:
    reading = PlainText()
    assert [reading.feed(piece) for piece in ('{"inp', 'ut": "a', "b\\", 'nc"', "}")] == ["", "a", "b", "\nc", ""]


@pytest.mark.parametrize("text", ["", 'a\n"\\', "\U0001f600"])
def test_a_text_that_goes_back_is_the_one_that_came(text: str) -> None:
    assert text_of(arguments_of(text)) == text
