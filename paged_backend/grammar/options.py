"""The form an answer must have, as a caller says it: a JSON schema, a regular expression, a list of choices or a
grammar, under vLLM's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from paged_backend.errors import RequestError
from paged_backend.grammar.regex_syntax import misread

MAX_GRAMMAR_CHARS = 131_072
MAX_CHOICES = 4096
_OLD_NAME = "guided_decoding"
_ONLY_VLLM = ("whitespace_pattern", "disable_additional_properties")  # a form that differs where they are set
# which library is to do it: here there is one
_VLLM_INTERNAL = ("_backend", "_backend_was_auto", "_backend_options", "backend", "backend_was_auto")

GrammarString = Annotated[str, Meta(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
Choices = Annotated[tuple[Annotated[str, Meta(min_length=1)], ...], Meta(min_length=1, max_length=MAX_CHOICES)]


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """vLLM's `structured_outputs`: at most one of the first six. Whatever else vLLM has there must be null or false
    (`_drop_unset`).
    """

    json: GrammarString | None = None  # a JSON schema, as text
    regex: GrammarString | None = None
    choice: Choices | None = None
    grammar: GrammarString | None = None
    structural_tag: GrammarString | None = None  # text with parts of a given form in it: structural_tags.py
    json_object: bool = False  # any JSON object
    disable_any_whitespace: bool = False  # JSON on one line
    disable_fallback: bool = False  # there is only one library, so this is always so

    @property
    def asks(self) -> bool:
        return self.json_object or any(
            form is not None for form in (self.json, self.regex, self.choice, self.grammar, self.structural_tag)
        )


class Grammar(msgspec.Struct, frozen=True):
    """What an answer must match. `key` is how the caller named it; grammars that differ in nothing else are one."""

    key: str
    kind: str  # "json" (a schema), "regex", "structural_tag", or "grammar" (GBNF, or Lark)
    text: str
    compact: bool = False  # no white space between the parts of JSON but one space


def fold(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns sampling parameters in which schemas are text and a single choice is a list, however they were sent, and
    `guided_decoding`, as vLLM called `structured_outputs` before, has its newer name.

    Raises:
        RequestError: `structured_outputs` is text, but no JSON; it is given under both names; or it asks for something
            that only vLLM has.
    """
    folded = dict(given)
    name = "structured_outputs"
    if folded.get(_OLD_NAME) is not None:
        if folded.get(name) is not None:
            raise RequestError(f"{_OLD_NAME} and {name}: they are one thing; send one of them")
        name = _OLD_NAME
    outputs = folded.get(name)
    folded.pop(_OLD_NAME, None)
    if isinstance(outputs, str):
        try:
            outputs = msgspec.json.decode(outputs)
        except (msgspec.DecodeError, RecursionError) as error:
            raise RequestError(f"{name}: not valid JSON: {error}") from None
    if isinstance(outputs, dict):
        outputs = _fold_one(_drop_unset(name, outputs), "json", "choice")
        if isinstance(outputs.get("structural_tag"), dict):
            outputs["structural_tag"] = msgspec.json.encode(outputs["structural_tag"]).decode()
    if outputs is not None:
        folded["structured_outputs"] = outputs
    return _fold_one(folded, "guided_json", "guided_choice")


def _drop_unset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's clients, Triton Server's OpenAI frontend among them, send every key they know: null is not given, and
    neither is a false switch.
    """
    for key in _ONLY_VLLM:
        if given.get(key) not in (None, False, ""):
            raise RequestError(f"{name}: '{key}' is not supported; only null or false may be sent for it")
    return {
        key: value
        for key, value in given.items()
        if value is not None and key not in _ONLY_VLLM and key not in _VLLM_INTERNAL
    }


def _fold_one(given: dict[str, Any], schema: str, choice: str) -> dict[str, Any]:
    folded = dict(given)
    if isinstance(folded.get(schema), (dict, list, bool)):
        folded[schema] = msgspec.json.encode(folded[schema]).decode()
    if isinstance(folded.get(choice), str):
        folded[choice] = [folded[choice]]
    return folded


def grammars_of(
    guided_json: str | None,
    guided_regex: str | None,
    guided_choice: tuple[str, ...] | None,
    guided_grammar: str | None,
    outputs: StructuredOutputs | None,
) -> list[Grammar]:
    """Everything that was asked for; more than one is a conflict."""
    found = _named("guided_", guided_json, guided_regex, guided_choice, guided_grammar, False)
    if outputs is not None:
        compact = outputs.disable_any_whitespace
        found += _named("structured_outputs.", outputs.json, outputs.regex, outputs.choice, outputs.grammar, compact)
        if outputs.structural_tag is not None:
            found.append(
                Grammar("structured_outputs.structural_tag", "structural_tag", outputs.structural_tag, compact)
            )
        if outputs.json_object:
            found.append(Grammar("structured_outputs.json_object", "json", '{"type":"object"}', compact))
    return found


def check_grammars(found: list[Grammar]) -> None:
    """
    Raises:
        RequestError: names two that were asked for at once, or one that is too long or would be read as something else.
    """
    for grammar in found:
        if len(grammar.text) > MAX_GRAMMAR_CHARS:  # choices, together
            raise RequestError(
                f"{grammar.key}: {len(grammar.text)} characters as a grammar, at most {MAX_GRAMMAR_CHARS} are allowed"
            )
        misreading = misread(grammar.text) if grammar.kind == "regex" else None
        if misreading:
            raise RequestError(f"{grammar.key}: {misreading}")
    if len(found) > 1:
        raise RequestError(f"{found[0].key} and {found[1].key}: an answer has one form; send one of them")


def _named(
    prefix: str,
    schema: str | None,
    regex: str | None,
    choice: tuple[str, ...] | None,
    grammar: str | None,
    compact: bool,
) -> list[Grammar]:
    found = []
    if schema is not None:
        found.append(Grammar(f"{prefix}json", "json", schema, compact))
    if regex is not None:
        found.append(Grammar(f"{prefix}regex", "regex", regex))
    if choice is not None:
        found.append(Grammar(f"{prefix}choice", "grammar", "root ::= " + " | ".join(map(_literal, choice))))
    if grammar is not None:
        found.append(Grammar(f"{prefix}grammar", "grammar", grammar))
    return found


def _literal(text: str) -> str:
    """A string as GBNF spells it."""
    escaped = (f"\\{char}" if char in '"\\' else char if char.isprintable() else f"\\U{ord(char):08x}" for char in text)
    return f'"{"".join(escaped)}"'
