"""Text that may hold parts of a given form: structural tags, as xgrammar and vLLM call them. Tool calls are such parts.

A tag is either the library's own JSON (`{"type": "structural_tag", "format": …}`), or names a format of tool calls that
the library knows, with the tools: `{"model": "qwen_3", "tools": […], "tool_choice": "required"}`. The latter's
arguments always match the tools' schemas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from paged_backend.grammar.json_schema import unenforced
from paged_backend.grammar.schema_patterns import Marks, marked
from paged_backend.grammar.vocabulary import GrammarError, Vocabulary

_MODEL_KEYS = frozenset({"model", "tools", "tool_choice", "reasoning", "parallel_tool_calls"})
_MOST_WHITE_SPACE = 1  # between parts of JSON: room for more is room for answers without an end
_MOST_DEPTH = 200


def compile_tag(text: str, compiler: Any, vocabulary: Vocabulary) -> Any:
    """The library's compiled grammar.

    Raises:
        GrammarError: it is no tag, or a schema in it has something that could not be enforced.
    """
    try:
        given = msgspec.json.decode(text, type=dict[str, Any])
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except msgspec.DecodeError as error:
        raise GrammarError(f"expected a JSON object: {error}") from None
    tag = _tag_of_model(given, vocabulary.xgrammar) if "model" in given else given
    marks = Marks()
    rewritten = msgspec.json.encode(_with_schemas(tag, lambda schema: _checked(schema, marks), 0)).decode()
    if not marks:
        return compiler.compile_structural_tag(rewritten)
    try:
        resolved = marks.resolve(str(vocabulary.xgrammar.Grammar.from_structural_tag(rewritten)))
    except AssertionError:
        raise GrammarError("'pattern' and 'format' are not supported in arguments that are no JSON") from None
    return compiler.compile_grammar(resolved)


def _tag_of_model(given: dict[str, Any], xgrammar: Any) -> dict[str, Any]:
    unknown = given.keys() - _MODEL_KEYS
    if unknown:
        raise GrammarError(f"unknown key '{min(unknown)}'; known: {', '.join(sorted(_MODEL_KEYS))}")
    try:
        made = xgrammar.get_model_structural_tag(**given, max_whitespace_cnt=_MOST_WHITE_SPACE)
    except (ValueError, TypeError) as error:  # pydantic's are among them
        raise GrammarError((str(error).splitlines() or [type(error).__name__])[0]) from None
    tag: dict[str, Any] = msgspec.json.decode(made.model_dump_json())
    return tag


def _with_schemas(value: Any, rewrite: Callable[[Any], Any], depth: int) -> Any:
    """A copy of a tag with its schemas rewritten."""
    if depth > _MOST_DEPTH:
        raise GrammarError("it is nested too deeply")
    match value:
        case dict():
            return {
                name: rewrite(member) if name == "json_schema" else _with_schemas(member, rewrite, depth + 1)
                for name, member in value.items()
            }
        case list():
            return [_with_schemas(member, rewrite, depth + 1) for member in value]
    return value


def _checked(schema: Any, marks: Marks) -> Any:
    found = unenforced(schema)
    if found is not None:
        raise GrammarError(found)
    return marked(schema, marks.mark)
