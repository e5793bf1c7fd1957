"""Through a real gateway and server: whatever is wrong anywhere in a body of any endpoint, each of them answers, or
refuses it in its API's form and names the field; nothing fails, and the server goes on.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("fastapi")
pytest.importorskip("xgrammar")

import httpx

from paged_backend.config import demo_model_folder
from paged_backend.server.launch import ServerSettings
from tests.body_mutations import Asked, Mutation, bodies, check_refusal, mutations
from tests.server.gateway_process import KEY, gateway_to
from tests.server.served import served
from tests.server.test_chat_tools import TEMPLATE

pytestmark = [pytest.mark.server]

# this model's tokenizer has no word that ends thinking
BODIES = {
    name: Asked(asked.path, {key: value for key, value in asked.body.items() if key != "max_thinking_tokens"})
    for name, asked in bodies("paged_llm").items()
}
AT_ONCE = 8
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "talker"
    shutil.copytree(demo_model_folder(), checkpoint)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)  # that takes tools and their results
    options = {"num_pages": 400, "dtype": "float32", "default_max_tokens": 4, "max_queue_size": 64}
    with (
        served(ServerSettings(model=str(checkpoint), instances=2, options=options)) as server,
        gateway_to(server.addresses.grpc_url, tmp_path_factory.mktemp("gateway")) as gateway,
        httpx.Client(base_url=gateway.url.removesuffix("/v1"), headers=HEADERS, timeout=60) as client,
    ):
        yield client
        for asked in BODIES.values():
            assert client.post(asked.path, json=asked.body).status_code == 200, asked


def faults(client: httpx.Client, asked: Asked, count: int | None) -> list[str]:
    """What is wrong with the answers to so many of the body's mutations, or to all."""
    answer = client.post(asked.path, json=asked.body)
    assert answer.status_code == 200, (asked, answer.text)
    every = list(mutations(asked.body))

    def fault(mutation: Mutation) -> str:
        answer = client.post(asked.path, content=mutation.json)
        if answer.status_code == 200:
            return ""
        try:
            check_refusal(answer.status_code, answer.text, asked.path, mutation)
        except AssertionError as error:
            return str(error)[:600]
        return ""

    chosen = every if count is None else random.Random(asked.path).sample(every, min(count, len(every)))
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return [found for found in threads.map(fault, chosen) if found]


# in CI: of the gateway alone, tests/unit/client/test_openai_wrong_bodies.py
@pytest.mark.long
@pytest.mark.timeout(300)
def test_something_wrong_in_a_body_is_answered_or_refused_by_its_fields_name(client: httpx.Client) -> None:
    assert [found for asked in BODIES.values() for found in faults(client, asked, 10)] == []


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", BODIES)
def test_everything_that_may_be_wrong_in_a_body_is_answered_or_refused_by_its_fields_name(
    client: httpx.Client, name: str
) -> None:
    assert faults(client, BODIES[name], None) == []
