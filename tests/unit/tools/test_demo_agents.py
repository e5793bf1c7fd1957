"""tools/demo_model: conversations with tools and thoughts, the template that writes them, the model with experts."""

from __future__ import annotations

import ast
import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_client.openai.formats.events import message_of
from paged_client.openai.formats.families import reasoning_format_of, tool_format_of, types_of
from paged_client.openai.formats.parser import AnswerForm
from tools.demo_model import model_files, thinking, tool_use
from tools.demo_model.chat import CALL, EOS, MARKERS, THINK, THINK_END, TOOL, Dialogue, Weight, rendered
from tools.demo_model.mixture import mixture
from tools.demo_model.model import DemoModel, Shape, documents_of, masked_attention, routed
from tools.demo_model.shards import ID_BITS, encoded, make_tokenizer, token_ids
from tools.demo_model.template import CHAT_TEMPLATE
from tools.demo_model.vocabulary import LATER_TOKENS, with_later_tokens
from tools.demo_model.world import Split

_FORM = AnswerForm(tool_format_of(CHAT_TEMPLATE), reasoning_format_of(CHAT_TEMPLATE))
_SMALL = Shape(
    hidden_size=64, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, num_experts=4
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer(num_conversations=150)


@pytest.fixture(scope="module")
def with_tools() -> list[Dialogue]:
    return [tool_use.dialogue(random.Random(f"test {seed}"), split) for split in Split for seed in range(250)]


@pytest.fixture(scope="module")
def with_thoughts() -> list[Dialogue]:
    return [thinking.dialogue(random.Random(f"test {seed}"), split) for split in Split for seed in range(250)]


def as_messages(found: Dialogue) -> list[dict[str, Any]]:
    """The turns as a client sends them: calls apart, the tools not in the system's words, thoughts left out."""
    messages: list[dict[str, Any]] = []
    for turn in found.turns:
        said: dict[str, Any] = {"role": turn.role, "content": turn.text}
        if turn.role == "system":
            said["content"] = turn.text.partition("Tools:\n")[0].strip()
            if not said["content"]:
                continue
        elif turn.role == "assistant" and CALL in turn.text:
            calls = [json.loads(text) for text in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", turn.text)]
            said |= {"content": None, "tool_calls": [{"type": "function", "function": call} for call in calls]}
        messages.append(said)
    return messages


# ---- what is said


@cache
def validator_of(schema: str) -> jsonschema.Draft202012Validator:
    """A schema is checked once, however many calls follow it."""
    jsonschema.Draft202012Validator.check_schema(json.loads(schema))
    return jsonschema.Draft202012Validator(json.loads(schema))


def test_every_call_is_one_that_its_schema_allows(with_tools: list[Dialogue]) -> None:
    num_calls = 0
    for each in with_tools:
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in each.tools}
        assert len(schemas) == len(each.tools)
        for turn in each.turns:
            parser = _FORM.parser()
            said = message_of([*parser.feed(turn.text), *parser.finish()])
            assert (CALL in turn.text) == bool(said.calls)
            for call in said.calls:
                strict = {"additionalProperties": False} | schemas[call.name]
                validator_of(json.dumps(strict)).validate(json.loads(call.arguments))
                num_calls += 1
    assert num_calls > 600


def test_every_call_gets_its_result_and_an_answer(with_tools: list[Dialogue]) -> None:
    for each in with_tools:
        owed = 0
        for turn, following in zip(each.turns, [*each.turns[1:], None], strict=True):
            owed += turn.text.count(CALL) - (turn.role == "tool")
            assert owed >= 0
            if turn.role == "tool" and owed == 0:
                assert following is None or following.role == "assistant"
        assert owed == 0 or each.thinks, "a thought may be the last thing before a call"


def test_what_a_calculator_is_asked_is_what_it_answers(with_tools: list[Dialogue]) -> None:
    num_checked = 0
    for each in with_tools:
        for call, result, answer in zip(each.turns, each.turns[1:], each.turns[2:], strict=False):
            if (
                call.kind == "tools: call of a calculator"
                and answer.kind == "tools: sum"
                and not answer.text.startswith(THINK)
            ):
                values = list(json.loads(call.text.split("\n")[1])["arguments"].values())
                number = json.loads(result.text)
                number = next(iter(number.values())) if isinstance(number, dict) else number
                assert number == _worked_out(values, call.text), (call, result)
                assert str(number) in answer.text
                num_checked += 1
    assert num_checked > 60


def _worked_out(values: list[Any], call: str) -> float:
    """values: an expression; or a list; or two numbers and perhaps the operation, which else the tool's name says."""
    if len(values) == 1:
        return _value(ast.parse(values[0], mode="eval").body) if isinstance(values[0], str) else sum(values[0])
    first, second = (value for value in values if not isinstance(value, str))
    sign = next((value for value in values if isinstance(value, str)), call.lower())
    if sign in ("add", "+") or (sign is not values[-1] and re.search("add|sum|plus", sign)):
        return first + second
    if sign == "-" or re.search("subtract|minus", sign):
        return first - second
    return first * second if sign == "*" or re.search("multiply|times", sign) else first / second


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        found = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}
        return found[type(node.op)] if type(node.op) in found else left / right
    assert isinstance(node, ast.Constant) and isinstance(node.value, int)
    return node.value


