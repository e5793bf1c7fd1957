"""Answers in each family's format: what they say is read alike whole and at every cut, and nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_client.openai.formats.events import CallArguments, Content, Message, message_of
from paged_client.openai.formats.families import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    reasoning_format_of,
    tool_format_of,
    types_of,
)
from paged_client.openai.formats.parser import AnswerForm
from paged_client.openai.formats.written_calls import pythonic_calls

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "deep": {"type": "object"}},
            },
        },
    }
    for name in ("get_weather", "f")
]
TYPES = types_of(TOOLS)
THINK = REASONING_FORMATS[0]


@dataclass(frozen=True)
class Case:
    format: str
    text: str
    content: str
    calls: Sequence[tuple[str, dict[str, Any]]]
    reasoning: str = ""

    @property
    def form(self) -> AnswerForm:
        reasoning = None if self.format == "harmony" else THINK
        return AnswerForm(TOOL_FORMATS[self.format], reasoning, types=TYPES)


PARIS = ("get_weather", {"city": "Paris", "days": 2})
TRICKY = ("f", {"city": 'a "quoted" } </tool_call> \\ é \n line', "deep": {"x": [1, {"y": "]"}]}})
CASES = {
    "hermes": Case(
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>',
        "",
        [PARIS],
    ),
    "hermes, text and two": Case(
        "hermes",
        'I look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
        f'<tool_call>\n{{"arguments": {json.dumps(TRICKY[1])}, "name": "f"}}\n</tool_call>',
        "I look.",
        [PARIS, TRICKY],
    ),
    "hermes, thought": Case(
        "hermes",
        '<think>\nWhich city?\n\n</think>\n\nHere: <tool_call>{"name": "f", "arguments": {}}</tool_call> done',
        "Here:done",
        [("f", {})],
        "Which city?",
    ),
    "hermes, arguments as text": Case(
        "hermes", '<tool_call>{"name": "f", "arguments": "{\\"days\\": 1}"}</tool_call>', "", [("f", {"days": 1})]
    ),
    "hermes, no arguments": Case("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
    "hermes, no call": Case(
        "hermes",
        "<tool_call>not json</tool_call> and < more <tool",
        "<tool_call>not json</tool_call> and < more <tool",
        [],
    ),
    "hermes, other json": Case("hermes", '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    "qwen3_coder": Case(
        "qwen3_coder",
        "Well.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=f>\n</function>\n</tool_call>",
        "Well.",
        [PARIS, ("f", {})],
    ),
    "qwen3_coder, values": Case(
        "qwen3_coder",
        '<tool_call>\n<function=f>\n<parameter=city>\n 12 <b>\nx\n</parameter>\n<parameter=deep>\n{"x": '
        "[1]}\n</parameter>\n"
        "<parameter=other>\ntrue\n</parameter>\n</function>\n</tool_call>",
        "",
        [("f", {"city": " 12 <b>\nx", "deep": {"x": [1]}, "other": True})],
    ),
    "glm": Case(
        "glm",
        "<think>hm</think>\nOk\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>f\n</tool_call>",
        "Ok",
        [PARIS, ("f", {})],
        "hm",
    ),
    "llama3_json": Case(
        "llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}', "", [PARIS]
    ),
    "llama3_json, two": Case(
        "llama3_json",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris", "days": 2}}; '
        '{"name": "f", "parameters": {}}',
        "",
        [PARIS, ("f", {})],
    ),
    "llama3_json, an answer that is JSON": Case(
        "llama3_json", '{"city": "Paris", "n": [1]}', '{"city": "Paris", "n": [1]}', []
    ),
    "llama3_json, another name": Case("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    "llama3_json, text": Case("llama3_json", " Hello {you}", " Hello {you}", []),
    "pythonic": Case(
        "pythonic",
        '[get_weather(city="Paris", days=2), f(deep={"x": [1, {"y": "]"}]})]',
        "",
        [PARIS, ("f", {"deep": TRICKY[1]["deep"]})],
    ),
    "pythonic, a list": Case("pythonic", "[1, 2]", "[1, 2]", []),
    "pythonic, prose": Case("pythonic", "[see below] f(x)", "[see below] f(x)", []),
    "mistral": Case(
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}, {"name": "f", '
        '"arguments": {}}]',
        "",
        [PARIS, ("f", {})],
    ),
    "mistral, newer": Case(
        "mistral",
        'So:[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 2}[TOOL_CALLS]f{}',
        "So:",
        [PARIS, ("f", {})],
    ),
    "deepseek": Case(
        "deepseek",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Paris", '
        '"days": 2}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        [PARIS, ("f", {})],
    ),
    "deepseek_v3_1": Case(
        "deepseek_v3_1",
        'thinking</think>Yes<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris", '
        '"days": 2}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "thinking</think>Yes",
        [PARIS, ("f", {})],
    ),
    "kimi": Case(
        "kimi",
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": '
        '"Paris", "days": 2}<|tool_call_end|>'
        "<|tool_call_begin|>functions.f:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "",
        [PARIS, ("f", {})],
    ),
    "granite": Case(
        "granite", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}]', "", [PARIS]
    ),
    "gemma": Case(
        "gemma",
        '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>'
        '<|tool_call>call:f{deep:{x:[1,{y:<|"|>a:{b,c: "d"<|"|>}]}}<tool_call|>',
        "",
        [PARIS, ("f", {"deep": {"x": [1, {"y": 'a:{b,c: "d"'}]}})],
    ),
    "harmony": Case(
        "harmony",
        "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary<|message|>I "
        "look it up.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": '
        '"Paris", "days": 2}<|call|>',
        "I look it up.",
        [PARIS],
        "Let me see.",
    ),
    "harmony, recipient first": Case(
        "harmony",
        "<|channel|>analysis<|message|>a < b<|end|><|start|>assistant to=functions.f<|channel|>commentary "
        "json<|message|>{}<|call|>",
        "",
        [("f", {})],
        "a < b",
    ),
    "harmony, final": Case("harmony", "<|channel|>final<|message|>Four.<|return|>", "Four.", []),
    "harmony, none": Case("harmony", "Four.", "Four.", []),
    "thinks only": Case("hermes", "<think>on and on", "", [], "on and on"),
    "space inside": Case("hermes", "a  \n\n b <b> c\n", "a  \n\n b <b> c\n", []),
}


def read(form: AnswerForm, pieces: Sequence[str]) -> Message:
    parser = form.parser()
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    assert parser.num_calls == len(message_of(events).calls)
    assert all(event.text for event in events if isinstance(event, (Content, CallArguments)))
    return message_of(events)


def said(message: Message) -> tuple[str, str, list[tuple[str, dict[str, Any]]]]:
    return message.content, message.reasoning, [(call.name, json.loads(call.arguments)) for call in message.calls]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_an_answer_is_read_alike_whole_and_at_every_cut(case: Case) -> None:
    expected = (case.content, case.reasoning, [(name, arguments) for name, arguments in case.calls])
    assert said(read(case.form, [case.text])) == expected
    assert said(read(case.form, list(case.text))) == expected
    for cut in range(1, len(case.text)):
        assert said(read(case.form, [case.text[:cut], case.text[cut:]])) == expected, case.text[:cut]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 400), max_size=30), st.data())
def test_an_answer_may_be_cut_anywhere_and_end_anywhere(name: str, cuts: list[int], data: st.DataObject) -> None:
    case = CASES[name]
    text = case.text[: data.draw(st.integers(0, len(case.text)))]
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[start:end] for start, end in pairwise(places)]
    whole, cut = read(case.form, [text]), read(case.form, pieces)
    assert (whole.content, whole.reasoning) == (cut.content, cut.reasoning)
    assert [(call.name, call.arguments) for call in whole.calls] == [(call.name, call.arguments) for call in cut.calls]


MARKERS = [
    *(
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", "arguments": {',
        "}}",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<think>",
        "</think>",
        "<",
        "{",
        "}",
        "[",
    ),
    *(
        "<|channel|>",
        "<|message|>",
        "<|end|>",
        "to=functions.f",
        "<function=f>",
        "<parameter=city>",
        "</parameter>",
        "</function>",
        "é",
        "\n",
        " ",
    ),
    *(
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        "[f(",
        ")]",
        '"',
        "\\",
        "a=1",
        ",",
    ),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(TOOL_FORMATS)), st.lists(st.sampled_from(MARKERS), max_size=14))
def test_nothing_that_a_model_says_breaks_a_parser_and_pieces_are_as_the_whole(name: str, words: list[str]) -> None:
    form = AnswerForm(TOOL_FORMATS[name], None if name == "harmony" else THINK, types=TYPES)
    whole, cut = read(form, ["".join(words)]), read(form, list("".join(words)))
    assert (whole.content, whole.reasoning) == (cut.content, cut.reasoning)
    assert [(call.name, call.arguments) for call in whole.calls] == [(call.name, call.arguments) for call in cut.calls]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='ab<>{}[]\n tolcaf_=|/"', max_size=40))
def test_text_without_calls_is_the_content_to_the_letter(text: str) -> None:
    form = AnswerForm(TOOL_FORMATS["hermes"], types=TYPES)
    if "<tool_call>" not in text:
        assert read(form, list(text)).content == text


def test_arguments_are_streamed_and_the_name_comes_first() -> None:
    parser = AnswerForm(TOOL_FORMATS["hermes"], types=TYPES).parser()
    text = CASES["hermes"].text
    events = [event for char in text for event in parser.feed(char)]
    arguments = [event for event in events if isinstance(event, CallArguments)]
    assert type(events[0]).__name__ == "CallBegun" and len(arguments) > 20
    assert "".join(event.text for event in arguments) == '{"city": "Paris", "days": 2}'


def test_a_thought_that_the_prompt_has_begun_is_no_content() -> None:
    form = AnswerForm(None, THINK, begins_reasoning=True)
    for pieces in (["hm\n</think>\n\nYes."], list("hm\n</think>\n\nYes."), ["<think>hm</think>Yes."]):
        message = read(form, pieces)
        assert (message.reasoning, message.content) == ("hm", "Yes.")
    assert read(form, ["only thought"]).reasoning == "only thought"


def test_a_checkpoints_own_response_template_is_followed() -> None:
    pytest.importorskip("transformers")
    template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<bot>",
        "fields": {
            "reasoning_content": {"open": "<t>", "close": "</t>", "content": "text"},
            "tool_calls": {
                "open": "<c>",
                "close": "</c>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": "<end>", "content": "text"},
        },
    }
    form = AnswerForm(types=TYPES, template=template, prompt_end="<bot><t>")
    text = 'hm</t>So.<c>{"name": "get_weather", "arguments": {"city": "Paris", "days": "2"}}</c>'
    for pieces in ([text], list(text)):
        assert said(read(form, pieces)) == ("So.", "hm", [PARIS])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ('{% if tools %}<tool_call>\\n{"name": <function-name>, "arguments": …}</tool_call>{% endif %}', "hermes"),
        ("{% if tools %}<tool_call>\n<function=example>\n<parameter=x>{% endif %}", "qwen3_coder"),
        ("{% for tc in message.tool_calls %}<tool_call>{{ tc.name }}<arg_key>{% endfor %}", "glm"),
        ('{%- if tools %}Respond in the format {"name": function name, "parameters": …}{% endif %}', "llama3_json"),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral"),
        ("{% if tool %}<｜tool▁call▁begin｜>function<｜tool▁sep｜>{% endif %}", "deepseek"),
        ("{% if tool %}<｜tool▁call▁begin｜>{{ name }}<｜tool▁sep｜>{% endif %}", "deepseek_v3_1"),
        ("{% if tools %}<|tool_calls_section_begin|><|tool_call_begin|>{% endif %}", "kimi"),
        ("{% if tools %}<|channel|>commentary{% endif %}", "harmony"),
        ("{% if tools %}<|tool_call|>{% endif %}", "granite"),
        ("{% if tools %}<|tool_call>call:{% endif %}", "gemma"),
        ("{% if tools %}[func_name1(params_name1=params_value1){% endif %}", "pythonic"),
        ("{{ message.content }}", None),
    ],
    ids=lambda value: str(value)[-20:],
)
def test_a_chat_template_tells_the_format(template: str, name: str | None) -> None:
    found = tool_format_of(template)
    assert (None if found is None else found.name) == name


def test_a_chat_template_tells_how_the_model_thinks() -> None:
    assert reasoning_format_of("{{ '<think>\\n' }}</think>") == THINK
    assert reasoning_format_of("[THINK]…[/THINK]") == REASONING_FORMATS[1]
    assert reasoning_format_of("{{ message.content }}") is None


def test_a_tool_may_have_a_name_that_python_has_not() -> None:
    text = '[look-up(q="look-up(x)"), a.b(n=1)]'
    assert pythonic_calls(text, ["look", "look-up", "a.b"]) == [("look-up", '{"q": "look-up(x)"}'), ("a.b", '{"n": 1}')]
    with pytest.raises(ValueError, match="not a call"):
        pythonic_calls(text, ["a.b"])
