"""Notices that the server is about to unload the model, or to stop. It waits for live requests then and tells nobody,
so a request without an end would keep it waiting until its exit timeout, and then cut everybody off.

The server is asked over its own HTTP port, as its command line names it, whether the model is ready: it was, and is not
any more; or nobody listens there any more. (The Python backend's `is_model_ready` must not be used for that: in Triton
Server 2.51.0 it breaks the lock that the model's unloading takes, and the server aborts.)
"""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_POLL_SECONDS = 0.5
_FIRST_POLL_SECONDS = 0.05  # until it was ready: a server that stops in between seems never to have begun
_ANSWER_SECONDS = 5.0
_NOT_READY = (400, 503)
_REFUSED = -1
_ENOUGH_REFUSALS = 2  # a server that stops closes its HTTP port first
_EXIT_SECONDS = 30  # the server's own default
_HTTP_PORT = 8000
_DRAIN_SHARES = 1 / 3, 2 / 3  # of the exit timeout, at least and at most; the rest is for unloading
_NOTICE_SECONDS = 2 * _POLL_SECONDS
_UNLOAD_SECONDS = 4.0  # the server looks once a second whether requests, and then models, are gone; the engine's exit
_INSTANCE_SECONDS = 1.2  # it unloads them one after another


@dataclass(frozen=True)
class ServerArguments:
    """What tritonserver was told, as far as it matters here."""

    http: tuple[str, int] | None  # None: it has no HTTP port
    exit_seconds: int
    control_headers: Mapping[str, str] = field(default_factory=dict)  # that the model control API wants to see

    @classmethod
    def of(cls, pid: int) -> ServerArguments:
        """Of a running server; the defaults if its command line cannot be read."""
        try:
            return cls.parse(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0"))
        except OSError:
            return cls.parse([])

    @classmethod
    def parse(cls, command: Sequence[str]) -> ServerArguments:
        pairs = re.findall(r"^--([\w-]+)[= ](.*)$", "\n".join(_joined(command)), re.MULTILINE)
        given = dict(pairs)
        address = given.get("http-address", "")
        host = "127.0.0.1" if address in ("", "0.0.0.0", "localhost") else address
        port, seconds = given.get("http-port", ""), given.get("exit-timeout-secs", "")
        allowed = given.get("allow-http", "true").lower() not in ("false", "0")
        http = (host, int(port) if port.isdigit() else _HTTP_PORT) if allowed else None
        restricted = [value for name, value in pairs if name == "http-restricted-api"]
        return cls(http, int(seconds) if seconds.isdigit() else _EXIT_SECONDS, _control_headers(restricted))

    def drain_seconds(self, num_instances: int) -> float:
        """How long live requests may take once it was noticed that the server stops."""
        left = self.exit_seconds - _NOTICE_SECONDS - _UNLOAD_SECONDS - _INSTANCE_SECONDS * num_instances
        least, most = (self.exit_seconds * share for share in _DRAIN_SHARES)
        return max(least, min(most, left))


def _control_headers(restricted: Sequence[str]) -> dict[str, str]:
    """restricted: values of --http-restricted-api, such as "health,model-repository:key=value"."""
    found = {}
    for value in restricted:
        apis, _, header = value.partition(":")
        name, equals, content = header.partition("=")
        if equals and "model-repository" in apis.split(","):
            found[name] = content
    return found


def _joined(command: Sequence[str]) -> list[str]:
    """Options that have their values in the next argument, as one."""
    joined: list[str] = []
    for argument in command:
        if (
            joined
            and not argument.startswith("-")
            and joined[-1].startswith("--")
            and not re.search("[= ]", joined[-1])
        ):
            joined[-1] += f" {argument}"
        else:
            joined.append(argument)
    return joined


class Departure:
    """Asks on a thread of its own. That an answer takes long, or wants a key, means nothing."""

    def __init__(
        self, server: ServerArguments, model: str, version: str, num_instances: int, begin: Callable[[float], None]
    ) -> None:
        """begin: called with the seconds that live requests have left, once."""
        self._server, self._begin = server, begin
        self._drain_seconds = server.drain_seconds(num_instances)
        self._path = f"/v2/models/{model}/versions/{version}/ready"
        self._was_ready = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="departure", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Returns at once: an answer may still be under way."""
        self._stopping.set()

    def _run(self) -> None:
        num_refused = 0
        while self._server.http is not None and not self._stopping.wait(
            _POLL_SECONDS if self._was_ready else _FIRST_POLL_SECONDS
        ):
            status = self._ask(*self._server.http)
            self._was_ready = self._was_ready or status == 200
            num_refused = num_refused + 1 if status == _REFUSED else 0
            if self._was_ready and (status in _NOT_READY or num_refused == _ENOUGH_REFUSALS):
                self._begin(self._drain_seconds)
                return

    def _ask(self, host: str, port: int) -> int:
        """The status; _REFUSED if nobody listens, 0 if nobody answers."""
        connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_SECONDS)
        try:
            connection.request("GET", self._path)
            return connection.getresponse().status
        except ConnectionRefusedError:
            return _REFUSED
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()
