"""Random schemas, expressions and choices through the whole engine, with a model that speaks at random: whatever is
finished is of the form asked for.

PAGED_SCHEMAS=1000 pytest tests/properties/test_structured_properties.py  (the ordinary run takes fewer)
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from paged_backend.grammar.json_schema import unenforced
from tests.structured_engine import Ended, load_speaker, run, save_speaker

NUM_SCHEMAS = int(os.environ.get("PAGED_SCHEMAS", "80"))
CHUNK = 40  # schemas run together


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaker(tmp_path_factory.mktemp("speaker"))


class SchemaMaker:
    """Draws schemas of every kind that is supported. `deep` bounds what is inside them."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._defs: dict[str, Any] = {}

    def schema(self) -> dict[str, Any]:
        schema = self._any(3)
        return schema | {"$defs": self._defs} if self._defs else schema

    def _any(self, deep: int) -> dict[str, Any]:
        leaves = [self._integer, self._number, self._string, self._pattern, self._values, self._plain]
        inner = [self._object, self._object, self._array, self._tuple, self._union, self._map, self._reference]
        chosen = self._random.choice(inner * 2 + leaves if deep == 3 else leaves + inner if deep else leaves)
        made: dict[str, Any] = chosen(deep) if chosen in inner else chosen()  # type: ignore[operator]
        if self._random.random() < 0.1:
            made = {"title": "T", "description": 'a "description"', "default": None} | made
        return made

    def _chance(self, share: float = 0.5) -> bool:
        return self._random.random() < share

    def _plain(self) -> dict[str, Any]:
        return {"type": self._random.choice(["null", "boolean", ["null", "boolean"], ["boolean", "integer"]])}

    def _integer(self) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "integer"}
        if self._chance(0.1):
            return schema | {"multipleOf": self._random.choice([2, 5, 7])}
        low = self._random.randint(-2000, 2000)
        if self._chance(0.7):
            schema[self._random.choice(["minimum", "exclusiveMinimum"])] = low
        if self._chance(0.7):
            schema[self._random.choice(["maximum", "exclusiveMaximum"])] = low + self._random.randint(2, 3000)
        return schema

    def _number(self) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "number"}
        low = self._random.choice([-3.5, 0, 0.25, -100, 12])
        if self._chance():
            schema[self._random.choice(["minimum", "exclusiveMinimum"])] = low
        if self._chance():
            schema[self._random.choice(["maximum", "exclusiveMaximum"])] = low + self._random.choice([0.5, 1, 100.75])
        return schema

    def _string(self) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string", "maxLength": self._random.randint(0, 12)}
        if self._chance():
            schema["minLength"] = self._random.randint(0, schema["maxLength"])
        return schema

    def _pattern(self) -> dict[str, Any]:
        if self._chance(0.2):
            return {"type": "string", "format": self._random.choice(["uuid", "ipv4", "date"])}
        return {
            "type": "string",
            "pattern": self._random.choice(
                [
                    "^[a-z]{1,4}$",
                    "^a|b$",
                    "^\\d{4}-\\d\\d$",
                    "^[^a]{0,5}$",
                    "^.{2}$",
                    "x+y{1,3}",
                    "^(é|日)?$",
                    "^a+(bc+)?$",
                    '^["\\\\\t]?x$',
                    "^\\S\\W.[^a-z]$",
                ]
            ),
        }

    def _values(self) -> dict[str, Any]:
        if self._chance(0.3):
            return {"const": self._random.choice(["a\nb", 'é"\\', 7, -1.5, None, [1, {"x": []}], {"k": "v"}])}
        if self._chance(0.3):
            return {"type": "string", "enum": ["red", "green", "blue"]}
        return {"enum": [1, "a", None, True, {"a": [2]}]}

    def _object(self, deep: int) -> dict[str, Any]:
        names = self._random.sample(["a", "b b", "Ü", 'q"', "long_name_of_it", "\\n", "z"], self._random.randint(1, 3))
        schema: dict[str, Any] = {"type": "object", "properties": {name: self._any(deep - 1) for name in names}}
        schema["required"] = [name for name in names if self._chance()]
        if self._chance():
            schema["additionalProperties"] = False
        elif self._chance(0.2):
            schema["additionalProperties"] = {"type": "null"}
        elif self._chance(0.3):
            schema["minProperties"], schema["maxProperties"] = 1, len(names)
        return schema

    def _map(self, deep: int) -> dict[str, Any]:
        inner = self._any(deep - 1)
        kinds = [
            {"patternProperties": {"^[a-c]{1,2}$": inner}, "additionalProperties": False},
            {"additionalProperties": inner},
            {"propertyNames": {"pattern": "^[xy]$"}, "additionalProperties": inner},
            {"propertyNames": {"maxLength": 3}, "additionalProperties": inner},
        ]
        return {"type": "object", "maxProperties": 2} | self._random.choice(kinds)

    def _array(self, deep: int) -> dict[str, Any]:
        schema = {"type": "array", "items": self._any(deep - 1), "maxItems": self._random.randint(0, 4)}
        if self._chance():
            schema["minItems"] = self._random.randint(0, schema["maxItems"])
        return schema

    def _tuple(self, deep: int) -> dict[str, Any]:
        items = [self._any(deep - 1) for _ in range(self._random.randint(1, 3))]
        rest = self._random.choice([False, {"type": "boolean"}])
        return {
            "type": "array",
            "prefixItems": items,
            "items": rest,
            "minItems": len(items),
            "maxItems": len(items) + (2 if rest else 0),
        }

    def _union(self, deep: int) -> dict[str, Any]:
        if self._chance(0.3):
            tags = [
                {
                    "type": "object",
                    "properties": {"kind": {"const": tag}, "of": self._any(deep - 1)},
                    "required": ["kind"],
                }
                for tag in ("a", "b")
            ]
            return {"oneOf": tags}
        return {"anyOf": [self._any(deep - 1) for _ in range(self._random.randint(1, 3))]}

    def _reference(self, deep: int) -> dict[str, Any]:
        if self._chance(0.3):
            self._defs["tree"] = {
                "type": "object",
                "properties": {"down": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}},
                "required": ["down"],
            }
            return {"$ref": "#/$defs/tree"}
        name = f"d{len(self._defs)}"
        self._defs[name] = {}
        self._defs[name] = self._any(deep - 1)
        return {"$ref": f"#/$defs/{name}"} if self._chance() else {"allOf": [{"$ref": f"#/$defs/{name}"}]}