def test_every_step_of_a_thought_is_right_and_leads_to_the_answer(with_thoughts: list[Dialogue]) -> None:
    num_steps = 0
    for each in with_thoughts:
        assert each.thinks and not any(THINK in turn.text for turn in each.turns[:-1])
        thought, answer = each.turns[-1].text.removeprefix(THINK).split(THINK_END)
        if thought.startswith("It was said"):
            continue
        for left, right in re.findall(r"([\d+*/ -]*\d) = (-?\d+)", f"{thought}\n{answer}"):
            assert _value(ast.parse(left.strip(" -+*/"), mode="eval").body) == int(right), each.turns[-1]
            num_steps += 1
        counted = re.search(r"How (?:many times|often).*?(?:letter |does )(\w)\b.* in (\w+)\?$", each.turns[-2].text)
        if counted and "letters" in each.turns[-1].kind:
            assert thought.endswith(f" {counted[2].count(counted[1])}")
    assert num_steps > 500


def test_no_fact_of_the_exam_is_in_the_training_text_and_hardly_a_tools_name(
    with_tools: list[Dialogue], with_thoughts: list[Dialogue]
) -> None:
    trained, held_out = (
        {fact for each in some for fact in each.facts}
        for some in ((*with_tools[:250], *with_thoughts[:250]), (*with_tools[250:], *with_thoughts[250:]))
    )
    assert len(trained) > 300 and len(held_out) > 300
    assert not trained & held_out
    names = [
        {tool["function"]["name"] for each in some for tool in each.tools}
        for some in (with_tools[:250], with_tools[250:])
    ]
    assert len(names[0] & names[1]) <= len(names[0]) // 20


def test_only_a_dialogues_own_answers_count_fully(tokenizer: Tokenizer, with_tools: list[Dialogue]) -> None:
    (row,) = encoded(tokenizer, [with_tools[0]])
    roles = {tokenizer.token_to_id(f"<|{role}|>"): role for role in ("system", "user", "assistant", "tool")}
    role = ""
    for token, code in zip(
        token_ids(np.array(row, np.int16)).tolist(), [value >> ID_BITS for value in row], strict=True
    ):
        if token in roles:
            role = roles[token]
        elif code == Weight.EXACT.value:
            assert role == "assistant"


def test_whether_to_think_is_not_learned(tokenizer: Tokenizer, with_thoughts: list[Dialogue]) -> None:
    opener = tokenizer.token_to_id(THINK)
    for row in encoded(tokenizer, with_thoughts[:40]):
        ids = token_ids(np.array(row, np.int16)).tolist()
        assert [value >> ID_BITS for value, token in zip(row, ids, strict=True) if token == opener] == [
            Weight.NONE.value
        ]


def test_the_mixture_has_all_three(tokenizer: Tokenizer) -> None:
    stream = mixture("agents", "0", Split.TRAIN)
    some = [next(stream) for _ in range(300)]
    tokens = {"conversation": 0, "tools": 0, "thought": 0}
    for each, ids in zip(some, encoded(tokenizer, some), strict=True):
        kind = "conversation" if not isinstance(each, Dialogue) else "tools" if each.tools else "thought"
        tokens[kind] += len(ids)
    shares = {kind: count / sum(tokens.values()) for kind, count in tokens.items()}
    assert 0.45 < shares["conversation"] < 0.65 and shares["tools"] > 0.2 and shares["thought"] > 0.08


# ---- tokenizer and template


