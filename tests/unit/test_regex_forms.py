"""Regular expressions that the grammar library would take for others."""

from __future__ import annotations

import pytest

from paged_backend.errors import RequestError
from paged_backend.regex_forms import misread
from paged_backend.request import parse_sampling


@pytest.mark.parametrize(
    "regex", ["", "^a$", "(yes|no), [a-z]{3,9}!", r"\d+\.\w*", "(^a|b$)", "(?:^a)|^b$|c", "[$^]", "[^a^$]x", r"\$\^", r"[\]$]", "[]$^]a", "a\nb"]
)
def test_what_it_reads_rightly_is_let_through(regex: str) -> None:
    assert misread(regex) is None


@pytest.mark.parametrize(
    ("regex", "reason"),
    [
        (r"\Ayes\Z", r"'\A' is not supported"),
        (r"a\z", r"'\z' is not supported"),
        ("a$b", "'$' is supported at the end only"),
        ("a^b", "'^' is supported at the beginning only"),
        (r"(a$)b|\Qx", r"'\Q' is not supported"),
    ],
)
def test_what_it_would_read_as_something_else_is_refused_by_name(regex: str, reason: str) -> None:
    assert misread(regex) == reason
    with pytest.raises(RequestError) as caught:
        parse_sampling({"guided_regex": regex})
    assert str(caught.value) == f"guided_regex: {reason}"
