"""Speculation through a real server: its answers are those of requests that want none, and its metrics say what it
saved.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("tritonclient.grpc")

from paged_backend.server.launch import Server, ServerSettings
from paged_client import PagedClient
from tests.server.calls import wait_for_metrics
from tests.server.served import served

pytestmark = pytest.mark.server

CIRCLES = {"temperature": 0.0, "ignore_eos": True, "frequency_penalty": -2.0}  # says again what it has said
TEXT = "The fox saw the lantern. The fox saw the lantern. The fox saw"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    options = {"num_pages": 200, "speculation": "ngram", "num_speculative_tokens": 5, "debug_checks": True}
    with served(ServerSettings(instances=1, options=options)) as running:
        yield running


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "sampling",
    [
        CIRCLES,
        pytest.param(CIRCLES | {"stop": ["ry. Wh", "e foxe", "0"]}, marks=pytest.mark.long),
        pytest.param({"temperature": 0.7, "seed": 3, "top_p": 0.9}, marks=pytest.mark.long),
        {"temperature": 0.0, "guided_regex": "( the fox){3,9}", "max_tokens": 30},
    ],
    ids=["in circles", "a stop string", "seeded", "a form"],
)
def test_answers_are_those_without_it(server: Server, sampling: dict[str, object]) -> None:
    with PagedClient(server.addresses.grpc_url) as client:
        asked = {"max_tokens": 60} | sampling
        plain = client.generate(TEXT, speculation="off", **asked)
        fast = client.generate(TEXT, **asked)
    assert (fast.text, fast.finish_reason) == (plain.text, plain.finish_reason)


def test_the_metrics_say_what_was_guessed_right(server: Server) -> None:
    with PagedClient(server.addresses.grpc_url) as client:
        client.generate(TEXT, max_tokens=100, **CIRCLES)
    proposed, accepted, checked = (
        f'paged_drafts_{name}_total{{method="ngram"}}' for name in ("proposed", "accepted", "checked")
    )
    assert wait_for_metrics(
        server.addresses.metrics_url,
        lambda values: values[proposed] >= values[accepted] > 0 and values[proposed] >= values[checked] > 0,
    )
