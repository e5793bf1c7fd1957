"""Patterns of JSON schemas as grammars: they take what Python's `re` takes, and what comes out of them is JSON that
validates.
"""

from __future__ import annotations

import ipaddress
import json
import random
import re
from collections.abc import Callable
from datetime import date, datetime, time
from functools import cache
from itertools import product
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import jsonschema
import numpy as np
import pytest

from paged_backend.grammar.compiler_process import compile_here
from paged_backend.grammar.options import Grammar
from paged_backend.grammar.pattern_grammar import PatternError, pattern_grammar
from paged_backend.grammar.string_formats import PATTERNS
from paged_backend.grammar.vocabulary import Vocabulary, bits

xgrammar = pytest.importorskip("xgrammar")

TEXTS = ["".join(chars) for length in range(6) for chars in product("abc", repeat=length)]
KNOWN = [  # that the library's own converter gets wrong, or might
    *(
        "^a+(bc+)?$",
        "(((a|[ab])|[^a])|(a){1,2})",
        "((c)+(a)+)?",
        "(((c|a)|(c){1,3})|((c){1,3}){1,3})",
        "([^a]+c+)?",
        "^(a+(bc+)?)?$",
    ),
    *(
        "(a*)*",
        "((a|b)*c?)*",
        "(|a)+b",
        "a||b",
        "()",
        "(a{0})b",
        "^",
        "$",
        "^$",
        "(^a|b)$",
        "(?P<n>a)(?:b)?",
        "a*?b+?",
        "a{2}",
        "[a-b]{1,}",
        "[^\\Wb]",
    ),
]


def drawn(randomly: random.Random, deep: int) -> str:
    kind = randomly.random()
    if deep == 0 or kind < 0.3:
        atom = randomly.choice(["a", "b", "c", "[ab]", "[^a]"])
        return atom + randomly.choice(["", "", "?", "*", "+"])
    if kind < 0.55:
        return drawn(randomly, deep - 1) + drawn(randomly, deep - 1)
    if kind < 0.7:
        return f"({drawn(randomly, deep - 1)}|{drawn(randomly, deep - 1)})"
    return f"(?:{drawn(randomly, deep - 1)}){randomly.choice(['?', '*', '+', '{0,1}', '{2}', '{1,2}', '{1,}', '*?'])}"


