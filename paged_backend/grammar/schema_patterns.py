"""Schemas whose patterns and formats are grammars of our own (pattern_grammar.py): they go to the library with a mark
in the place of each, and the mark is replaced in the grammar that comes back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from paged_backend.grammar.pattern_grammar import pattern_grammar
from paged_backend.grammar.string_formats import PATTERNS

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_SINGLES = (
    "items",
    "additionalItems",
    "unevaluatedItems",
    "additionalProperties",
    "unevaluatedProperties",
    "propertyNames",
)
_RULE = "paged_pattern"
_MARK = re.compile(r'Regex\("\^paged(\d+)end\$", json_string=true\)')


class Marks:
    """The grammars that a schema's patterns became, each once. In the library's text of a grammar, quotation marks of
    what a schema says are escaped, and those around a mark are not: so it is unmistakable.
    """

    def __init__(self) -> None:
        self._grammars: dict[str, int] = {}  # by what stands on a rule's right side

    def __bool__(self) -> bool:
        return bool(self._grammars)

    def mark(self, pattern: str) -> str:
        """What to write in the pattern's place.

        Raises:
            PatternError: it cannot be followed.
        """
        number = self._grammars.setdefault(pattern_grammar(pattern), len(self._grammars))
        return f"^paged{number}end$"

    def resolve(self, grammar: str) -> str:
        """The library's grammar of a marked schema, with our rules where the marks are.

        Raises:
            AssertionError: this version of the library writes patterns otherwise.
        """
        resolved = _MARK.sub(lambda found: f"{_RULE}_{found[1]}", grammar)
        assert 'Regex("' not in resolved, "a pattern was left to the library"
        rules = "".join(f"{_RULE}_{number} ::= {right}\n" for right, number in self._grammars.items())
        return f"{resolved}\n{rules}"


def marked(schema: Any, mark: Callable[[str], str]) -> Any:
    """A copy of a schema with marks for its patterns and formats, wherever json_schema.py looks for a schema. Depth is
    bounded there.
    """
    if not isinstance(schema, dict):
        return schema
    copy = dict(schema)
    for name in _MAPS:
        if isinstance(schema.get(name), dict):
            copy[name] = {_key(name, key, mark): marked(part, mark) for key, part in schema[name].items()}
    for name in _LISTS:
        if isinstance(schema.get(name), list):
            copy[name] = [marked(part, mark) for part in schema[name]]
    for name in _SINGLES:
        if name in schema:
            copy[name] = marked(schema[name], mark)
    pattern = copy.pop("pattern", None)
    form = copy.pop("format", None)
    if not isinstance(pattern, str):
        pattern = PATTERNS.get(form) if isinstance(form, str) else None
    if pattern is not None:
        copy["pattern"] = mark(pattern)
    return copy


def _key(name: str, key: str, mark: Callable[[str], str]) -> str:
    return mark(key) if name == "patternProperties" else key
