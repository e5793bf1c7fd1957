"""What a server is asked for when a model has no engine any more."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from paged_backend.frontend.engine_loss import leave_server
from paged_backend.frontend.shutdown_watch import ServerArguments


class Server:
    """Answers to everything with one status, and remembers what it was asked."""

    def __init__(self) -> None:
        self.status, self.body = 200, b""
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.asked.append((self.path, self.headers.get("key")))
                self.send_response(outer.status)
                self.send_header("Content-Length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.address = ("127.0.0.1", self._server.server_port)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def test_the_server_is_asked_to_unload_with_the_key_that_it_wants(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "paged"):
        leave_server("unload", ServerArguments(server.address, 30, {"key": "secret"}), 0, "m")
    assert server.asked == [("/v2/repository/models/m/unload", "secret")]
    assert "the model is unloaded" in caplog.text


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        pytest.param(
            503,
            b'{"error":"explicit model load / unload is not allowed"}',
            "503: explicit model load / unload is not allowed",
            id="mode none",
        ),
        pytest.param(403, b"This API is restricted", "403: This API is restricted", id="restricted"),
    ],
)
def test_a_server_that_does_not_unload_is_named_as_the_reason(
    server: Server, caplog: pytest.LogCaptureFixture, status: int, body: bytes, reason: str
) -> None:
    server.status, server.body = status, body
    with caplog.at_level(logging.ERROR, "paged"):
        leave_server("unload", ServerArguments(server.address, 30), 0, "m")
    assert f"the server does not unload the model ({reason}): it stays loaded" in caplog.text


@pytest.mark.parametrize(
    ("http", "reason"),
    [(None, "it has no HTTP port"), (("127.0.0.1", 1), "ConnectionRefusedError")],
    ids=["no port", "nobody there"],
)
def test_a_server_that_cannot_be_asked_is_no_exception(
    http: tuple[str, int] | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "paged"):
        leave_server("unload", ServerArguments(http, 30), 0, "m")
    assert reason in caplog.text


def test_exit_ends_the_server_as_an_operator_would(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    leave_server("stay", ServerArguments(server.address, 30), 77, "m")
    assert not killed and not server.asked
    leave_server("exit", ServerArguments(server.address, 30), 77, "m")
    assert killed == [(77, signal.SIGTERM)]
