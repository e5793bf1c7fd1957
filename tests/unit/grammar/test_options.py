"""The form of an answer, as a request asks for it: which spellings mean the same, and which requests contradict
themselves.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from paged_backend.errors import RequestError
from paged_backend.grammar.options import Grammar
from paged_backend.request import SamplingParams, parse_sampling

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}
EVERY_KEY = dict.fromkeys(
    (
        "json",
        "regex",
        "choice",
        "grammar",
        "json_object",
        "disable_fallback",
        "disable_any_whitespace",
        "whitespace_pattern",
        "structural_tag",
        "_backend",
    )
) | {
    "disable_additional_properties": False,
    "_backend_was_auto": False,
    "backend_was_auto": False,
}  # as a dataclass of vLLM's that is sent whole
TEXT = '{"type":"object","properties":{"b":{"type":"integer"},"a":{"type":"null"}}}'


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"guided_json": SCHEMA}, Grammar("guided_json", "json", TEXT)),
        ({"guided_json": TEXT}, Grammar("guided_json", "json", TEXT)),
        ({"guided_json": True}, Grammar("guided_json", "json", "true")),
        ({"guided_regex": "a+"}, Grammar("guided_regex", "regex", "a+")),
        (
            {"guided_choice": ["yes", 'a "b"\\\n']},
            Grammar("guided_choice", "grammar", 'root ::= "yes" | "a \\"b\\"\\\\\\U0000000a"'),
        ),
        ({"guided_choice": "yes"}, Grammar("guided_choice", "grammar", 'root ::= "yes"')),
        ({"guided_grammar": 'root ::= "a"'}, Grammar("guided_grammar", "grammar", 'root ::= "a"')),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar("structured_outputs.json", "json", TEXT)),
        ({"structured_outputs": '{"regex": "a+"}'}, Grammar("structured_outputs.regex", "regex", "a+")),
        ({"structured_outputs": {"choice": "yes"}}, Grammar("structured_outputs.choice", "grammar", 'root ::= "yes"')),
        ({"structured_outputs": {"grammar": "x"}}, Grammar("structured_outputs.grammar", "grammar", "x")),
        (
            {"structured_outputs": {"json_object": "true", "disable_any_whitespace": True, "disable_fallback": True}},
            Grammar("structured_outputs.json_object", "json", '{"type":"object"}', compact=True),
        ),
        ({"structured_outputs": {}}, None),
        ({"structured_outputs": EVERY_KEY | {"json": TEXT}}, Grammar("structured_outputs.json", "json", TEXT)),
        (
            {"structured_outputs": msgspec.json.encode(EVERY_KEY | {"json": SCHEMA}).decode()},
            Grammar("structured_outputs.json", "json", TEXT),
        ),
        (
            {"guided_decoding": msgspec.json.encode(EVERY_KEY | {"json": TEXT}).decode()},
            Grammar("structured_outputs.json", "json", TEXT),
        ),
        ({"structured_outputs": EVERY_KEY}, None),
        ({"guided_decoding": None}, None),
        ({"guided_json": None, "structured_outputs": {"json": None}}, None),
    ],
)
def test_each_key_names_one_grammar(options: dict[str, Any], expected: Grammar | None) -> None:
    sampling = parse_sampling(options)
    assert sampling.grammar == expected
    assert sampling.guided == (expected is not None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guided_json": "{}", "guided_regex": "a"}, "guided_json and guided_regex: "),
        (
            {"guided_choice": ["a"], "structured_outputs": {"grammar": "x"}},
            "guided_choice and structured_outputs.grammar: ",
        ),
        (
            {"structured_outputs": {"json": "{}", "json_object": True}},
            "structured_outputs.json and structured_outputs.json_object: ",
        ),
        ({"guided_choice": []}, "guided_choice: "),
        ({"guided_choice": ["a", ""]}, "guided_choice: "),
        ({"guided_regex": ""}, "guided_regex: "),
        ({"guided_regex": 3}, "guided_regex: "),
        ({"guided_json": "x" * 200_000}, "guided_json: "),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs: .*regexp"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs: 'whitespace_pattern' is not supported",
        ),
        (
            {"guided_decoding": {"structural_tag": "{}", "regex": "a"}},
            "structured_outputs.regex and structured_outputs.structural_tag: ",
        ),
        (
            {"guided_decoding": {"regex": "a"}, "structured_outputs": {"regex": "a"}},
            "guided_decoding and structured_outputs: ",
        ),
        ({"guided_decoding": "{"}, "guided_decoding: not valid JSON"),
        ({"structured_outputs": "{"}, "structured_outputs: not valid JSON"),
        ({"structured_outputs": "[" * 100_000}, "structured_outputs: "),
        ({"structured_outputs": [1]}, "structured_outputs: "),
        (
            {"guided_choice": ["x" * 100_000, "y" * 100_000]},
            "guided_choice: 200016 characters as a grammar, at most 131072",
        ),
    ],
)
def test_a_contradiction_or_a_wrong_type_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        parse_sampling(options)


def test_a_request_without_a_form_has_no_grammar() -> None:
    assert SamplingParams().grammar is None
