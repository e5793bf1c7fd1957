"""Regular expressions whose grammar would mean something else: each is named, and no other is refused."""

from __future__ import annotations

import re
from itertools import product

import pytest

from paged_backend.errors import RequestError
from paged_backend.grammar.regex_syntax import misread
from paged_backend.request import parse_sampling

READ = [
    *(
        "",
        "a",
        "^a$",
        "^^a$$",
        "^(a|b)$",
        "(^a|^b)$",
        "^a|b$",
        "(a$|b$)",
        "((^a)b$)",
        "(?:^a)",
        "(?<n>^a)",
        "(^|a)b",
        "a(b|$)",
        "^$",
    ),
    *("\\^a\\$b", "a\\\\", "[$^a]b", "[^a]b", "[]", "[\\]^]b", "a[$]b", "(a)*b{2,3}?", "(", ")a", "a$)", "\\", "["),
    *(
        "\\d\\D\\w\\W\\s\\S",
        "\\n\\r\\t\\f\\v\\a\\e\\0",
        "\\x41\\u0041\\u{41}\\cA",
        "\\.\\-\\/\\ \\é\\\n",
        "[\\b\\d\\-\\x41]",
    ),
    *("(?=a)b", "\\bword\\B", "(a)\\1", "\\p{L}"),  # the library refuses them
]
MISREAD = [
    *[(f"a\\{letter}b", f"the escape '\\{letter}' at position 2 ") for letter in "AZzGKQENRXhgijloqyUTVCFHIJLMOY"],
    *[
        ("[a\\B]", "the escape '\\B' at position 3 "),
        ("[\\Z]", "the escape '\\Z' at position 2 "),
        ("\\01", "the escape '\\0' at position 1 "),
    ],
    *[
        ("a^b", "'^' at position 2 "),
        ("a(^b)", "'^' at position 3 "),
        ("(a|b)^c", "'^' at position 6 "),
        ("x(a|^b)", "'^' at position 5 "),
    ],
    *[
        ("a$b", "'$' at position 2 "),
        ("(a$)b", "'$' at position 3 "),
        ("(a$|b)c", "'$' at position 3 "),
        ("(a|b$)(c)", "'$' at position 5 "),
    ],
    *[
        ("(^a)*", "'^' at position 2 "),
        ("(a$)+", "'$' at position 3 "),
        ("((^a)b){2}", "'^' at position 3 "),
        ("^*a$b", "'$' at position 4 "),
    ],
    *[("(?i)^a", "the inline flag '(?i)' at position 1 "), ("a(?-s:b)", "the inline flag '(?-s:' at position 2 ")],
    *[("[a]^", "'^' at position 4 "), ("\\[^a]", "'^' at position 3 "), ("$?", "'$' at position 1 ")],
]


@pytest.mark.parametrize("regex", READ)
def test_what_is_read_as_it_is_meant_passes(regex: str) -> None:
    assert misread(regex) is None


@pytest.mark.parametrize(("regex", "said"), MISREAD)
def test_what_is_read_otherwise_is_named_with_its_place(regex: str, said: str) -> None:
    found = misread(regex)
    assert found is not None and found.startswith(said) and found.endswith(" is not supported")
    with pytest.raises(RequestError) as caught:
        parse_sampling({"guided_regex": regex})
    assert str(caught.value) == f"guided_regex: {found}"


ANCHORED = [regex for regex in READ if re.fullmatch(r"[ab^$()|?:]+", regex) and regex.count("(") == regex.count(")")]


@pytest.mark.parametrize("regex", ANCHORED)
def test_a_grammar_takes_what_the_expression_matches_wherever_its_anchors_are(regex: str) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(["a", "b", "</s>"], stop_token_ids=[2]))
    compiled = compiler.compile_regex(regex)
    for text in ("".join(chars) for length in range(4) for chars in product("ab", repeat=length)):
        matcher = xgrammar.GrammarMatcher(compiled)
        assert (matcher.accept_string(text) and matcher.is_completed()) == (re.fullmatch(regex, text) is not None), text
