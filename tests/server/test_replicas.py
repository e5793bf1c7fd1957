"""Two replicas of the demo model behind a real server: streams are spread, go where their prompt is known, and do not
notice that one replica's engine is killed under them.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from paged_backend.server.launch import Server, ServerSettings
from paged_client.top.engines import RunningEngine, find_engines
from tests.server.calls import Answer, metrics, run_all, wait_for_metrics
from tests.server.served import served
from tests.server.test_engine_death import requests

pytestmark = pytest.mark.server

NAMES = ("Anna", "Ben", "Clara", "David")
OPTIONS: dict[str, Any] = {
    "num_pages": 300,
    "max_num_sequences": 8,
    "dtype": "float32",
    "device": "cpu",
    "max_model_len": 512,
    "max_engine_restarts": 100,  # without an engine that stands by: those of test_engine_death.py have one
    "speculation": "off",
    "replicas": 2,
}
RUNNING = 'paged_requests{{replica="{}",state="running"}}'
CACHED = 'paged_pages{{replica="{}",state="cached"}}'


def engines_of(server: Server) -> dict[int, RunningEngine]:
    """By replica."""
    name = server.shm_prefix.removesuffix("-")
    return {engine.replica: engine for engine in find_engines() if name in str(engine.folder)}


def ask_twice(grpc_url: str) -> list[list[Answer]]:
    """Prompts that share no page, one after another, and all of them once more."""
    prompts = [f"{name} lived by the sea, far from everyone else, and liked to count the waves" for name in NAMES]
    return [[run_all(grpc_url, [{"text_input": text, "max_tokens": 4}])[0] for text in prompts] for _ in range(2)]


# in CI replicas die without a model: tests/unit/engine_client/test_replicas.py
@pytest.mark.long
def test_streams_have_the_tokens_of_one_engine_whichever_replica_dies() -> None:
    asked = [request | {"max_tokens": 90} for request in requests()[:12]]
    with served(ServerSettings(instances=1, options=OPTIONS | {"replicas": 1})) as alone:
        expected = run_all(alone.addresses.grpc_url, asked)
    killed: list[int] = []
    stop = threading.Event()
    with served(ServerSettings(instances=2, options=OPTIONS)) as server:
        first, again = ask_twice(server.addresses.grpc_url)
        assert wait_for_metrics(  # a replica's gauges come with its first numbers
            server.addresses.metrics_url,
            lambda values: all(values.get(CACHED.format(replica), 0) > 0 for replica in range(2)),
        ), "prompts that nobody knows go to each in turn"
        assert all(answer.num_cached_tokens == 0 for answer in first)
        assert all(answer.num_cached_tokens >= 16 for answer in again), "each went where its prompt was"
        other = engines_of(server)[0].pid

        def kill() -> None:
            while not killed and not stop.wait(0.1):
                values = metrics(server.addresses.metrics_url)
                running = [values.get(RUNNING.format(replica), 0.0) for replica in range(2)]
                if min(running) > 2:
                    killed.append(engines_of(server)[1].pid)
                    os.kill(killed[0], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        answers = run_all(server.addresses.grpc_url, asked)
        for _ in range(3):
            if not killed:  # a fast machine is done before
                answers = run_all(server.addresses.grpc_url, asked)
        stop.set()
        killer.join()
        assert len(killed) == 1, "while both replicas had requests"
        restarted = wait_for_metrics(  # more than once, where a busy machine takes too long to begin
            server.addresses.metrics_url, lambda values: values["paged_engine_restarts_total"] >= 1, seconds=120
        )
        assert restarted
        after = engines_of(server)
        assert after[0].pid == other and after[1].pid != killed[0]
    for before, found in zip(expected, answers, strict=True):
        assert (found.error, found.num_finals, found.token_ids) == (None, 1, before.token_ids)
