"""Random tools under tool_choice=required, answered by a model that says anything a grammar lets it say: every call is
read and matches its schema.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("xgrammar")

import jsonschema
import numpy as np

from paged_backend.messages import Submit
from paged_backend.request import parse_sampling
from paged_client.openai.formats.events import message_of
from paged_client.openai.formats.families import TOOL_FORMATS, types_of
from paged_client.openai.formats.parser import AnswerForm
from paged_client.openai.protocol import ChatBody
from paged_client.openai.tools import format_for, structural_tag, tool_wishes
from tests.structured_engine import PROMPT, TOKENIZER, Ended, load_speaker, save_speaker

WORDS = ("city", "unit", "when", "how_many", "filter", "tags", "note", "id")
ENDINGS = ('"', "}", "]", ",", ":", "{")  # made likelier, so that few answers meet their limit
MAX_TOKENS = 600


def value_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "boolean", "enum", "null", "number"] + (["object", "array", "anyOf"] if depth else [])
    match rng.choice(kinds):
        case "string":
            return {"type": "string", "maxLength": rng.randint(1, 12)}
        case "integer":
            low = rng.randint(-1000, 1000)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}
        case "number":
            return {"type": "number"}
        case "enum":
            return {
                "enum": rng.sample(["celsius", "fahrenheit", "é☃", 3, -1.5, None, True, 'a "quote"'], rng.randint(1, 4))
            }
        case "object":
            return object_schema(rng, depth - 1)
        case "array":
            return {
                "type": "array",
                "items": value_schema(rng, depth - 1),
                "minItems": rng.randint(0, 1),
                "maxItems": rng.randint(1, 3),
            }
        case "anyOf":
            return {"anyOf": [value_schema(rng, 0), value_schema(rng, depth - 1)]}
        case kind:
            return {"type": kind}


def object_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(0, 4))
    required = [name for name in names if rng.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: value_schema(rng, depth) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def random_tools(rng: random.Random) -> list[dict[str, Any]]:
    names = rng.sample(("get_weather", "search", "add", "look-up", "f"), rng.randint(1, 3))
    return [
        {"type": "function", "function": {"name": name, "parameters": object_schema(rng, rng.randint(0, 2))}}
        for name in names
    ]


def answers(folder: Path, seed: int, count: int, format_name: str) -> Counter[str]:
    """How many answers were whole calls, and how many met their limit before; every whole one is checked."""
    rng = random.Random(f"{seed} {format_name}")
    engine = load_speaker(
        save_speaker(folder / "model"), folder / "exports", max_model_len=MAX_TOKENS + 64, num_pages=2048
    )
    bias = {TOKENIZER.token_to_id(ending): 6.0 for ending in ENDINGS if TOKENIZER.token_to_id(ending) is not None}
    asked: dict[int, tuple[list[dict[str, Any]], AnswerForm]] = {}
    for request_id in range(count):
        tools = random_tools(rng)
        wishes = tool_wishes(
            ChatBody(
                model="m",
                messages=[{"role": "user", "content": "x"}],
                tools=tools,
                tool_choice="required",
                parallel_tool_calls=False,
            )
        )
        assert wishes is not None
        form = format_for(wishes, TOOL_FORMATS[format_name])
        assert form is not None
        sampling = {
            "structured_outputs": {"structural_tag": structural_tag(wishes, form, False)},
            "max_tokens": MAX_TOKENS,
            "seed": request_id,
        }
        params = parse_sampling({**sampling, "logit_bias": bias})
        asked[request_id] = tools, AnswerForm(tools=form, reasoning=None, begins_reasoning=False, types=types_of(tools))
        engine.submit(Submit(request_id, np.array(PROMPT, np.int32).tobytes(), params, (), "", 1e18))
    heard: dict[int, Ended] = {}
    while not engine.idle:
        for output in engine.step():
            for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                heard.setdefault(request_id, Ended()).token_ids.append(token)
            for finish in output.finishes:
                heard.setdefault(finish.request_id, Ended()).finish = finish
    outcomes: Counter[str] = Counter()
    for request_id, (tools, answer) in asked.items():
        outcomes[heard[request_id].reason] += 1
        if heard[request_id].reason == "stop":
            check(heard[request_id].text, tools, answer)
    return outcomes


def check(text: str, tools: list[dict[str, Any]], form: AnswerForm) -> None:
    parser = form.parser()
    (call,) = message_of([*parser.feed(text), *parser.finish()]).calls
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    try:
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])
    except (ValueError, jsonschema.ValidationError, KeyError) as error:
        raise AssertionError(f"{text!r} is no call of {schemas}: {call} ({error})") from None


@pytest.mark.parametrize("format_name", ["hermes", "llama3_json"])
def test_some_random_tools_are_called_as_their_schemas_say(tmp_path: Path, format_name: str) -> None:
    outcomes = answers(tmp_path, 0, 12, format_name)
    assert set(outcomes) <= {"stop", "length"} and outcomes["stop"] >= 10, outcomes


@pytest.mark.long
@pytest.mark.parametrize("format_name", ["hermes", "llama3_json", "kimi", "deepseek", "deepseek_v3_1"])
def test_two_thousand_random_tools_are_called_as_their_schemas_say(tmp_path: Path, format_name: str) -> None:
    """The formats whose arguments are JSON. In qwen3_coder's, values are text without types: its grammar lets a space
    follow a text of maxLength characters, and the call then has one more.
    """
    outcomes = answers(tmp_path, 1, 420, format_name)
    print(format_name, dict(outcomes))
    assert set(outcomes) <= {"stop", "length"} and outcomes["stop"] >= 400, outcomes
