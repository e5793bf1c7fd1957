"""`paged chat` in a terminal, where somebody presses Ctrl-C again and again."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("tritonclient.grpc")

from paged_backend.server.launch import Server, ServerSettings
from tests.server.served import served
from tests.server.test_client_commands import Terminal, engine_idle

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(ServerSettings(instances=1, options={"num_pages": 200, "dtype": "float32"})) as running:
        yield running


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_none_of_300_ctrl_cs_at_random_moments_is_lost(server: Server, protocol: str) -> None:
    url = server.addresses.grpc_url if protocol == "grpc" else server.addresses.http_url
    terminal = Terminal("chat", "-u", url, "-t", "0", "-n", "1500", "-s", "ignore_eos=true")
    terminal.wait_for("> ")
    moments = random.Random(7)
    for _ in range(300):
        terminal.type("Where is the lamp?\r")
        terminal.wait_for(r"lamp\?")
        time.sleep(moments.uniform(0, 0.3))
        terminal.type("\x03")
        # before the line was read, Ctrl-C throws it away
        terminal.wait_for(r"(stopped: prompt \d+ tokens|Ctrl-D leaves)")
        terminal.wait_for("> ")
        terminal.type("/reset\r")
        terminal.wait_for("> ")
    assert engine_idle(server)
    terminal.type("\x04")
    assert terminal.exit_status() == 0
