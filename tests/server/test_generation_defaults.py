"""generation_config.json's sampling, through a real tritonserver and the gateway: chats have it unless they say no,
plain requests if they ask for it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("tritonclient.grpc")

from paged_backend.config import demo_model_folder
from paged_backend.server.launch import Server, ServerSettings
from paged_client import PagedClient
from tests.server.gateway_process import Gateway, gateway_to
from tests.server.served import served

pytestmark = [pytest.mark.server, pytest.mark.long]

MESSAGES = [{"role": "user", "content": "Tell me a story."}]
SEEDS = range(4)
CHAT = {"model": "paged_llm", "messages": MESSAGES, "max_tokens": 16}
COMPLETION = {"model": "paged_llm", "prompt": "Once upon a time", "max_tokens": 16}
HOT = {"temperature": 2.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its checkpoint recommends the likeliest token, however hot a request is: with that all seeds have one answer."""
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "model"
    shutil.copytree(demo_model_folder(), checkpoint)
    (checkpoint / "generation_config.json").write_text(json.dumps({"top_k": 1}))
    with served(ServerSettings(model=str(checkpoint), instances=1, options={"num_pages": 200})) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway_to(server.addresses.grpc_url, tmp_path_factory.mktemp("gateway")) as running:
        yield running


@pytest.mark.parametrize(
    ("kind", "more", "recommended"),
    [
        ("chat", {}, True),
        ("chat", {"generation_defaults": False}, False),
        ("chat", {"top_k": 50}, False),
        ("completion", {}, False),
        ("completion", {"generation_defaults": True}, True),
    ],
    ids=["a chat", "a chat that says no", "a chat with its own", "a completion", "a completion that asks for it"],
)
def test_through_the_gateway(gateway: Gateway, kind: str, more: dict[str, Any], recommended: bool) -> None:
    with gateway.client() as client:
        if kind == "chat":
            answers = {
                client.chat.completions.create(**CHAT, **HOT, seed=seed, extra_body=more).choices[0].message.content
                for seed in SEEDS
            }
        else:
            answers = {
                client.completions.create(**COMPLETION, **HOT, seed=seed, extra_body=more).choices[0].text
                for seed in SEEDS
            }
    assert (len(answers) == 1) is recommended


def test_a_plain_request_has_it_if_it_asks(server: Server) -> None:
    with PagedClient(server.addresses.grpc_url) as client:
        for more, recommended in (({}, False), ({"generation_defaults": True}, True)):
            answers = {
                client.generate("Once upon a time", max_tokens=16, seed=seed, **HOT, **more).text for seed in SEEDS
            }
            assert (len(answers) == 1) is recommended
