"""Which schemas a grammar enforces wholly. What is accepted here is generated from and validated in
tests/properties/test_structured_properties.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from paged_backend.grammar.json_schema import MAX_DEPTH, unenforced

TAGGED = {"type": "object", "required": ["kind"]}
ACCEPTED: list[Any] = [
    {},
    True,
    {"type": "string", "title": "T", "description": "d", "default": "x", "$comment": "c"},
    {"const": "a", "type": "string"},
    {"enum": ["a", "b", None], "type": ["string", "null"]},
    {"enum": [1, 2.0], "type": "integer"},
    {"anyOf": [{"type": "object"}, {"properties": {}}], "type": "object"},
    {"type": ["integer", "string"], "minimum": 3, "maxLength": 2},
    {"type": "integer", "multipleOf": 5},
    {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "null"}}},
    {"properties": {"a": {"$ref": "#"}}, "additionalProperties": False},
    {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+$"}, "minItems": 2},
    {"type": "object", "propertyNames": {"maxLength": 3}, "additionalProperties": {"type": "null"}},
    {"const": []},
    {"type": "string", "pattern": 'a"\\\\\\x22'},
    {"type": "integer", "format": "regex"},
    {"type": "string", "format": "of-our-own"},
    {"$ref": "#/$defs/a/items", "$defs": {"a": {"type": "array", "items": {"type": "null"}}}},
    {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    {"oneOf": [{"const": 1}, {"enum": ["a", 2]}]},
    {"oneOf": [TAGGED | {"properties": {"kind": {"const": "a"}}}, TAGGED | {"properties": {"kind": {"const": "b"}}}]},
    {
        "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
        "$defs": {
            "a": TAGGED | {"properties": {"kind": {"enum": ["a"]}}},
            "b": TAGGED | {"properties": {"kind": {"const": "b"}}},
        },
    },
]
REFUSED: list[tuple[Any, str]] = [
    ({"not": {}}, "'not'"),
    ({"type": "array", "items": {"if": {}, "then": {}}}, "'if'"),
    ({"type": "array", "contains": {}}, "'contains'"),
    ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
    ({"type": "object", "dependentRequired": {}}, "'dependentRequired'"),
    ({"type": "object", "dependentSchemas": {}}, "'dependentSchemas'"),
    ({"type": []}, "'type' is an empty list"),
    ({"anyOf": []}, "'anyOf' is an empty list"),
    ({"oneOf": []}, "'oneOf' is an empty list"),
    ({"allOf": []}, "'allOf' is an empty list"),
    ({"enum": []}, "'enum' is an empty list"),
    ({"type": "number", "multipleOf": 5}, "'multipleOf'"),
    ({"type": "integer", "multipleOf": 5, "minimum": 3}, "'multipleOf'"),
    ({"minimum": 3}, "'minimum' without 'type'"),
    ({"required": ["a"]}, "'required' without 'type'"),
    ({"properties": {}, "maxLength": 2}, "'maxLength' without 'type'"),
    ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "'allOf' of more than one"),
    ({"allOf": [{"type": "integer"}], "minimum": 3}, "'minimum' beside 'allOf'"),
    ({"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": {}}}, "'minimum' beside '$ref'"),
    ({"$ref": "http://example.com"}, "'$ref'"),
    ({"$ref": "#anchor"}, "'$ref'"),
    ({"const": "a", "type": "integer"}, "'type' beside 'const'"),
    ({"enum": ["abc"], "maxLength": 2}, "'maxLength' beside 'enum'"),
    ({"enum": [2**60]}, "53 bits"),
    ({"anyOf": [{"minimum": 3}, {"type": "null"}], "type": "integer"}, "'type' beside 'anyOf'"),
    ({"type": "string", "pattern": "^a", "maxLength": 3}, "'maxLength' beside 'pattern'"),
    ({"type": "string", "pattern": "a", "format": "date"}, "'format' beside 'pattern'"),
    ({"type": "string", "pattern": "a$b"}, "'$' at position 2"),
    (
        {"type": "string", "pattern": "^(?=.*[A-Z])[A-Za-z]{8}$"},
        "pattern: the lookahead '(?=' at position 2 is not supported",
    ),
    (
        {"type": "object", "patternProperties": {"(?<!a)b": {}}},
        "pattern: the lookbehind '(?<!' at position 1 is not supported",
    ),
    (
        {"type": "object", "propertyNames": {"pattern": "(?i)^a"}},
        "pattern: the inline flag '(?i)' at position 1 is not supported",
    ),
    *(
        ({"type": ["string", "null"], "format": name}, f"'format' {name} is not")
        for name in ("idn-email", "idn-hostname", "iri", "iri-reference", "regex")
    ),
    (
        {"$ref": "#/$defs/a/b", "$defs": {"a": {"b": {"type": "string", "pattern": "a+(bc+)?"}}}},
        "'$ref' to anything but",
    ),
    ({"type": "object", "patternProperties": {"\\Aa": {}}}, "the escape '\\A'"),
    ({"type": "object", "propertyNames": {"pattern": "a^b"}}, "'^' at position 2"),
    ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "'required' names 'b'"),
    ({"type": "object", "properties": {"a": {}}, "patternProperties": {"b": {}}}, "'patternProperties'"),
    ({"type": "object", "patternProperties": {"a": {}, "b": {}}}, "'patternProperties'"),
    ({"type": "object", "properties": {"a": {}}, "propertyNames": {"maxLength": 3}}, "'propertyNames'"),
    ({"type": "object", "minProperties": 2}, "'minProperties'"),
    ({"type": "object", "properties": {"a": {}}, "additionalProperties": True, "minProperties": 2}, "'minProperties'"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf'"),
    ({"oneOf": [{"const": 1}, {"enum": [1.0, "a"]}]}, "'oneOf'"),
    (
        {
            "oneOf": [
                TAGGED | {"properties": {"kind": {"const": "a"}}},
                TAGGED | {"properties": {"kind": {"type": "string"}}},
            ]
        },
        "'oneOf'",
    ),
    (
        {
            "oneOf": [
                {"type": "object", "properties": {"kind": {"const": 1}}},
                {"type": "object", "properties": {"kind": {"const": 2}}},
            ]
        },
        "'oneOf'",
    ),
]


@pytest.mark.parametrize("schema", ACCEPTED, ids=json.dumps)
def test_a_grammar_stands_for(schema: Any) -> None:
    assert unenforced(schema) is None


@pytest.mark.parametrize(("schema", "reason"), REFUSED, ids=[json.dumps(schema) for schema, _ in REFUSED])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside"])
def test_a_grammar_does_not_stand_for(schema: Any, reason: str, inside: bool) -> None:
    found = unenforced(
        {"type": "object", "properties": {"x": {"anyOf": [{"type": "null"}, schema]}}} if inside else schema
    )
    assert found is not None and reason in found


def test_nesting_is_bounded() -> None:
    schema: Any = {}
    for _ in range(MAX_DEPTH):
        schema = {"type": "array", "items": schema}
    assert unenforced(schema) is None
    assert "nested" in (unenforced({"type": "array", "items": schema}) or "")
