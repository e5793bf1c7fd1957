"""Whatever is wrong anywhere in a body of any endpoint, the gateway answers, or refuses it in its API's form and names
the field; it never fails.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from starlette.testclient import TestClient

from paged_client import AsyncPagedClient, InvalidRequestError
from paged_client.openai.gateway import Offer, make_app
from paged_client.question import Question
from tests.body_mutations import Asked, bodies, check_refusal, mutations
from tests.unit.client.gateway_calls import Call, Outputs, Transport, described
from tests.unit.client.test_openai_tools import HERMES, THINKS

FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
PAGE = {"type": "document", "title": "T", "source": {"type": "content", "content": [{"type": "text", "text": "a"}]}}
FOUND = {"type": "tool_result", "tool_use_id": "t", "is_error": True, "content": [PAGE, {"type": "image"}]}
# What agents send beside: tools and items that only OpenAI or Anthropic have, pictures that tools have found.
AGENTS = {
    "responses agent": Asked(
        "/v1/responses",
        {
            "model": "m",
            "input": [
                {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": "+a"},
                {"type": "custom_tool_call_output", "call_id": "c", "output": [{"type": "input_image"}]},
                {"type": "web_search_call", "id": "w"},
                {"type": "message", "role": "user", "content": "Go on."},
            ],
            "tools": [
                {"type": "namespace", "name": "crm", "tools": [FUNCTION]},
                {"type": "custom", "name": "patch", "format": {"type": "grammar", "definition": "start: /a/"}},
                {"type": "web_search"},
            ],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "custom", "name": "patch"}]},
            "include": ["reasoning.encrypted_content"],
            "max_tool_calls": 1,
        },
    ),
    "messages agent": Asked(
        "/v1/messages",
        {
            "model": "m",
            "max_tokens": 4,
            "messages": [
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
                {"role": "user", "content": [FOUND]},
                {"role": "assistant", "content": [{"type": "server_tool_use", "id": "s"}]},
                {"role": "system", "content": "It is late."},
            ],
            "tools": [{"type": "bash_20250124", "name": "bash"}, {"name": "f", "input_schema": {"type": "object"}}],
        },
    ),
}
BODIES = bodies("m") | AGENTS
SAMPLED = 60  # of some hundreds to two thousand a body
HEADERS = {"Content-Type": "application/json"}


class Willing(Transport):
    """Answers everything that reaches it but too many sequences: what is refused else is refused by the gateway."""

    def __init__(self) -> None:
        super().__init__()
        self.description = described(chat_templates={"default": THINKS + HERMES})

    def ask(self, question: Question) -> Call:
        task = question.tensors.get("task")
        if task == "describe":
            return super().ask(question)
        sampling = {} if task else json.loads(str(question.tensors.get("sampling_parameters", "{}")))
        count = sampling.get("n", 1)
        if count > 2:
            return Call(self, [InvalidRequestError("n: more than 2")])
        outputs: Outputs = {
            "text_output": ["Yes."] * count,
            "output_ids": [9] * count,
            "finish_reason": ["stop"] * count,
            "num_input_tokens": [5],
            "num_cached_tokens": [0],
        }
        if count > 1:
            outputs |= {"sequence_index": list(range(count)), "num_output_tokens": [1] * count}
        if "logprobs" in sampling:
            outputs["logprobs"] = ['[{"9": {"decoded_token": "Yes", "logprob": -1.0, "rank": 1}}]'] * count
        if task == "embed":
            outputs["embedding"] = [0.5] * 8
        return Call(self, [outputs])


@pytest.fixture(scope="module")
def asking() -> Iterator[TestClient]:
    client = AsyncPagedClient("nowhere:1", retries=0)
    client._transport = Willing()
    with TestClient(make_app(client, Offer(("m",)))) as asking:
        yield asking


def refused(asking: TestClient, path: str, body: Mapping[str, Any], count: int | None) -> int:
    """How many of `count` of the body's mutations, or of all, are refused; each in the right words."""
    assert asking.post(path, json=body).status_code == 200
    every = list(mutations(body))
    chosen = every if count is None else random.Random(path).sample(every, min(count, len(every)))
    num_refused = 0
    for mutation in chosen:
        response = asking.post(path, content=mutation.json, headers=HEADERS)
        if response.status_code != 200:
            num_refused += 1
            check_refusal(response.status_code, response.text, path, mutation)
    return num_refused


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", BODIES)
def test_something_wrong_in_a_body_is_refused_by_its_fields_name(asking: TestClient, name: str) -> None:
    asked = BODIES[name]
    assert refused(asking, asked.path, asked.body, SAMPLED) > SAMPLED / 8


ITEM = {"role": "user", "content": "x"}
TURN = {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("path", "keys", "status"),
    [
        ("/v1/responses", {"input": [ITEM] * 100_000}, 200),
        pytest.param("/v1/responses", {"input": [CALL] * 50_000}, 200, marks=pytest.mark.long),
        pytest.param(
            "/v1/responses",
            {"tools": [{"type": "function", "name": f"f{number}"} for number in range(50_000)]},
            200,
            marks=pytest.mark.long,
        ),
        ("/v1/responses", {"reasoning": {f"k{number}": 1 for number in range(200_000)}}, 400),
        ("/v1/messages", {"messages": [ITEM, TURN] * 20_000, "max_tokens": 4}, 200),
        pytest.param("/v1/messages", {"messages": [TURN] * 40_000, "max_tokens": 4}, 200, marks=pytest.mark.long),
    ],
    ids=["items", "calls", "tools", "keys", "turns", "turns of one side"],
)
def test_a_body_of_very_many_things_keeps_nobody_waiting(
    asking: TestClient, path: str, keys: dict[str, Any], status: int
) -> None:
    """One that took a time that grows with the square would keep all callers waiting: it is all one process's."""
    body = json.dumps({"model": "m", "input": "x"} | keys if path == "/v1/responses" else {"model": "m"} | keys)
    begun = time.process_time()
    assert asking.post(path, content=body, headers=HEADERS).status_code == status
    assert time.process_time() - begun < 15  # it is 1 to 2 s


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_everything_that_may_be_wrong_in_any_body_is_refused_by_its_fields_name(asking: TestClient) -> None:
    assert sum(refused(asking, asked.path, asked.body, None) for asked in BODIES.values()) > 10_000