def test_what_came_later_has_ids_that_no_text_needed(tokenizer: Tokenizer) -> None:
    assert with_later_tokens(tokenizer).to_str() == tokenizer.to_str(), "twice is once"
    for token in LATER_TOKENS:
        ids = tokenizer.encode(f"a{token}b", add_special_tokens=False).ids
        assert ids[1] == tokenizer.token_to_id(token) and len(ids) == 3
        shown = tokenizer.decode(ids)
        assert (token in shown) == (token in MARKERS), "a marker is text, a role is not"
    assert tokenizer.token_to_id(TOOL) < tokenizer.get_vocab_size()


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    model_files.save(DemoModel(_SMALL), tokenizer, folder, torch.float32)
    return folder


def test_the_template_writes_tools_calls_and_thoughts_as_training_reads_them(
    folder: Path, with_tools: list[Dialogue], with_thoughts: list[Dialogue]
) -> None:
    loaded: Any = AutoTokenizer.from_pretrained(folder)
    for each in [*with_tools[::5], *with_thoughts[::5]]:
        options = {
            "tools": [dict(tool) for tool in each.tools] or None,
            "tokenize": False,
            "add_generation_prompt": True,
        }
        messages = as_messages(each)
        expected = rendered(each.turns[:-1], opens_answer=True)
        last = each.turns[-1]
        if last.role == "assistant":
            assert loaded.apply_chat_template(messages[:-1], **options) == expected
            opened = loaded.apply_chat_template(messages[:-1], enable_thinking=True, **options)
            assert opened == expected + THINK
            continuation = opened.removesuffix(THINK) + last.text + EOS
            assert continuation == rendered(each.turns)
            said = last.text.split(THINK_END)[-1].lstrip("\n")
            whole = loaded.apply_chat_template(messages, **options | {"add_generation_prompt": False})
            assert whole == rendered(each.turns[:-1]) + f"<|assistant|>{said}{EOS}", "thoughts do not come back"


def test_the_template_describes_schemas_of_other_shapes(folder: Path) -> None:
    loaded: Any = AutoTokenizer.from_pretrained(folder)
    properties = {
        "when": {"type": ["string", "null"]},
        "many": {"type": "array", "items": {"type": "integer"}},
        "either": {
            "anyOf": [{"type": "string"}, {"type": "number"}, {"type": "null"}],
            "description": "this\n  or that",
        },
        "free": {},
    }
    function = {"name": "f", "parameters": {"type": "object", "properties": properties, "required": ["many"]}}
    said = loaded.apply_chat_template(
        [{"role": "user", "content": "x"}],
        tools=[{"type": "function", "function": function}, {"type": "function", "function": {"name": "g"}}],
        tokenize=False,
    )
    line = '- "f"("when"?: any, "many": [integer], "either"?: string|number "this or that", "free"?: any)'
    assert said == f'<|bos|><|system|>Tools:\n{line}\n- "g"(){EOS}<|user|>x{EOS}'


def test_the_gateway_finds_calls_and_reasoning_in_the_template() -> None:
    tools, reasoning = tool_format_of(CHAT_TEMPLATE), reasoning_format_of(CHAT_TEMPLATE)
    assert tools is not None and tools.name == "hermes"
    assert reasoning is not None and (reasoning.opener, reasoning.closer) == (THINK, THINK_END)
    assert types_of([{"type": "function", "function": {"name": "g"}}]) == {"g": {}}


# ---- the model with experts


def test_the_logits_with_experts_are_those_of_transformers(folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(theirs).__name__ == "Qwen3MoeForCausalLM"
    ours = DemoModel(_SMALL)
    model_files.load(ours, folder)
    torch.manual_seed(1)
    ids = torch.randint(5, 400, (2, 60))
    ids[:, 0] = 0
    with torch.no_grad():
        expected = theirs(ids).logits
        logits, unevenness = ours.with_balance(ids, masked_attention(documents_of(ids)))
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert 0.9 < unevenness < 2


def test_evenly_used_experts_cost_one_and_a_favourite_more() -> None:
    even = torch.eye(4).repeat(1, 25, 1) * 8 + torch.eye(4).roll(1, 0).repeat(1, 25, 1) * 7.9
    shares, unevenness = routed(even, 2)
    assert float(unevenness) == pytest.approx(1, abs=1e-3)
    assert torch.allclose(shares.sum(-1), torch.ones(1, 100))
    assert ((shares > 0).sum(-1) == 2).all()
    one = torch.tensor([9.0, 8.0, 0, 0]).expand(1, 50, 4)
    assert float(routed(one, 2)[1]) > 1.8
