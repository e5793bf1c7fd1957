"""What a JSON schema asks that a grammar does not enforce: xgrammar passes over it in silence, and the answer would not
validate.

A schema without such parts is one whose grammar accepts nothing that the schema refuses (it may accept less: escapes in
strings of limited length, properties in another order). Found by generating from each keyword and combination with
xgrammar 0.2.8 and validating the results.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from paged_backend.grammar.pattern_grammar import PatternError, pattern_grammar
from paged_backend.grammar.regex_syntax import misread
from paged_backend.grammar.string_formats import UNENFORCED

MAX_DEPTH = 64  # the library's time grows with the square of it

_NEVER = (
    "not",
    "if",
    "then",
    "else",
    "contains",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "$dynamicRef",
    "$recursiveRef",
)
_STRING = ("minLength", "maxLength", "pattern", "format")
_NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_OBJECT = (
    *("properties", "required", "additionalProperties", "unevaluatedProperties"),
    *("patternProperties", "propertyNames", "minProperties", "maxProperties"),
)
_ARRAY = ("items", "prefixItems", "additionalItems", "unevaluatedItems", "minItems", "maxItems", "uniqueItems")
_LEADING = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")  # where there is one, the library looks at nothing else
_CONSTRAINTS = (*_LEADING, "type", *_STRING, *_NUMBER, *_OBJECT, *_ARRAY)
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_SINGLES = ("items", "additionalItems", "unevaluatedItems", "additionalProperties", "unevaluatedProperties")
_STEP = (
    r"(\$defs|definitions|properties|patternProperties)/[^/]+|items|additionalProperties"
    r"|(prefixItems|anyOf|oneOf|allOf)/\d+"
)
_REFERENCE = re.compile(rf"#(/({_STEP}))*")  # to what is a schema, and is looked at
_EXACT = 2**53


def unenforced(schema: Any) -> str | None:
    """The first part that would not be enforced, as a clause for the caller; None: the grammar can be relied on."""
    return next(_walk(schema, schema, 0), None)


def _walk(schema: Any, root: Any, depth: int) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    if depth > MAX_DEPTH:
        yield f"the schema is nested more than {MAX_DEPTH} deep"
    else:
        yield from _alone(schema, root)
        for part in _parts(schema):
            yield from _walk(part, root, depth + 1)
        if isinstance(schema.get("propertyNames"), dict):
            yield from _walk({"type": "string"} | schema["propertyNames"], root, depth + 1)


def _parts(schema: dict[str, Any]) -> Iterator[Any]:
    for name in _MAPS:
        if isinstance(schema.get(name), dict):
            yield from schema[name].values()
    for name in _LISTS:
        if isinstance(schema.get(name), list):
            yield from schema[name]
    for name in _SINGLES:
        yield schema.get(name)


def _alone(schema: dict[str, Any], root: Any) -> Iterator[str]:
    """What is wrong with a schema, apart from those inside it."""
    yield from (_unsupported(name) for name in _NEVER if name in schema)
    if schema.get("uniqueItems"):
        yield _unsupported("uniqueItems")
    # for some, the library says ""
    yield from (
        f"'{name}' is an empty list" for name in ("type", "enum", "anyOf", "oneOf", "allOf") if schema.get(name) == []
    )
    leading = [name for name in _LEADING if name in schema]
    if leading:
        yield from _beside(schema, leading[0], root)
        return
    yield from _untyped(schema)
    yield from _string(schema)
    yield from _number(schema)
    yield from _object(schema)


def _beside(schema: dict[str, Any], leading: str, root: Any) -> Iterator[str]:
    """What stands beside a reference, a list of values or a combination is ignored; a type does no harm where it says
    nothing new.
    """
    others = [name for name in _CONSTRAINTS if name in schema and name != leading]
    value = schema[leading]
    types = _types(schema)
    if leading in ("const", "enum"):
        values = [value] if leading == "const" else value if isinstance(value, list) else []
        if any(isinstance(each, (int, float)) and abs(each) > _EXACT for each in values):
            yield f"'{leading}' has a number of more than 53 bits"
        redundant = types is not None and all(_is_of(each, types) for each in values)
    else:
        branches = value if isinstance(value, list) else []
        redundant = (
            types is not None and leading != "$ref" and all((_types(branch) or {"?"}) <= types for branch in branches)
        )
    yield from (
        f"'{name}' beside '{leading}' is not supported" for name in others if not (name == "type" and redundant)
    )
    if leading == "$ref" and not _REFERENCE.fullmatch(str(value)):
        yield "'$ref' to anything but '#/$defs/…' is not supported"
    if leading == "allOf" and isinstance(value, list) and len(value) > 1:
        yield "'allOf' of more than one schema is not supported"
    if leading == "oneOf" and isinstance(value, list):
        yield from _overlaps([_resolved(branch, root) for branch in value], root)


def _untyped(schema: dict[str, Any]) -> Iterator[str]:
    names = [name for name in _CONSTRAINTS if name in schema]
    if "type" in schema or not names:
        return
    group = _OBJECT if "properties" in schema else _ARRAY if {"items", "prefixItems"} & schema.keys() else ()
    yield from (f"'{name}' without 'type' is not supported" for name in names if name not in group)


def _string(schema: dict[str, Any]) -> Iterator[str]:
    given = [name for name in ("pattern", "format", "minLength", "maxLength") if name in schema]
    if len(given) > 1 and given[0] in ("pattern", "format"):
        yield f"'{given[1]}' beside '{given[0]}' is not supported"
    patterns = [schema.get("pattern"), *_keys(schema, "patternProperties")]
    for pattern in patterns:
        if isinstance(pattern, str):
            yield from _pattern(pattern)
    if schema.get("format") in UNENFORCED and "string" in (_types(schema) or ()):
        yield f"'format' {schema['format']} is not supported"


def _pattern(pattern: str) -> Iterator[str]:
    try:
        pattern_grammar(pattern)
    except PatternError as error:
        yield str(error)
        return
    misreading = misread(pattern)
    if misreading:
        yield f"pattern: {misreading}"


def _number(schema: dict[str, Any]) -> Iterator[str]:
    bounds = [name for name in _NUMBER if name in schema]
    if "multipleOf" in bounds and (len(bounds) > 1 or schema.get("type") != "integer"):
        yield "'multipleOf' is supported for integers without bounds only"


def _object(schema: dict[str, Any]) -> Iterator[str]:
    properties, patterns = _keys(schema, "properties"), _keys(schema, "patternProperties")
    required = schema.get("required")
    if isinstance(required, list):
        yield from (
            f"'required' names '{name}', which is not among the properties"
            for name in required
            if name not in properties
        )
    if patterns and (properties or len(patterns) > 1):
        yield "'patternProperties' is supported with one pattern and without 'properties' only"
    if "propertyNames" in schema and (properties or patterns):
        yield "'propertyNames' beside 'properties' or 'patternProperties' is not supported"
    free = not properties or any(
        schema.get(name) not in (None, False) for name in ("additionalProperties", "unevaluatedProperties")
    )
    least = schema.get("minProperties")
    if free and isinstance(least, (int, float)) and least > 1:  # the same name twice would do for the library
        yield "'minProperties' above 1 is supported only where 'properties' names them all"


def _overlaps(branches: list[Any], root: Any) -> Iterator[str]:
    for index, branch in enumerate(branches):
        if not all(_disjoint(branch, other, root) for other in branches[:index]):
            yield (
                "'oneOf' is supported only where nothing can match two of its schemas: other types, constants, "
                "or such a required property; use 'anyOf'"
            )
            return


def _disjoint(a: Any, b: Any, root: Any) -> bool:
    """Surely nothing is valid under both."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return False
    values, others = _values(a), _values(b)
    if values is not None and others is not None:
        return not any(value == other for value in values for other in others)
    types, other_types = _types(a, values), _types(b, others)
    if types is None or other_types is None:
        return False
    if not types & other_types and not {"integer", "number"} <= types | other_types:
        return True
    if types | other_types != {"object"}:
        return False
    shared = {name for name in a.get("required") or () if name in (b.get("required") or ())}
    pairs = ((_property(a, name, root), _property(b, name, root)) for name in shared)
    return any(_disjoint(mine, yours, root) for mine, yours in pairs)


def _property(schema: dict[str, Any], name: str, root: Any) -> Any:
    properties = schema.get("properties")
    return _resolved(properties.get(name), root) if isinstance(properties, dict) else None


def _resolved(schema: Any, root: Any) -> Any:
    """The schema, or what it refers to."""
    if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
        return schema
    found = root
    for name in schema["$ref"].split("/")[1:]:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _values(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _types(schema: Any, values: Iterable[Any] | None = None) -> set[str] | None:
    """The types a schema allows, as far as it says so."""
    if not isinstance(schema, dict):
        return None
    if values is not None:
        return {_type_of(value) for value in values}
    given = schema.get("type")
    if given is None:
        return {"object"} if "properties" in schema else None
    return {str(name) for name in given} if isinstance(given, list) else {str(given)}


def _type_of(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def _is_of(value: Any, types: set[str]) -> bool:
    kind = _type_of(value)
    return (
        kind in types
        or (kind == "integer" and "number" in types)
        or (kind == "number" and float(value).is_integer() and "integer" in types)
    )


def _keys(schema: dict[str, Any], name: str) -> list[str]:
    return list(schema[name]) if isinstance(schema.get(name), dict) else []


def _unsupported(name: str) -> str:
    return f"'{name}' is not supported"
