"""A model whose engine died once too often must not look ready: the server unloads it, or ends. Through a real
tritonserver.
"""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.server.front_end_server import MODEL, FrontEndServer, serving

pytestmark = pytest.mark.server


def _kill_engine(server: FrontEndServer) -> None:
    (pid,) = server.engine_pids()
    os.kill(pid, signal.SIGKILL)


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.long
def test_a_lost_engine_unloads_the_model_which_can_be_loaded_again(tmp_path: Path) -> None:
    options = {"max_engine_restarts": "1", "on_engine_loss": "unload"}
    # its key is on the command line, which the front end knows
    restricted = ["--http-restricted-api=model-repository:key=secret"]
    with serving(tmp_path, instances=2, options=options, arguments=restricted) as server:
        ready = f"http://{server.http}/v2/models/{MODEL}/ready"
        _kill_engine(server)
        server.wait_for("paged_engine_restarts_total", 1, seconds=20)
        assert _status(ready) == 200
        assert server.ask("tokens=3").error is None
        _kill_engine(server)
        deadline = time.monotonic() + 20
        while _status(ready) == 200:
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.05)
        while server.state() != "unloaded":
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.05)
        # does not count what was unloaded, as docs/reliability.md says
        assert _status(f"http://{server.http}/v2/health/ready") == 200
        log = server.log.read_text()
        assert "error: the engine died: its process ended by SIGKILL; restart 1 of at most 1 within 10 minutes" in log
        assert re.search(
            r"error: the engine died: .+; no restart is left, there were 1 within 10 minutes \(max_engine_restarts 1\)",
            log,
        ), log
        assert log.count("error: there is no engine any more") == log.count("error: the model is unloaded") == 1
        server.load()
        assert _status(ready) == 200
        assert server.ask("tokens=3").error is None


# in CI it does with `paged serve`, which asks for that: test_serve_deaths.py
@pytest.mark.long
def test_a_lost_engine_ends_the_server_if_the_operator_wants_that(tmp_path: Path) -> None:
    with serving(tmp_path, instances=2, options={"max_engine_restarts": "0", "on_engine_loss": "exit"}) as server:
        _kill_engine(server)
        assert server.process.wait(30) == 0
        assert server.log.read_text().count("error: the server ends, for there is no engine any more") == 1
