"""A server that is about to unload the model, or to stop, is noticed by what it answers."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from paged_backend.frontend import shutdown_watch as departure
from paged_backend.frontend.shutdown_watch import Departure, ServerArguments

WAIT_SECONDS = 20


class Server:
    """Answers with the statuses in turn, the last one again and again."""

    def __init__(self, statuses: list[int]) -> None:
        self.asked: list[str] = []
        outer = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                self.send_response(statuses[min(len(outer.asked), len(statuses)) - 1])
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.arguments = ServerArguments(("127.0.0.1", self._server.server_port), 30)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departure, "_POLL_SECONDS", 0.01)


@pytest.mark.parametrize("statuses", [[400, 200, 200, 400], [0, 503, 200, 503]], ids=["unloads", "stops"])
def test_a_model_that_was_ready_and_is_not_any_more_departs(statuses: list[int]) -> None:
    server, began, told = Server([status or 500 for status in statuses]), threading.Event(), []

    def begin(seconds: float) -> None:
        told.append(seconds)
        began.set()

    watch = Departure(server.arguments, "m", "3", 1, begin)
    assert began.wait(WAIT_SECONDS)
    watch._thread.join(WAIT_SECONDS)
    assert told == [20]
    assert set(server.asked) == {"/v2/models/m/versions/3/ready"}
    assert len(server.asked) == 4
    server.close()


@pytest.mark.parametrize("statuses", [[400], [200, 403, 500, 200]], ids=["still loads", "says nothing of use"])
def test_nothing_else_is_a_departure(statuses: list[int]) -> None:
    server, told = Server(statuses), []
    watch = Departure(server.arguments, "m", "1", 1, told.append)
    while len(server.asked) < 8:
        threading.Event().wait(0.01)
    watch.close()
    watch._thread.join(WAIT_SECONDS)
    server.close()
    assert not told


def test_a_server_whose_port_was_open_and_is_closed_departs() -> None:
    server, began = Server([200]), threading.Event()
    watch = Departure(server.arguments, "m", "1", 1, lambda seconds: began.set())
    while not server.asked:
        threading.Event().wait(0.01)
    assert not began.is_set()
    server.close()
    assert began.wait(WAIT_SECONDS)
    watch._thread.join(WAIT_SECONDS)


def test_a_server_that_stops_soon_after_it_was_ready_departs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departure, "_POLL_SECONDS", 0.5)
    server, began = Server([200]), threading.Event()
    watch = Departure(server.arguments, "m", "1", 1, lambda seconds: began.set())
    assert not began.wait(0.25)
    server.close()
    assert began.wait(WAIT_SECONDS)
    watch._thread.join(WAIT_SECONDS)


def test_a_port_that_was_never_open_says_nothing() -> None:
    server, told = Server([200]), []
    server.close()
    watch = Departure(server.arguments, "m", "1", 1, told.append)
    threading.Event().wait(0.2)
    watch.close()
    watch._thread.join(WAIT_SECONDS)
    assert not told


@pytest.mark.parametrize(
    ("command", "http", "exit_seconds"),
    [
        ([], ("127.0.0.1", 8000), 30),
        (["tritonserver", "--http-port=81", "--exit-timeout-secs=9"], ("127.0.0.1", 81), 9),
        (
            ["tritonserver", "--http-port", "81", "--http-address", "10.0.0.1", "--exit-timeout-secs", "60"],
            ("10.0.0.1", 81),
            60,
        ),
        (["tritonserver", "--http-address=0.0.0.0", "--allow-http=true", "--http-port=x"], ("127.0.0.1", 8000), 30),
        (["tritonserver", "--allow-http=False"], None, 30),
        (["tritonserver", "--allow-grpc", "--http-port=82"], ("127.0.0.1", 82), 30),
    ],
)
def test_the_servers_command_line_is_understood(
    command: list[str], http: tuple[str, int] | None, exit_seconds: int
) -> None:
    assert ServerArguments.parse(command) == ServerArguments(http, exit_seconds)


@pytest.mark.parametrize(
    ("exit_seconds", "num_instances", "drain_seconds"),
    [(30, 1, 20), (30, 8, 15.4), (30, 20, 10), (12, 2, 4.6), (3, 1, 1)],
    ids=["two thirds at most", "many instances", "a third at least", "a short timeout", "one too short"],
)
def test_what_is_left_of_the_exit_timeout_is_enough_to_unload(
    exit_seconds: int, num_instances: int, drain_seconds: float
) -> None:
    assert ServerArguments(None, exit_seconds).drain_seconds(num_instances) == pytest.approx(drain_seconds)


def test_the_key_of_the_model_control_api_is_read_from_the_command_line() -> None:
    command = [
        "tritonserver",
        "--http-restricted-api=health,model-repository:key=a=b",
        "--http-restricted-api",
        "metadata:other=x",
    ]
    assert ServerArguments.parse(command).control_headers == {"key": "a=b"}
