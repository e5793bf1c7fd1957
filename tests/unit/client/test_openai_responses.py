"""The Responses API: items in, items and events out, conversations that go on, in the shapes of OpenAI's own
library.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")

import openai
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from paged_client.errors import UnavailableError
from paged_client.openai.conversation import settled
from paged_client.openai.errors import RefusalError
from paged_client.openai.response_items import messages_of
from paged_client.openai.response_store import ResponseStore
from paged_client.openai.unknown_keys import WARNING_HEADER
from tests.unit.client.gateway_calls import Reply, call
from tests.unit.client.test_openai_tools import CALL, HERMES, THINKS, THOUGHT, Model
from tests.unit.client.test_real_clients import KEY, MODEL, serving

TOOL = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
EVENTS = TypeAdapter(ResponseStreamEvent)


def respond(server: Model, **keys: Any) -> Reply:
    return call(server, "/v1/responses", {"model": "m", "input": "Hi", **keys})


def events_of(reply: Reply) -> list[dict[str, Any]]:
    found = []
    for block in reply.text.strip().split("\n\n"):
        kind, data = (line.partition(": ")[2] for line in block.split("\n"))
        event = json.loads(data)
        assert event["type"] == kind and event["sequence_number"] == len(found)
        EVENTS.validate_python(event)
        found.append(event)
    return found


def asked(model: Model) -> Any:
    return json.loads(str(model.asked[-1].tensors["messages"]))


def test_a_text_is_answered_by_a_message() -> None:
    model = Model(HERMES, "Hel", "lo.")
    said = respond(model, instructions="Be kind.", max_output_tokens=9, temperature=0.5).json
    response = Response.model_validate(said)
    assert (response.status, response.output_text, [item.type for item in response.output]) == (
        "completed",
        "Hello.",
        ["message"],
    )
    assert response.usage is not None and (response.usage.input_tokens, response.usage.output_tokens) == (5, 2)
    assert asked(model) == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert model.sampling["max_tokens"] == 9


@pytest.mark.parametrize(
    ("template", "texts", "end", "keys", "kinds"),
    [
        (HERMES, ("Hel", "lo."), "", {}, ["message"]),
        (HERMES, CALL, "", {"tools": [TOOL]}, ["message", "function_call"]),
        (THINKS, THOUGHT, "<think>", {}, ["reasoning", "message"]),
    ],
    ids=["text", "call", "thought"],
)
def test_the_events_of_a_stream_tell_what_the_whole_has(
    template: str, texts: Any, end: str, keys: dict[str, Any], kinds: list[str]
) -> None:
    whole = respond(Model(template, *texts, end=end), **keys).json
    events = events_of(respond(Model(template, *texts, end=end), **keys, stream=True))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == "response.completed"
    final = events[-1]["response"]
    Response.model_validate(final)
    assert [item["type"] for item in final["output"]] == kinds == [item["type"] for item in whole["output"]]
    assert (final["usage"], final["status"]) == (whole["usage"], "completed")
    for place, item in enumerate(final["output"]):
        mine = [event for event in events if event.get("output_index") == place]
        assert (mine[0]["type"], mine[-1]["type"]) == ("response.output_item.added", "response.output_item.done")
        assert mine[-1]["item"] == item and item["status"] == "completed"
        deltas = "".join(event["delta"] for event in mine if event["type"].endswith(".delta"))
        told = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert (
            deltas
            == told
            == (lambda other: other.get("arguments") or other["content"][0]["text"])(whole["output"][place])
        )


def test_a_call_and_its_output_go_back_as_a_chat() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Paris"}'},
        {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
    ]
    user, turn, result = settled(messages_of(items, []))
    assert user == {"role": "user", "content": "Weather?"}
    assert (turn["role"], turn["content"], [made["id"] for made in turn["tool_calls"]]) == (
        "assistant",
        "I look.",
        ["c1", "c2"],
    )
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "sun"}


def test_tools_choices_and_forms_have_this_apis_shapes() -> None:
    model = Model(HERMES, *CALL)
    respond(model, tools=[TOOL | {"strict": True}], tool_choice={"type": "function", "name": "get_weather"})
    tag = model.sampling["structured_outputs"]["structural_tag"]
    assert tag["tool_choice"] == {"type": "function", "function": {"name": "get_weather"}}
    schema = {"type": "object", "properties": {}}
    respond(model, text={"format": {"type": "json_schema", "name": "x", "schema": schema}})
    assert model.sampling["structured_outputs"]["json"] == schema
    respond(model, reasoning={"effort": "low"})
    assert model.sampling["chat_template_kwargs"]["reasoning_effort"] == "low"


def test_what_openai_runs_itself_is_left_out_with_a_warning() -> None:
    model = Model(HERMES, "x")
    tools = [{"type": "web_search", "external_web_access": False}, TOOL, {"type": "local_shell"}]
    reply = respond(model, tools=tools)
    assert reply.headers[WARNING_HEADER] == "ignored: tools.0.web_search, tools.2.local_shell"
    assert [tool["function"]["name"] for tool in json.loads(str(model.asked[-1].tensors["tools"]))] == ["get_weather"]
    refused = call(Model(HERMES, "x"), "/v1/responses", {"model": "m", "input": "Hi", "tools": tools}, strict=True)
    assert (refused.status, refused.json["error"]["param"]) == (400, "tools.0.type")


NAMESPACE = {"type": "namespace", "name": "crm", "description": "d", "tools": [TOOL]}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Changes files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch"'},
}


def written(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_namespaces_tool_comes_and_goes_by_its_names(stream: bool) -> None:
    model = Model(HERMES, *re.findall(r"(?s).{1,7}", written("crm__get_weather", {"city": "Paris"})))
    reply = respond(model, tools=[NAMESPACE], stream=stream)
    (item,) = events_of(reply)[-1]["response"]["output"] if stream else reply.json["output"]
    assert (item["namespace"], item["name"], json.loads(item["arguments"])) == ("crm", "get_weather", {"city": "Paris"})
    ((turn, result),) = [
        settled(messages_of([item, {"type": "function_call_output", "call_id": item["call_id"], "output": "sun"}], []))
    ]
    assert turn["tool_calls"][0]["function"]["name"] == "crm__get_weather"
    assert result == {"role": "tool", "tool_call_id": item["call_id"], "content": "sun"}
    respond(model, tools=[NAMESPACE], tool_choice={"type": "function", "name": "get_weather", "namespace": "crm"})
    tag = model.sampling["structured_outputs"]["structural_tag"]
    assert tag["tool_choice"] == {"type": "function", "function": {"name": "crm__get_weather"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ['*** Begin Patch\n+"ü"\n*** End Patch', ""])
def test_a_tool_that_takes_plain_text_is_given_it(text: str, stream: bool) -> None:
    model = Model(HERMES, *re.findall(r"(?s).{1,7}", written("apply_patch", {"input": text})))
    reply = respond(model, tools=[PATCH], stream=stream)
    (told,) = json.loads(str(model.asked[-1].tensors["tools"]))
    assert told["function"]["parameters"]["required"] == ["input"]
    assert "*** Begin Patch" in told["function"]["description"]
    events = events_of(reply) if stream else []
    (item,) = events[-1]["response"]["output"] if stream else reply.json["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "apply_patch", text)
    if stream:
        deltas = [event["delta"] for event in events if event["type"] == "response.custom_tool_call_input.delta"]
        assert "".join(deltas) == text
    output = {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "Done."}
    turn, result = settled(messages_of([item, output], []))
    assert json.loads(turn["tool_calls"][0]["function"]["arguments"]) == {"input": text}
    assert result["content"] == "Done."


def test_thoughts_before_a_call_are_there_when_its_result_is() -> None:
    """Given back as text, or sealed, as Codex keeps them; templates show those of the turn that goes on."""
    texts = ("<think>", "I must look.", "</think>", *CALL)
    model = Model(THINKS, *texts)
    body = {"tools": [TOOL], "include": ["reasoning.encrypted_content"]}
    for stream in (False, True):
        reply = respond(model, **body, stream=stream)
        output = events_of(reply)[-1]["response"]["output"] if stream else reply.json["output"]
        thought, text, made = output
        for kept in (thought, {**thought, "content": None}, {**thought, "encrypted_content": None}):
            result = {"type": "function_call_output", "call_id": made["call_id"], "output": "sun"}
            respond(model, **body, input=[{"role": "user", "content": "Weather?"}, kept, text, made, result])
            turn = asked(model)[1]
            assert (turn["reasoning_content"], turn["content"]) == ("I must look.", text["content"][0]["text"])
            assert [each["function"]["name"] for each in turn["tool_calls"]] == ["get_weather"]
    assert "encrypted_content" not in respond(model, tools=[TOOL]).json["output"][0]
    foreign = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA", "content": None}
    respond(model, input=[{"role": "user", "content": "x"}, foreign, {"role": "user", "content": "y"}])
    assert [message["content"] for message in asked(model)] == ["x\ny"]


def test_thoughts_are_kept_with_a_stored_response() -> None:
    model = Model(THINKS, "<think>", "Hm.", "</think>", "Hello.")
    with serving(model) as url, openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        first = client.responses.create(model=MODEL, input="Hi")
        client.responses.create(model=MODEL, input="And?", previous_response_id=first.id)
    assert asked(model)[1] == {"role": "assistant", "content": "Hello.", "reasoning_content": "Hm."}


def test_what_an_agent_says_between_turns_reaches_any_template() -> None:
    told = [
        ("developer", "A"),
        ("developer", "B"),
        ("user", "1"),
        ("user", "2"),
        ("assistant", "3"),
        ("developer", "C"),
    ]
    found = settled(messages_of([{"role": role, "content": text} for role, text in told], []))
    assert [(one["role"], one["content"]) for one in found] == [
        ("developer", "A\nB"),
        ("user", "1\n2"),
        ("assistant", "3"),
        ("user", "<system-reminder>\nC\n</system-reminder>"),
    ]


def test_tokens_are_counted_without_an_answer() -> None:
    model = Model(HERMES, "x")
    reply = call(model, "/v1/responses/input_tokens", {"model": "m", "input": "Hi", "tools": [TOOL]})
    assert reply.json == {"object": "response.input_tokens", "input_tokens": 2}
    assert model.asked == [] and "tools" in model.probes[-1].tensors
    wrong = call(model, "/v1/responses/input_tokens", {"model": "m", "input": "Hi", "previous_response_id": "resp_x"})
    assert (wrong.status, wrong.json["error"]["param"]) == (404, "previous_response_id")


def test_an_answer_that_is_cut_off_is_incomplete() -> None:
    model = Model(HERMES, "Hel")
    model.events = ({**model.events[0], "finish_reason": ["length"]},)
    response = Response.model_validate(respond(model).json)
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def space(name: str, tool: str) -> dict[str, Any]:
    return {"type": "namespace", "name": name, "tools": [{**TOOL, "name": tool}]}


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}


def test_an_agent_goes_on_whatever_its_tools_find_and_whatever_openai_ran_before() -> None:
    model = Model(HERMES, "x")
    items = [
        {"role": "user", "content": "Look."},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "a"}, IMAGE]},
    ]
    reply = respond(model, input=items)
    assert reply.headers[WARNING_HEADER] == "ignored: input.1.web_search_call, input.3.output.1.input_image"
    user, turn, result = asked(model)
    assert (user["content"], len(turn["tool_calls"])) == ("Look.", 1)
    assert result["content"] == "a\n[image: left out, since only text can be read here]"
    body = {"model": "m", "input": items}
    refused = call(Model(HERMES, "x"), "/v1/responses", body, strict=True)
    assert (refused.status, refused.json["error"]["param"]) == (400, "input.1.type")
    pictured = respond(model, input=[{"role": "user", "content": [IMAGE]}])
    assert (pictured.status, pictured.json["error"]["param"]) == (400, "input.0.content")


def test_what_is_known_and_not_followed_is_told() -> None:
    hints = {"truncation": "auto", "text": {"verbosity": "low"}, "include": ["reasoning.encrypted_content", "?"]}
    model = Model(HERMES, "x")
    reply = respond(model, **hints, reasoning={"effort": "max"}, max_tool_calls=1, metadata={"a": "b"})
    assert reply.headers[WARNING_HEADER] == "ignored: include.?, truncation, text.verbosity"
    assert (reply.json["truncation"], reply.json["metadata"]) == ("disabled", {"a": "b"})
    assert model.sampling["chat_template_kwargs"]["reasoning_effort"] == "xhigh"


def test_tools_that_are_left_out_may_be_allowed() -> None:
    model = Model(HERMES, *CALL)
    hosted = {"type": "web_search_2025_08_26"}
    choice = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "get_weather"}, hosted],
    }
    assert respond(model, tools=[TOOL, hosted], tool_choice=choice).status == 200
    allowed = model.sampling["structured_outputs"]["structural_tag"]["tool_choice"]["allowed_tools"]
    assert [tool["function"]["name"] for tool in allowed["tools"]] == ["get_weather"]


def test_an_answer_that_breaks_off_is_told_in_openais_words() -> None:
    model = Model(HERMES, "Hel", "lo.")
    model.events = (model.events[0], UnavailableError("the engine is gone"))
    last = events_of(respond(model, stream=True))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": "server_error", "message": "the engine is gone"}


@pytest.mark.parametrize(
    ("keys", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": {"a": 1}}]}, "input.0.output"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": [{"type": "x"}]}]}, "input.0.output"),
        ({"tools": [{"type": "telepathy"}]}, "tools.0.type"),
        ({"tools": [{"type": "namespace", "tools": []}]}, "tools.0.name"),
        ({"tools": [{"type": "namespace", "name": "n"}]}, "tools.0.tools"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "custom"}]}]}, "tools.0.tools.0.name"),
        ({"tools": [TOOL, TOOL]}, "tools.1.name"),
        ({"tools": [space("a", "b__c"), space("a__b", "c")]}, "tools.1.tools.0.name"),
        ({"tools": [{"type": "web_search"}, {**TOOL, "parameters": 5}]}, "tools.1.parameters"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [1]}},
            "tool_choice.tools.0",
        ),
        ({"input": None}, "input"),
        ({"background": True}, "background"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"max_output_token": 1}, "max_output_token"),
        ({"temperature": "hot"}, "temperature"),
        ({"model": "x"}, "model"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_had_is_refused_by_this_apis_names(keys: dict[str, Any], param: str) -> None:
    reply = respond(Model(HERMES, "x"), **keys)
    assert reply.status in (400, 404)
    assert reply.json["error"]["param"] == param, reply.text


def test_conversations_are_kept_as_long_as_there_is_room() -> None:
    store = ResponseStore(2, 10_000)

    def put(name: str, *texts: str) -> None:
        store.put({"id": name, "output": []}, [{"id": text, "content": text} for text in texts])

    for name in ("a", "b", "c"):
        put(name, name)
    with pytest.raises(RefusalError, match="there is no response 'a', or not any more") as gone:
        store.get("a", "previous_response_id")
    assert (gone.value.status, gone.value.param, gone.value.code) == (404, "previous_response_id", "response_not_found")
    assert store.get("b").conversation == [{"id": "b", "content": "b"}]
    put("large", "x" * 4_930)
    assert store._num_bytes > 9_900
    with pytest.raises(RefusalError):
        store.get("b")
    put("too large", "x" * 20_000)
    store.delete("large")
    assert store._num_bytes == 0
    off = ResponseStore(0, 10_000)
    off.put({"id": "a", "output": []}, [])
    with pytest.raises(RefusalError, match="previous_response_id: responses are not kept here"):
        off.get("a", "previous_response_id")
