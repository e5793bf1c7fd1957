"""The engine may die, the stream may not: the real engine is killed under real streams, and nobody can tell from the
answers.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from paged_backend.server.launch import Server, ServerSettings
from tests.server.calls import engine_pid, metrics, run_all, wait_for_metrics
from tests.server.served import served

pytestmark = pytest.mark.server


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, marks=pytest.mark.long), 2, pytest.param(4, marks=pytest.mark.long)],
    ids=["one front end", "two front ends", "four front ends"],
)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    options = {
        "num_pages": 300,
        "max_num_sequences": 32,
        "dtype": "float32",
        "max_model_len": 512,
        "max_engine_restarts": 100,
        "standby_engine": True,
    }
    with served(ServerSettings(instances=request.param, options=options)) as running:
        yield running


def requests() -> list[dict[str, Any]]:
    """Greedy, seeded, truncated and penalised draws; stop strings; more than fit at once."""
    variety: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.1, "seed": 7},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "seed": 2**64 - 1},
        {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.2, "seed": 3},
        {"temperature": 0, "stop": ["qqq"], "min_tokens": 30, "logit_bias": {"17": 1.5}},
        {"temperature": 1.0, "seed": 11, "logprobs": 2, "bad_words": ["the"]},
    ]
    return [
        {
            "text_input": f"Story {number}: once upon a time",
            "max_tokens": 120,
            "sampling_parameters": {**variety[number % len(variety)], "ignore_eos": True},
        }
        for number in range(36)
    ]


# the second kill is of an engine that took a dead one's place (tests/unit/engine_client/test_restarts.py has it in CI),
# the third of its successor
@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.long)])
def test_every_answer_is_that_of_an_engine_that_lived(server: Server, kills: int) -> None:
    restarts = metrics(server.addresses.metrics_url)["paged_engine_restarts_total"]
    expected = run_all(server.addresses.grpc_url, requests())
    killed: list[int] = []
    stop = threading.Event()

    def kill() -> None:
        while len(killed) < kills and not stop.wait(1.2):
            pid = engine_pid(server.shm_prefix)
            if (
                pid is not None
                and pid not in killed
                and metrics(server.addresses.metrics_url)['paged_requests{state="running"}'] > 8
            ):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                time.sleep(3)

    killer = threading.Thread(target=kill)
    killer.start()
    answers = run_all(server.addresses.grpc_url, requests())
    while len(killed) < kills:  # a fast machine is done before
        answers = run_all(server.addresses.grpc_url, requests())
    stop.set()
    killer.join()
    for before, after in zip(expected, answers, strict=True):
        assert after.error is None
        assert after.num_finals == 1
        assert after.token_ids == before.token_ids
        assert "".join(after.text) == "".join(before.text)
    assert len(killed) == kills
    assert wait_for_metrics(
        server.addresses.metrics_url, lambda values: values["paged_engine_restarts_total"] == restarts + kills
    )
