"""`paged serve --on-front-end-death=restart`: a server that lost front ends is replaced at the same ports, a few
times.
"""

from __future__ import annotations

import pytest

from paged_backend.errors import EngineError
from paged_backend.server.launch import FrontEndsLostError, ServerSettings
from paged_backend.server.ports import Addresses
from paged_client import cli


class _Servers:
    """Stands for servers that end as told, the last one well. Notes the ports that each was to have."""

    def __init__(self, *ends: Exception) -> None:
        self.ports: list[int] = []
        self._ends = list(ends)

    def serve(self, settings: ServerSettings) -> None:
        self.ports.append(settings.http_port)
        if self._ends:
            raise self._ends.pop(0)


def _lost() -> FrontEndsLostError:
    return FrontEndsLostError("front end process 7 died", Addresses("127.0.0.1", 21000, 21001, 21002))


def test_each_next_server_has_the_ports_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = _Servers(_lost(), _lost())
    monkeypatch.setattr(cli, "_serve", servers.serve)
    cli._serve_again_and_again(ServerSettings())
    assert servers.ports == [0, 21000, 21000]
    assert capsys.readouterr().err.splitlines() == [
        f"paged: front end process 7 died: restart {n} of at most 4 within 10 minutes" for n in (1, 2)
    ]


def test_a_server_that_loses_front_ends_again_and_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = _Servers(*[_lost()] * 9)
    monkeypatch.setattr(cli, "_serve", servers.serve)
    with pytest.raises(EngineError, match="front end process 7 died; it was started again 4 times within 10 minutes"):
        cli._serve_again_and_again(ServerSettings())
    assert len(servers.ports) == 5


def test_restarts_of_long_ago_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(0, 100_000, 200))
    servers = _Servers(*[_lost()] * 9)
    monkeypatch.setattr(cli, "_serve", servers.serve)
    monkeypatch.setattr("time.monotonic", lambda: float(next(times)))
    cli._serve_again_and_again(ServerSettings())
    assert len(servers.ports) == 10


def test_a_server_that_ends_for_another_reason_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = _Servers(EngineError("tritonserver was killed by SIGKILL"))
    monkeypatch.setattr(cli, "_serve", servers.serve)
    with pytest.raises(EngineError, match="SIGKILL"):
        cli._serve_again_and_again(ServerSettings())
    assert len(servers.ports) == 1
