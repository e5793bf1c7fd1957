"""Tools and reasoning through the gateway's application: what the server is asked, and what the caller hears, streamed
and whole.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from paged_client import AsyncPagedClient
from paged_client.openai.answer_forms import FormOptions
from paged_client.openai.model_card import ModelCard
from paged_client.openai.unknown_keys import WARNING_HEADER
from paged_client.question import Question
from tests.unit.client.gateway_calls import HI, Call, Outputs, Transport, call, described

HERMES = "{% if tools %}<tool_call>{{ tools }}</tool_call>{% endif %}"
THINKS = HERMES + "<think></think>{% if enable_thinking %}…{% endif %}"
CLOSER = 9


def tool(name: str = "get_weather", **function: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **function}}


class Model(Transport):
    """Answers with the same pieces always, and tells of its template."""

    def __init__(
        self, template: str, *texts: str, ids: Sequence[Sequence[int]] = (), end: str = "", special: Sequence[str] = ()
    ) -> None:
        pieces = [
            {
                "text_output": [text],
                "output_ids": list(ids[at]) if ids else [7],
                "finish_reason": ["stop" if at == len(texts) - 1 else "None"],
                "num_input_tokens": [5],
                "num_cached_tokens": [0],
            }
            for at, text in enumerate(texts)
        ]
        super().__init__(*pieces)
        self.description = described(chat_templates={"default": template}, special_words=list(special))
        self.end = end
        self.probes: list[Question] = []

    def ask(self, question: Question) -> Call:
        task = question.tensors.get("task")
        if task in ("tokenize", "detokenize"):
            self.probes.append(question)
            ids = [CLOSER] if "text_input" in question.tensors else [1, 2]
            answer: Outputs = {
                "text_output": [self.end if task == "detokenize" else ""],
                "output_ids": ids,
                "finish_reason": ["stop"],
            }
            return Call(self, [answer])
        return super().ask(question)


def ask(model: Model, options: FormOptions | None = None, **keys: Any) -> dict[str, Any]:
    reply = call(model, "/v1/chat/completions", {"model": "m", "messages": HI, **keys}, forms=options)
    assert reply.status == 200, reply.text
    choice: dict[str, Any] = reply.json["choices"][0]
    choice["usage"] = reply.json["usage"]
    return choice


def stream(model: Model, **keys: Any) -> tuple[list[dict[str, Any]], str, list[dict[str, Any]]]:
    """(deltas, finish_reason, chunks)"""
    *chunks, done = call(model, "/v1/chat/completions", {"model": "m", "messages": HI, "stream": True, **keys}).events
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    (reason,) = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return [choice["delta"] for choice in choices], reason, chunks


CALL = ("Let me look. <tool", '_call>\n{"name": "get_weather", "argu', 'ments": {"city": "Pa', 'ris"}}\n</tool_call>')


def test_a_call_comes_back_as_openai_has_it() -> None:
    model = Model(HERMES, *CALL)
    choice = ask(model, tools=[tool()])
    assert choice["finish_reason"] == "tool_calls"
    (made,) = choice["message"]["tool_calls"]
    assert made["id"].startswith("call_") and made["type"] == "function"
    assert made["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert choice["message"]["content"] == "Let me look."
    assert json.loads(str(model.asked[0].tensors["tools"])) == [tool()]


def test_a_streamed_call_has_its_name_first_and_then_pieces_of_its_arguments() -> None:
    deltas, reason, _ = stream(Model(HERMES, *CALL), tools=[tool()])
    assert reason == "tool_calls"
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[1] == {"content": "Let me look."}
    first, *others = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert (first["index"], first["function"], first["type"]) == (
        0,
        {"name": "get_weather", "arguments": ""},
        "function",
    )
    assert [piece["function"]["arguments"] for piece in others] == ['{"city": "Pa', 'ris"}']
    assert all(set(piece) == {"index", "function"} for piece in others)


def test_without_tools_the_text_is_the_answer() -> None:
    for keys in ({}, {"tools": [tool()], "tool_choice": "none"}, {"tools": []}):
        model = Model(HERMES, *CALL)
        choice = ask(model, **keys)
        assert choice["message"] == {"role": "assistant", "content": "".join(CALL), "refusal": None}
        assert "tools" not in model.asked[0].tensors and choice["finish_reason"] == "stop"


def test_only_one_call_if_the_caller_wants_no_more() -> None:
    two = '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g", "arguments": {}}</tool_call>'
    assert len(ask(Model(HERMES, two), tools=[tool("f")])["message"]["tool_calls"]) == 2
    assert len(ask(Model(HERMES, two), tools=[tool("f")], parallel_tool_calls=False)["message"]["tool_calls"]) == 1
    deltas, _, _ = stream(Model(HERMES, two), tools=[tool("f")], parallel_tool_calls=False)
    assert {piece["index"] for delta in deltas for piece in delta.get("tool_calls", ())} == {0}


@pytest.mark.parametrize(
    ("keys", "choice", "strict"),
    [
        ({"tool_choice": "required"}, "required", [True, True]),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            {"type": "function", "function": {"name": "f"}},
            [True, True],
        ),
        ({"tools": [tool(strict=True), tool("f")]}, "auto", [True, False]),
    ],
    ids=["required", "named", "strict"],
)
def test_what_must_be_called_is_enforced_by_the_server(keys: dict[str, Any], choice: Any, strict: list[bool]) -> None:
    model = Model(HERMES, *CALL)
    assert ask(model, **{"tools": [tool(), tool("f")], "parallel_tool_calls": False, **keys})["message"]["tool_calls"]
    tag = model.sampling["structured_outputs"]["structural_tag"]
    assert (tag["model"], tag["tool_choice"], tag["reasoning"], tag["parallel_tool_calls"]) == (
        "qwen_3",
        choice,
        "disabled",
        False,
    )
    assert [each["function"]["strict"] for each in tag["tools"]] == strict


def test_a_format_that_cannot_be_enforced_is_json_where_a_call_must_come() -> None:
    model = Model("{% if tools %}[TOOL_CALLS]{% endif %}", '{"name": "get_weather", "parameters": {"city": "Oslo"}}')
    assert (
        ask(model, tools=[tool()], tool_choice="required")["message"]["tool_calls"][0]["function"]["arguments"]
        == '{"city": "Oslo"}'
    )
    assert model.sampling["structured_outputs"]["structural_tag"]["model"] == "llama"


def test_markers_that_are_special_tokens_are_seen_and_other_special_words_are_not() -> None:
    model = Model(
        HERMES,
        "<s>So ",
        '<tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>',
        special=["<tool_call>", "</tool_call>", "<|im_end|>", "<s>"],
    )
    choice = ask(model, tools=[tool("f")])
    assert model.sampling["skip_special_tokens"] is False
    assert choice["message"]["content"] == "So" and choice["message"]["tool_calls"]
    plain = Model(HERMES, "x", special=["<|im_end|>"])
    ask(plain, tools=[tool("f")])
    assert "skip_special_tokens" not in plain.sampling


def test_the_operator_may_name_the_format() -> None:
    model = Model("{{ messages }}", '{"name": "get_weather", "parameters": {}}')
    assert ask(model, FormOptions("llama3_json"), tools=[tool()])["message"]["tool_calls"]
    assert ask(Model(HERMES, *CALL), FormOptions("none"), tools=[tool()])["message"]["content"] == "".join(CALL)
    with pytest.raises(ValueError, match="--tool-format nonesuch: expected one of auto, none, template, harmony"):
        FormOptions("nonesuch").check()


@pytest.mark.parametrize(
    ("keys", "param"),
    [
        ({"tools": [{}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"tools": [tool(parameters=3)]}, "tools.0.function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        (
            {
                "tools": [tool()],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            },
            "tool_choice",
        ),
        ({"tools": [tool()], "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [tool()], "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
        ({"reasoning_effort": "hard"}, "reasoning_effort"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_about_tools_is_named(keys: dict[str, Any], param: str) -> None:
    reply = call(Model(HERMES, "x"), "/v1/chat/completions", {"model": "m", "messages": HI, **keys})
    assert (reply.status, reply.json["error"]["param"]) == (400, param)


# ---- reasoning

THOUGHT = ("Hm", "m.\n</th", "ink>\n\nYes.")
IDS = [[3], [4, CLOSER], [5, 6]]


def test_what_the_model_thinks_is_told_apart() -> None:
    model = Model(THINKS, *THOUGHT, ids=IDS, end="<|assistant|>\n<think>\n")
    choice = ask(model, chat_template_kwargs={"enable_thinking": True})
    message = choice["message"]
    assert (message["content"], message["reasoning_content"], message["reasoning"]) == ("Yes.", "Hmm.", "Hmm.")
    assert choice["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}
    assert model.sampling["chat_template_kwargs"] == {"enable_thinking": True}
    probe = json.loads(str(model.probes[0].tensors["sampling_parameters"]))
    assert probe == {"chat_template_kwargs": {"enable_thinking": True}}, "the prompt's end depends on them"


def test_streamed_thoughts_come_first_and_are_counted() -> None:
    model = Model(THINKS, *THOUGHT, ids=IDS, end="<think>\n")
    deltas, reason, chunks = stream(model, stream_options={"include_usage": True})
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hmm."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Yes."
    assert reason == "stop" and chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}


def test_a_prompt_that_has_ended_the_thought_leaves_none() -> None:
    message = ask(Model(THINKS, "Yes.", end="<think>\n\n</think>\n\n"))["message"]
    assert (message["content"], "reasoning" in message) == ("Yes.", False)


def test_thoughts_may_be_left_out_or_left_in() -> None:
    assert "reasoning" not in ask(Model(THINKS, *THOUGHT, end="<think>"), include_reasoning=False)["message"]
    model = Model(THINKS, *THOUGHT, end="<think>")
    assert ask(model, FormOptions(reasoning=False))["message"]["content"] == "".join(THOUGHT)
    assert model.probes == []


@pytest.mark.parametrize(
    ("effort", "variables"),
    [
        ("low", {"reasoning_effort": "low", "enable_thinking": True, "thinking": True}),
        ("none", {"enable_thinking": False, "thinking": False}),
    ],
)
def test_an_effort_reaches_the_template_by_the_names_that_templates_have(
    effort: str, variables: dict[str, Any]
) -> None:
    model = Model(THINKS, "Yes.")
    ask(model, reasoning_effort=effort)
    assert model.sampling["chat_template_kwargs"] == variables


def test_the_model_is_asked_once_for_all_callers() -> None:
    """The end of a prompt and the tokens of markers do not change while a model is loaded."""
    model = Model(THINKS, "Yes.", end="<think>")
    client = AsyncPagedClient("nowhere:1")
    client._transport = model
    card = ModelCard(client)

    async def scenario() -> None:
        for _ in range(3):
            await card.description()
            assert await card.prompt_end({"enable_thinking": True}) == "<think>"
            assert await card.token_of("</think>") == CLOSER
        assert len(model.probes) == 3
        model.description = described(max_model_len=1)
        card._asked_at = float("-inf")
        await card.description()
        await card.prompt_end({"enable_thinking": True})
        assert len(model.probes) == 5

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "text", ['{"a": "\\ud83d"}', '{"a": NaN}', "[1]", '"x"', "{" * 3000, '{"a": '], ids=lambda text: text[:9]
)
def test_a_conversation_goes_on_after_a_call_whose_arguments_are_no_object(text: str) -> None:
    """As an agent says it: what the model wrote, and then what is wrong with that."""
    model = Model(HERMES, "Sorry.")
    made = {"id": "c", "type": "function", "function": {"name": "f", "arguments": text}}
    messages = [*HI, {"role": "assistant", "tool_calls": [made]}, {"role": "tool", "tool_call_id": "c", "content": "?"}]
    assert call(model, "/v1/chat/completions", {"model": "m", "messages": messages}).status == 200
    (found,) = json.loads(str(model.asked[0].tensors["messages"]))[1]["tool_calls"]
    assert found["function"]["arguments"] == {"arguments": text}


def test_a_hint_that_is_not_followed_is_told() -> None:
    reply = call(Model(HERMES, "x"), "/v1/chat/completions", {"model": "m", "messages": HI, "verbosity": "low"})
    assert (reply.status, reply.headers[WARNING_HEADER]) == (200, "ignored: verbosity")


def test_a_picture_that_a_tool_has_found_ends_no_conversation() -> None:
    made = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    result = {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "a"}, picture]}
    body = {"model": "m", "messages": [*HI, {"role": "assistant", "tool_calls": [made]}, result]}
    model = Model(HERMES, "x")
    reply = call(model, "/v1/chat/completions", body)
    assert (reply.status, reply.headers[WARNING_HEADER]) == (200, "ignored: messages.2.content.1.image_url")
    told = json.loads(str(model.asked[0].tensors["messages"]))[2]["content"]
    assert told == "a\n[image: left out, since only text can be read here]"
    refused = call(Model(HERMES, "x"), "/v1/chat/completions", body, strict=True)
    assert (refused.status, refused.json["error"]["param"]) == (400, "messages.2.content.1.type")
    shown = {"model": "m", "messages": [{"role": "user", "content": [picture]}]}
    assert call(Model(HERMES, "x"), "/v1/chat/completions", shown).json["error"]["param"] == "messages.0.content"
