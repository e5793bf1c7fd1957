"""How each family of models writes its tool calls and its reasoning, and which of them a chat template speaks of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from paged_client.openai.formats.events import Calls
from paged_client.openai.formats.harmony import MARKERS as HARMONY_MARKERS
from paged_client.openai.formats.readers import HeadThenJson, JsonCalls, Reader, TaggedArguments, WholeText
from paged_client.openai.formats.written_calls import gemma_call, pythonic_calls

Types = Mapping[str, Mapping[str, Any]]  # of each tool's arguments, by the tool's name
NewReader = Callable[[Calls, str, Types], Reader]  # (calls, the marker before, types)


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written."""

    name: str
    sign: str  # a regular expression that finds the format in a chat template
    openers: Mapping[str, NewReader]  # markers that begin calls
    ignored: tuple[str, ...] = ()  # markers around calls, which say nothing more
    bare: str = ""  # a regular expression: what begins an answer that is a call without a marker
    bare_reader: NewReader | None = None
    xgrammar: str = ""  # the library's name of it; "": it has none, and calls that must come are JSON


@dataclass(frozen=True)
class ReasoningFormat:
    opener: str
    closer: str


def _json(closer: str) -> NewReader:
    return lambda calls, opener, types: JsonCalls(calls, closer, opener)


def _bare_json(calls: Calls, opener: str, types: Types) -> Reader:
    return JsonCalls(calls, "", opener, frozenset(types))


def _bare_python(calls: Calls, opener: str, types: Types) -> Reader:
    def read(text: str) -> list[tuple[str, str]]:
        found = pythonic_calls(text, types)
        if any(name not in types for name, _ in found):
            raise ValueError("not a tool")
        return found

    return WholeText(calls, opener, "", read)


class _Mistral:
    """`[TOOL_CALLS] [{…}]`, or since version 11 of its tokenizer `[TOOL_CALLS]name[ARGS]{…}`."""

    def __init__(self, calls: Calls, opener: str, types: Types) -> None:
        self._calls = calls
        self._opener = opener
        self._reader: Reader | None = None
        self._text = ""

    def feed(self, text: str, events: list[Any]) -> str | None:
        if self._reader is None:
            self._text += text
            begun = self._text.lstrip()
            if not begun:
                return None
            if begun[0] in "[{":
                self._reader = JsonCalls(self._calls, "", self._opener)
            else:
                self._reader = HeadThenJson(self._calls, "", self._opener, r"\[ARGS\]\s*|(?=\{)", _mistral_name)
            text = self._text
        return self._reader.feed(text, events)

    def finish(self, events: list[Any]) -> None:
        if self._reader is not None:
            self._reader.finish(events)


def _mistral_name(head: str) -> tuple[str, str]:
    name, _, call_id = head.partition("[CALL_ID]")
    return name.strip(), call_id.strip()


def _deepseek_name(head: str) -> tuple[str, str]:
    return head.rpartition("<｜tool▁sep｜>")[2].strip(), ""


def _kimi_name(head: str) -> tuple[str, str]:
    call_id = head.strip()
    return re.sub(r":\d+$", "", call_id).removeprefix("functions."), call_id


def _tagged(name: str, parameter: tuple[str, str], end: str) -> NewReader:
    return lambda calls, opener, types: TaggedArguments(calls, opener, name, parameter, end, types)


_DEEPSEEK_CALL = "<｜tool▁call▁begin｜>"

