"""Items that are kept: conversations that go on by an id, items that are only named, and their lists."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")
pytest.importorskip("httpx")

import httpx
from openai.types.responses import Response, ResponseItemList

from paged_client import AsyncPagedClient
from paged_client.openai.gateway import Offer, make_app
from paged_client.openai.kept_items import given_items, kept
from paged_client.openai.response_store import ResponseStore
from tests.unit.client.test_openai_responses import NAMESPACE, PATCH, asked, written
from tests.unit.client.test_openai_tools import HERMES, Model


class Gateway:
    """An application that several requests are made to."""

    def __init__(self, model: Model) -> None:
        client = AsyncPagedClient("nowhere:1", retries=0)
        client._transport = model
        self._transport = httpx.ASGITransport(make_app(client, Offer(("m",))))

    def call(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        async def one() -> Any:
            async with httpx.AsyncClient(transport=self._transport, base_url="http://gateway") as client:
                return await client.request(method, path, json=body)

        reply = asyncio.run(one())
        assert reply.status_code == status, reply.text
        return reply.json()

    def respond(self, given: Any, status: int = 200, **keys: Any) -> Any:
        return self.call("POST", "/v1/responses", {"model": "m", "input": given, **keys}, status)


def output_of(item: dict[str, Any], text: str) -> dict[str, Any]:
    return {"type": f"{item['type']}_output", "call_id": item["call_id"], "output": text}


CALLS = written("crm__get_weather", {"city": "Paris"}) + written("apply_patch", {"input": "+a"})


@pytest.mark.parametrize("by_reference", [False, True])
def test_a_conversation_with_calls_goes_on_by_its_id_or_by_its_items(by_reference: bool) -> None:
    model = Model(HERMES, CALLS)
    gateway, tools = Gateway(model), [NAMESPACE, PATCH]
    first = gateway.respond("Hi", tools=tools)
    outputs = [output_of(item, text) for item, text in zip(first["output"], ("sun", "Done."), strict=True)]
    if by_reference:
        named = [{"type": "item_reference", "id": first["output"][0]["id"]}, {"id": first["output"][1]["id"]}]
        gateway.respond([{"role": "user", "content": "Hi"}, *named, *outputs], tools=tools)
    else:
        gateway.respond(outputs, tools=tools, previous_response_id=first["id"])
    user, calls, *results = asked(model)
    assert user == {"role": "user", "content": "Hi"}
    assert [call["function"] for call in calls["tool_calls"]] == [
        {"name": "crm__get_weather", "arguments": {"city": "Paris"}},
        {"name": "apply_patch", "arguments": {"input": "+a"}},
    ]
    assert [result["content"] for result in results] == ["sun", "Done."]


def test_what_a_response_was_given_is_listed_page_by_page() -> None:
    gateway = Gateway(Model(HERMES, "Hello."))
    first = gateway.respond("Hi", instructions="Be kind.")
    texts = [{"role": "user", "content": [{"type": "input_text", "text": "Again"}]}]
    second = gateway.respond([*texts, {"type": "reasoning", "summary": []}], previous_response_id=first["id"])
    path = f"/v1/responses/{second['id']}/input_items"
    whole = gateway.call("GET", f"{path}?order=asc")
    ResponseItemList.model_validate(whole)
    assert [item["type"] for item in whole["data"]] == ["message", "message", "message", "reasoning"]
    assert [item["content"][0]["text"] for item in whole["data"][:3]] == ["Hi", "Hello.", "Again"]
    ids = [item["id"] for item in whole["data"]]
    assert len(set(ids)) == 4 and (whole["first_id"], whole["last_id"], whole["has_more"]) == (ids[0], ids[-1], False)
    newest = gateway.call("GET", f"{path}?limit=3")
    assert ([item["id"] for item in newest["data"]], newest["has_more"]) == (ids[:0:-1], True)
    rest = gateway.call("GET", f"{path}?limit=3&after={newest['last_id']}")
    assert ([item["id"] for item in rest["data"]], rest["has_more"]) == (ids[:1], False)
    for query, param in (("limit=0", "limit"), ("limit=101", "limit"), ("order=up", "order"), ("after=x", "after")):
        assert gateway.call("GET", f"{path}?{query}", status=400)["error"]["param"] == param
    gateway.call("GET", "/v1/responses/resp_x/input_items", status=404)


def test_a_stored_response_comes_whole_or_not_at_all() -> None:
    gateway = Gateway(Model(HERMES, "Hello."))
    said = gateway.respond("Hi")
    assert gateway.call("GET", f"/v1/responses/{said['id']}") == said
    Response.model_validate(said)
    refused = gateway.call("GET", f"/v1/responses/{said['id']}?stream=true", status=400)
    assert refused["error"]["param"] == "stream"
    gateway.call("DELETE", f"/v1/responses/{said['id']}")
    gateway.call("GET", f"/v1/responses/{said['id']}", status=404)


def test_callers_who_choose_the_same_number_keep_their_own_conversations() -> None:
    gateway = Gateway(Model(HERMES, "Hello."))
    mine, yours = (gateway.respond(text, request_id="1") for text in ("mine", "yours"))
    assert mine["id"] != yours["id"] and mine["id"].startswith("resp_1-")
    (kept_item,) = gateway.call("GET", f"/v1/responses/{mine['id']}/input_items")["data"]
    assert kept_item["content"][0]["text"] == "mine"
    gateway.respond([{"role": "user", "content": "Hi"}, {"id": mine["output"][0]["id"]}])


def test_an_item_that_is_not_there_or_named_twice_is_refused() -> None:
    store = ResponseStore(10, 10_000)
    store.put({"id": "resp_a", "output": []}, kept([{"role": "user", "content": "x"}], "resp_a"))
    named = {"type": "item_reference", "id": "msg_a_in0"}
    assert given_items([named], store) == kept([{"role": "user", "content": "x"}], "resp_a")
    gateway = Gateway(Model(HERMES, "x"))
    for wrong in ({"id": "msg_b_0"}, {"id": ""}, {"type": "item_reference", "id": "_"}):
        error = gateway.respond([{"role": "user", "content": "x"}, wrong], status=404)["error"]
        assert (error["param"], error["code"]) == ("input.1", "item_not_found")
    first = gateway.respond("Hi")["output"][0]["id"]
    assert gateway.respond([{"id": first}, {"id": first}], status=404)["error"]["param"] == "input.1"


def test_a_conversation_may_go_on_without_anything_new() -> None:
    model = Model(HERMES, "Hello.")
    gateway = Gateway(model)
    first = gateway.respond("Hi")
    gateway.call("POST", "/v1/responses", {"model": "m", "previous_response_id": first["id"]})
    assert [message["content"] for message in asked(model)] == ["Hi", "Hello."]