def test_a_grammar_takes_what_the_pattern_matches_and_nothing_else() -> None:
    compiler = xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo(["a", "b", "c", "</s>"], stop_token_ids=[3]), max_threads=1, cache_enabled=False
    )
    randomly = random.Random(1)
    for pattern in [*KNOWN, *(drawn(randomly, 3) for _ in range(40))]:
        compiled = compiler.compile_grammar(f"root ::= {pattern_grammar(pattern)}")
        for text in TEXTS:
            matcher = xgrammar.GrammarMatcher(compiled)
            assert (matcher.accept_string(text) and matcher.is_completed()) == (
                re.fullmatch(pattern, text) is not None
            ), (pattern, text)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("a(?=b)", "the lookahead '(?=' at position 2"),
        ("(?!b)a", "the lookahead '(?!' at position 1"),
        ("(?<=b)a", "the lookbehind '(?<=' at position 1"),
        ("(?i)a", "the inline flag '(?i)' at position 1"),
        ("(?i:a)", "the inline flag '(?i:' at position 1"),
        ("(?>a)", "the group '(?>' at position 1"),
        ("(a)\\1", "the escape '\\1' at position 4"),
        ("\\bword", "the escape '\\b' at position 1"),
        ("\\p{L}", "the escape '\\p' at position 1"),
        ("\\ud800", "the escape '\\ud800' at position 1"),
        ("(a", "a '(' without its ')' at position 1"),
        ("a)", "a ')' without its '(' at position 2"),
        ("[a", "a '[' without its ']' at position 1"),
        ("[]a]", "a set that begins with ']'"),
        ("[z-a]", "a range whose ends"),
        ("[\\d-z]", "a range whose ends"),
        ("a**", "'*' after a repetition at position 3"),
        ("+a", "'+' without anything before it at position 1"),
        ("a{,3}", "'{' without numbers"),
        ("a{3,2}", "the repetition '{3,2}' at position 2"),
        ("a{99999}", "the repetition '{99999}'"),
        ("\\", "a '\\' at the end"),
        ("(" * 50_000, "it is nested too deeply"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_not_supported_is_named_with_its_place(pattern: str, said: str) -> None:
    with pytest.raises(PatternError) as caught:
        pattern_grammar(pattern)
    assert str(caught.value).startswith(f"pattern: {said}")


def test_classes_say_only_what_every_dialect_counts_in() -> None:
    """ECMAScript's classes are ASCII's but for spaces, Python's are Unicode's."""
    for letter in "dDwWsS":
        for name, own in ((f"\\{letter}", f"\\{letter}"), (f"[^\\{letter}]", f"[^\\{letter}]")):
            ranges = re.findall(
                r"\\U([0-9a-f]{8})(?:-\\U([0-9a-f]{8}))?",
                re.sub(r"(?<![\\\w])([0-9A-Za-z])(?=[-\]\\])", "", pattern_grammar(name)),
            )
            for low, high in ranges:
                chars = "".join(map(chr, range(int(low, 16), int(high or low, 16) + 1)))
                assert re.sub(own, "", chars) == "", name
                assert re.sub(own, "", chars, flags=re.ASCII).strip() == "", name


# ---- through the library


def vocabulary() -> Vocabulary:
    """A token a byte."""
    spelled = [bytes([byte]) for byte in range(256)]
    tokens = xgrammar.TokenizerInfo(spelled, xgrammar.VocabType.RAW, vocab_size=256, stop_token_ids=[])
    return Vocabulary(xgrammar, tokens, 256, spelled, [], bits([*range(32, 256), 10], 256))


BYTES = vocabulary()


@cache
def compiled(schema: str) -> Any:
    verdict = compile_here(Grammar("guided_json", "json", schema, compact=True), BYTES)
    assert not verdict.refusal, verdict.refusal
    return xgrammar.CompiledGrammar.deserialize_json(verdict.serialised, BYTES.tokens)


def sample(schema: Any, randomly: random.Random, longest: int = 400) -> str | None:
    """An answer, each of whose bytes is any of those that may come; None: it has no end within `longest` bytes."""
    matcher = xgrammar.GrammarMatcher(compiled(json.dumps(schema)))
    mask, text = np.zeros((1, 8), np.int32), bytearray()
    while len(text) < longest:
        matcher.fill_next_token_bitmask(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        allowed = allowed[(allowed < 128) & (allowed != 127)]
        if matcher.is_completed() and (not len(allowed) or randomly.random() < 0.3):
            return text.decode()
        byte = int(randomly.choice(allowed.tolist()))
        if byte in b"0123456789" and randomly.random() < 0.5:
            byte = next((digit for digit in b"9653" if digit in allowed), byte)  # where numbers are too large
        assert matcher.accept_token(byte)
        text.append(byte)
    return None


def rfc3339(text: str) -> None:
    day, clock = text.split("T")
    date.fromisoformat(day)
    assert time.fromisoformat(re.sub(r"Z$", "+00:00", re.sub(r"\.\d+", "", clock))).tzinfo is not None


def as_email(text: str) -> None:
    local, host = text.split("@")
    assert len(local) <= 64 and ".." not in local and not local.startswith(".") and not local.endswith(".")
    as_host(host)


def as_host(text: str) -> None:
    assert len(text) <= 253 and all(
        re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)", label) for label in text.split(".")
    ), text


JUDGES: dict[str, Callable[[str], Any]] = {
    "date": date.fromisoformat,
    "time": lambda text: rfc3339(f"2024-01-01T{text}"),
    "date-time": rfc3339,
    "duration": lambda text: (
        re.fullmatch(r"P(?=.)(\d+Y)?(\d+M)?(\d+W)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?", text) or pytest.fail(text)
    ),
    "email": as_email,
    "hostname": as_host,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uuid": UUID,
    "uri": lambda text: urlsplit(text).scheme or pytest.fail(text),
    "uri-reference": urlsplit,
    "uri-template": lambda text: text.count("{") == text.count("}") or pytest.fail(text),
    "json-pointer": lambda text: text == "" or text.startswith("/") or pytest.fail(text),
    "relative-json-pointer": lambda text: re.match(r"(0|[1-9]\d*)(#$|/|$)", text) or pytest.fail(text),
}
assert JUDGES.keys() == PATTERNS.keys()
MEMBERS = {
    "date": ["2024-02-29", "2000-02-29", "1999-12-31"],
    "time": ["23:59:59Z", "00:00:00.5+01:00"],
    "date-time": ["2024-02-29T12:00:00Z"],
    "duration": ["P1Y2M3DT4H5M6S", "PT1M", "P4W"],
    "email": ["a.b+c@example.org", "x@localhost"],
    "hostname": ["a.b.example.org", "localhost"],
    "ipv4": ["0.0.0.0", "255.250.199.9"],
    "ipv6": ["::1", "::", "2001:db8::8a2e:370:7334", "1:2:3:4:5:6:7:8", "::ffff:10.0.0.1"],
    "uuid": ["123e4567-e89b-12d3-a456-426614174000"],
    "uri": ["https://user@example.org:8080/a/b?c=d#e", "mailto:a@b.c", "urn:isbn:0451450523", "http://[::1]/"],
    "uri-reference": ["/a/b", "../c?d", "#e", "", "https://example.org/"],
    "uri-template": ["/a/{id}{?x,y*}"],
    "json-pointer": ["", "/a~1b/0"],
    "relative-json-pointer": ["0", "1/a", "2#"],
}
OTHERS = {
    "date": ["2023-02-29", "1900-02-29", "2024-04-31", "0000-01-01", "2024-13-01"],
    "time": ["23:59:60Z", "24:00:00Z", "12:00:00"],
    "ipv4": ["5.086.088.93", "256.1.1.1", "1.2.3"],
    "ipv6": [":::", "1::2::3", "12345::"],
    "email": ["a..b@c.d", "a@", "@b"],
    "hostname": ["-a.b", "a..b", "1.2"],
    "duration": ["P", "PT", "P1", "P1YT"],
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_format_is_enforced(name: str) -> None:
    randomly, schema, found = random.Random(3), {"type": "string", "format": name}, 0
    for _ in range(12):
        text = sample(schema, randomly)
        if text is not None:
            JUDGES[name](json.loads(text))
            found += 1
    assert found > 3
    for text in MEMBERS[name]:
        assert re.fullmatch(PATTERNS[name], text), text
        JUDGES[name](text)
    assert not any(re.fullmatch(PATTERNS[name], text) for text in OTHERS.get(name, ()))


SCHEMAS: list[Any] = [
    {"type": "string", "pattern": "^a+(bc+)?$"},
    {"type": "string", "pattern": "^\\d+\\.\\d+\\.\\d+(-[0-9A-Za-z.]+)?$"},
    {"type": "string", "pattern": '^["\\\\]{2,5}$'},
    {"type": "string", "pattern": "^\t[a-z]\n\\x00\\x1f$"},
    {"type": "string", "pattern": "^.{3}[^a-z]\\S\\W\\D$"},
    {"type": ["string", "null"], "pattern": "^(paged1end|x)$"},
    {"const": '"p" "a" "g" "e" "d" "0" Regex("^paged0end$", json_string=true)'},
    {
        "type": "object",
        "patternProperties": {'^"a+(bc+)?$': {"type": "string", "pattern": "^x\ty$"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    {
        "type": "object",
        "propertyNames": {"pattern": "^a+(bc+)?\\n$"},
        "additionalProperties": {"const": 1},
        "maxProperties": 2,
    },
    {"type": "object", "propertyNames": {"format": "ipv4"}, "additionalProperties": {"const": 1}, "maxProperties": 2},
    {
        "type": "array",
        "items": {"$ref": "#/$defs/a"},
        "maxItems": 3,
        "$defs": {"a": {"type": "string", "pattern": "^(a|b{1,3}|[ab])$"}},
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_every_answer_validates(schema: Any) -> None:
    randomly, found = random.Random(4), 0
    for _ in range(12):
        text = sample(schema, randomly)
        if text is not None:
            value = json.loads(text)
            jsonschema.validate(
                value, schema, jsonschema.Draft202012Validator, format_checker=jsonschema.FormatChecker(["ipv4"])
            )
            found += 1
    assert found > 3


def test_a_date_is_one_that_datetime_knows() -> None:
    assert datetime.fromisoformat("2024-02-29") and re.fullmatch(PATTERNS["date"], "2024-02-29")
    everyday = [date.fromordinal(ordinal).isoformat() for ordinal in range(1, date(2025, 1, 1).toordinal(), 97)]
    assert all(re.fullmatch(PATTERNS["date"], day) for day in everyday)