def various(index: int) -> dict[str, Any]:
    """Sampling parameters of every kind, in turns."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": -0.2},
        {"logit_bias": {"1": 5.0, "4": 3.0}, "min_p": 0.001},
        {"min_tokens": 5},
        {"bad_words": ["k", "7"], "logprobs": 2},
    ]
    return kinds[index % len(kinds)]


def schemas(count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for seed in range(count):
        schema = SchemaMaker(seed).schema()
        assert unenforced(schema) is None, schema
        yield seed, schema


@pytest.mark.parametrize("count", [NUM_SCHEMAS, pytest.param(400, marks=pytest.mark.long)])
def test_every_finished_answer_validates(folder: Path, tmp_path: Path, count: int) -> None:
    """An answer may also be cut off by max_tokens, or led by bad_words to where nothing is left; few are."""
    engine = load_speaker(folder, tmp_path, max_num_sequences=64, num_pages=4096)
    every = list(schemas(count))
    num_finished = 0
    for begin in range(0, len(every), CHUNK):
        chunk = every[begin : begin + CHUNK]
        engine._steps_ahead = begin // CHUNK % 2  # as on a CPU, and as on a GPU
        for (seed, schema), ended in zip(
            chunk,
            run(engine, [various(seed) | {"guided_json": schema, "max_tokens": 300} for seed, schema in chunk]),
            strict=True,
        ):
            assert ended.reason in ("stop", "length") or ("bad_words" in ended.reason and seed % 7 == 6), (
                seed,
                schema,
                ended.reason,
            )
            if ended.reason == "stop":
                num_finished += 1
                check(schema, ended)
    assert num_finished > 0.9 * len(every)


def check(schema: dict[str, Any], ended: Ended) -> None:
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.FormatChecker(["uuid", "ipv4", "date"])
    )
    try:
        validator.validate(json.loads(ended.text))
    except ValueError as error:
        raise AssertionError(f"{ended.text!r} is no JSON, with {schema}") from error
    except jsonschema.ValidationError as error:
        raise AssertionError(f"{ended.text!r} does not validate against {schema}: {error.message}") from error


REGEXES = [
    *(
        "[0-9]{3}-[a-f]+",
        "(red|green|blue)( and (red|green|blue)){0,2}",
        "é+[à-ü]?",
        "\\d+(\\.\\d\\d)?",
        "[^x]{1,6}",
        "^a?b*c+$",
        "(?:ab|cd){2}",
        "\\w{2,5}",
    ),
    *("日本(語)?", "\\{\\}\\[\\]", "[ \\t]x"),
]


def test_every_finished_answer_matches_its_expression(folder: Path, tmp_path: Path) -> None:
    samplings = [various(index) | {"guided_regex": regex} for index, regex in enumerate(REGEXES * 6)]
    ended = run(load_speaker(folder, tmp_path), samplings)
    finished = [(regex, each.text) for regex, each in zip(REGEXES * 6, ended, strict=True) if each.reason == "stop"]
    assert len(finished) > 0.8 * len(ended)
    for regex, text in finished:
        assert re.fullmatch(regex, text, re.DOTALL), (regex, text)


def test_every_answer_is_one_of_its_choices(folder: Path, tmp_path: Path) -> None:
    randomly = random.Random(5)
    alphabet = 'abc "\\\n\t{}é日😀'
    choices = [
        ["".join(randomly.choices(alphabet, k=randomly.randint(1, 12))) for _ in range(randomly.randint(1, 9))]
        for _ in range(120)
    ]
    samplings = [various(index) | {"guided_choice": choice, "bad_words": []} for index, choice in enumerate(choices)]
    ended = run(load_speaker(folder, tmp_path), samplings)
    assert all(each.reason == "stop" and each.text in choice for each, choice in zip(ended, choices, strict=True))
    assert len({each.text for each in ended}) > 60


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("prefix_cache", "steps_ahead"),
    [
        pytest.param(True, 1, id="cache-1"),
        pytest.param(False, 0, id="no cache-0"),
        pytest.param(True, 0, id="cache-0", marks=pytest.mark.long),
        pytest.param(False, 1, id="no cache-1", marks=pytest.mark.long),
    ],
)
def test_preemption_and_the_prefix_cache_change_no_token(
    folder: Path, tmp_path: Path, prefix_cache: bool, steps_ahead: int
) -> None:
    samplings = [
        various(seed) | {"guided_json": SchemaMaker(seed).schema(), "max_tokens": 80, "ignore_eos": seed % 5 == 0}
        for seed in range(30)
    ]
    roomy = [ended.token_ids for ended in run(load_speaker(folder, tmp_path / "roomy"), samplings)]
    options = {
        "num_pages": 48,
        "page_size": 4,
        "max_model_len": 180,
        "max_batched_tokens": 40,
        "max_num_sequences": 12,
        "prefix_cache": prefix_cache,
    }
    engine = load_speaker(folder, tmp_path / "tight", **options)
    engine._steps_ahead = steps_ahead
    assert [ended.token_ids for ended in run(engine, samplings)] == roomy
    assert engine.stats().num_preemptions > 0
    assert [ended.token_ids for ended in run(engine, samplings)] == roomy  # with what the first round left in the cache
    assert (engine.stats().prefix_hits > 0) == prefix_cache
