"""Whatever is wrong anywhere in a body of any endpoint, the gateway answers, or refuses it in its API's form and names
the field; it never fails.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from starlette.testclient import TestClient

from paged_client import AsyncPagedClient, InvalidRequestError
from paged_client.openai.gateway import Offer, make_app
from paged_client.question import Question
from tests.body_mutations import bodies, check_refusal, mutations
from tests.unit.client.gateway_calls import Call, Outputs, Transport, described
from tests.unit.client.test_openai_tools import HERMES, THINKS

BODIES = bodies("m")
SAMPLED = 120  # of some hundreds to two thousand a body
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


@pytest.mark.parametrize("name", BODIES)
def test_something_wrong_in_a_body_is_refused_by_its_fields_name(asking: TestClient, name: str) -> None:
    asked = BODIES[name]
    assert refused(asking, asked.path, asked.body, SAMPLED) > SAMPLED / 8


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_everything_that_may_be_wrong_in_any_body_is_refused_by_its_fields_name(asking: TestClient) -> None:
    assert sum(refused(asking, asked.path, asked.body, None) for asked in BODIES.values()) > 10_000
