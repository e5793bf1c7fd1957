"""Tool calls that must come: whatever the model would say, the calls that come out validate."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

pytest.importorskip("xgrammar")

import xgrammar

from paged_backend.grammar.compiler_process import Verdict, compile_here
from paged_backend.grammar.options import Grammar
from paged_client.openai.formats.events import message_of
from paged_client.openai.formats.families import TOOL_FORMATS, types_of
from paged_client.openai.formats.parser import AnswerForm
from paged_client.openai.tools import ToolWishes, structural_tag
from tests.unit.grammar.test_pattern_grammar import BYTES

ENFORCED = [form for form in TOOL_FORMATS.values() if form.xgrammar]
JSON_ARGUMENTS = ["deepseek", "deepseek_v3_1", "harmony", "hermes", "kimi", "llama3_json"]


def tools_of(*schemas: Any) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": f"tool_{at}", "parameters": schema}}
        for at, schema in enumerate(schemas)
    ]


def compiled(tag: Any) -> Verdict:
    return compile_here(Grammar("tools", "structural_tag", tag if isinstance(tag, str) else json.dumps(tag)), BYTES)


def said(verdict: Verdict, randomly: random.Random, longest: int = 1500) -> str | None:
    """What a model without any sense says; None: it does not come to an end."""
    assert not verdict.refusal, verdict.refusal
    matcher = xgrammar.GrammarMatcher(xgrammar.CompiledGrammar.deserialize_json(verdict.serialised, BYTES.tokens))
    mask, text = np.zeros((1, 8), np.int32), bytearray()
    while len(text) < longest:
        if matcher.is_completed():
            return text.decode(errors="replace")
        matcher.fill_next_token_bitmask(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        plain = allowed[((allowed >= 32) & (allowed < 127)) | (allowed == 10)]
        enders = [byte for byte in b'"}]<`' if byte in plain]
        choices = enders if enders and randomly.random() < 0.4 else (plain if len(plain) else allowed).tolist()
        byte = int(randomly.choice(choices))
        assert matcher.accept_token(byte)
        text.append(byte)
    return None


def random_schema(randomly: random.Random, depth: int) -> dict[str, Any]:
    kind = randomly.choice(["string", "integer", "boolean", "number", "enum", *(["object", "array"] if depth else [])])
    if kind == "enum":
        return {"enum": randomly.sample(["red", "green", "blue", "a b", 'x"y'], randomly.randint(1, 3))}
    if kind == "string":
        return {"type": "string", "maxLength": randomly.randint(0, 12)}
    if kind == "array":
        return {"type": "array", "items": random_schema(randomly, depth - 1), "maxItems": randomly.randint(0, 3)}
    return random_object(randomly, depth - 1) if kind == "object" else {"type": kind}


def random_object(randomly: random.Random, depth: int) -> dict[str, Any]:
    names = randomly.sample(["city", "days", "when", "n", "unit"], randomly.randint(0, 3))
    properties = {name: random_schema(randomly, depth) for name in names}
    required = [name for name in names if randomly.random() < 0.6]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def num_right(form_name: str, num_schemas: int, seed: int) -> int:
    """How many answers came to an end: the calls of all of these are right."""
    randomly, form, num_ended = random.Random(seed), TOOL_FORMATS[form_name], 0
    for _ in range(num_schemas):
        schemas = [random_object(randomly, 2) for _ in range(randomly.randint(1, 2))]
        wishes = ToolWishes(tools_of(*schemas), "required", parallel=False)
        text = said(compiled(structural_tag(wishes, form, False)), randomly)
        if text is None:
            continue
        num_ended += 1
        parser = AnswerForm(form, types=types_of(wishes.tools)).parser()
        (call,) = message_of([*parser.feed(text), *parser.finish()]).calls
        jsonschema.validate(json.loads(call.arguments), schemas[int(call.name.removeprefix("tool_"))])
    return num_ended


@pytest.mark.parametrize("form_name", JSON_ARGUMENTS)
def test_every_call_that_must_come_validates(form_name: str) -> None:
    assert num_right(form_name, 12, seed=1) >= 6


@pytest.mark.long
@pytest.mark.parametrize("form_name", JSON_ARGUMENTS)
def test_every_call_of_many_schemas_validates(form_name: str) -> None:
    assert num_right(form_name, 2000, seed=2) >= 1000


@pytest.mark.parametrize("form", ENFORCED, ids=lambda form: form.name)
def test_every_format_is_read_as_it_is_enforced(form: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = tools_of(schema)
    for choice in ("required", {"type": "function", "function": {"name": "tool_0"}}):
        text = said(compiled(structural_tag(ToolWishes(tools, choice, False), form, False)), random.Random(3))
        assert text is not None
        parser = AnswerForm(form, types=types_of(tools)).parser()
        (call,) = message_of([*parser.feed(text), *parser.finish()]).calls
        assert call.name == "tool_0" and json.loads(call.arguments)["city"] in ("Paris", "Rome"), text


def test_patterns_in_arguments_are_followed() -> None:
    code = {"type": "string", "pattern": "^a+(bc+)?$"}
    schema = {"type": "object", "properties": {"code": code}, "required": ["code"], "additionalProperties": False}
    verdict = compiled(structural_tag(ToolWishes(tools_of(schema), "required", False), TOOL_FORMATS["hermes"], False))
    texts = [text for seed in range(20) if (text := said(verdict, random.Random(seed))) is not None]
    assert texts
    for text in texts:
        parser = AnswerForm(TOOL_FORMATS["hermes"]).parser()
        (call,) = message_of([*parser.feed(text), *parser.finish()]).calls
        jsonschema.validate(json.loads(call.arguments), schema)


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ("[]", "expected a JSON object"),
        ('{"a": ' * 3000, "nested too deeply|expected a JSON object"),
        ({"model": "nonesuch"}, "Unknown format type: nonesuch"),
        ({"model": "qwen_3", "tools": [], "style": 1}, "unknown key 'style'; known: model, parallel_tool_calls"),
        ({"model": "qwen_3", "tools": 3}, "."),
        (
            {"model": "qwen_3", "tools": tools_of({"type": "object", "not": {}}), "tool_choice": "required"},
            "'not' is not supported",
        ),
        ({"type": "structural_tag", "format": {"type": "nonesuch"}}, "."),
        ({}, "."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_tag_is_refused_with_the_reason(tag: Any, reason: str) -> None:
    verdict = compiled(tag)
    assert verdict.refusal and re.search(reason, verdict.refusal), verdict.refusal


def test_the_librarys_own_tags_are_taken() -> None:
    content = {"type": "json_schema", "json_schema": {"enum": [1, 2]}}
    tag = {"type": "structural_tag", "format": {"type": "tag", "begin": "<n>", "content": content, "end": "</n>"}}
    assert said(compiled(tag), random.Random(1)) in ("<n>1</n>", "<n>2</n>")