TOOL_FORMATS: Mapping[str, ToolFormat] = {
    found.name: found
    for found in (
        ToolFormat("harmony", r"<\|channel\|>", {}, HARMONY_MARKERS, xgrammar="harmony"),
        ToolFormat(
            "gemma",
            r"<\|tool_call>",
            {"<|tool_call>": lambda calls, opener, types: WholeText(calls, opener, "<tool_call|>", gemma_call)},
            ("<|tool_response>",),
            xgrammar="gemma_4",
        ),
        ToolFormat(
            "kimi",
            r"<\|tool_call_begin\|>",
            {
                "<|tool_call_begin|>": lambda calls, opener, types: HeadThenJson(
                    calls, "<|tool_call_end|>", opener, r"<\|tool_call_argument_begin\|>\s*", _kimi_name
                )
            },
            ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            xgrammar="kimi",
        ),
        ToolFormat(
            "deepseek",
            "<｜tool▁call▁begin｜>function",
            {
                _DEEPSEEK_CALL: lambda calls, opener, types: HeadThenJson(
                    calls,
                    "<｜tool▁call▁end｜>",
                    opener,
                    r"\s*```(?:json)?\s*(?=\{)|<｜tool▁sep｜>\s*(?=\{)",
                    _deepseek_name,
                )
            },
            ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            xgrammar="deepseek_r1",
        ),
        ToolFormat(
            "deepseek_v3_1",
            "<｜tool▁call▁begin｜>",
            {
                _DEEPSEEK_CALL: lambda calls, opener, types: HeadThenJson(
                    calls, "<｜tool▁call▁end｜>", opener, r"<｜tool▁sep｜>\s*(?=\{)", _deepseek_name
                )
            },
            ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            xgrammar="deepseek_v3_1",
        ),
        ToolFormat(
            "qwen3_coder",
            r"<function=",
            {
                "<tool_call>": _tagged(
                    r"\s*<function=(?P<name>[^>\n]+)>\s*",
                    (r"\s*<parameter=(?P<key>[^>\n]+)>", r"</parameter>\s*"),
                    r"\s*</function>\s*</tool_call>",
                )
            },
            xgrammar="qwen_3_coder",
        ),
        ToolFormat(
            "glm",
            r"<arg_key>",
            {
                "<tool_call>": _tagged(
                    r"\s*(?P<name>[^<{\n]+?)\s*(?=<arg_key>|</tool_call>)",
                    (r"\s*<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>", r"</arg_value>\s*"),
                    r"\s*</tool_call>",
                )
            },
            xgrammar="glm_4_7",
        ),
        ToolFormat("granite", r"<\|tool_call\|>", {"<|tool_call|>": _json("")}),
        ToolFormat("mistral", r"\[TOOL_CALLS\]", {"[TOOL_CALLS]": _Mistral}),
        ToolFormat("hermes", r"<tool_call>", {"<tool_call>": _json("</tool_call>")}, xgrammar="qwen_3"),
        ToolFormat(
            "pythonic",
            r"\[func_name1\(|<\|python_start\|>",
            {},
            ("<|python_start|>", "<|python_end|>"),
            r"\[\s*[A-Za-z_]",
            _bare_python,
        ),
        ToolFormat("llama3_json", r"\"parameters\"", {"<|python_tag|>": _bare_json}, (), r"\{", _bare_json, "llama"),
    )
}
ANY_MODEL = TOOL_FORMATS["llama3_json"]  # of a template that says nothing of tools: calls that must come are JSON

REASONING_FORMATS = (
    ReasoningFormat("<think>", "</think>"),
    ReasoningFormat("[THINK]", "[/THINK]"),
    ReasoningFormat("<|channel>thought\n", "<channel|>"),
    ReasoningFormat("◁think▷", "◁/think▷"),
    ReasoningFormat("<seed:think>", "</seed:think>"),
)


def tool_format_of(template: str) -> ToolFormat | None:
    """None: the template says nothing of tools."""
    if "tool" not in template:
        return None
    return next((known for known in TOOL_FORMATS.values() if re.search(known.sign, template)), None)


def reasoning_format_of(template: str) -> ReasoningFormat | None:
    """None: the template knows of none."""
    return next((known for known in REASONING_FORMATS if known.closer in template), None)


def types_of(tools: Any) -> Types:
    """Each tool's arguments' schemas, by name."""
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools or ():
        function = tool.get("function") if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, dict) else None
            found[function["name"]] = properties if isinstance(properties, dict) else {}
    return found
