"""The demo model on two ranks behind a real server: streams get the tokens of one rank, and do not notice that a rank
is killed under them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from paged_backend.server.launch import Server, ServerSettings
from tests.e2e.test_rank_deaths import children_of
from tests.server.calls import engine_pid, metrics, run_all, wait_for_metrics
from tests.server.test_engine_death import requests

pytestmark = [pytest.mark.server, pytest.mark.long]

OPTIONS: dict[str, Any] = {
    "num_pages": 300,
    "max_num_sequences": 16,
    "dtype": "float32",
    "device": "cpu",
    "max_model_len": 512,
    "max_engine_restarts": 100,
}


def test_streams_have_the_tokens_of_one_rank_whatever_dies() -> None:
    asked = requests()[:12]
    with Server(ServerSettings(instances=2, options=OPTIONS)) as alone:
        expected = run_all(alone.addresses.grpc_url, asked)
    killed: list[int] = []
    with Server(ServerSettings(instances=2, options=OPTIONS | {"tensor_parallel_size": 2})) as server:

        def kill() -> None:
            while not killed:
                pid = engine_pid(server.shm_prefix)
                if pid is not None and metrics(server.addresses.metrics_url)['paged_requests{state="running"}'] > 4:
                    killed.extend(children_of(pid))
                    os.kill(killed[0], signal.SIGKILL)
                time.sleep(0.2)

        killer = threading.Thread(target=kill)
        killer.start()
        answers = run_all(server.addresses.grpc_url, asked)
        killer.join()
        assert wait_for_metrics(server.addresses.metrics_url, lambda values: values["paged_engine_restarts_total"] == 1)
    for before, after in zip(expected, answers, strict=True):
        assert (after.error, after.num_finals, after.token_ids) == (None, 1, before.token_ids)
    assert len(killed) == 1
