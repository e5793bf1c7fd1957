"""Starts a tritonserver with the paged model and stops it again: what `paged serve`, `paged demo` and tests share."""

from __future__ import annotations

import http.client
import json
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from paged_backend.config import DEMO_MODEL, EngineConfig
from paged_backend.errors import EngineError
from paged_backend.server import files as server_files
from paged_backend.server.child import ServerChild
from paged_backend.server.front_end_watch import FrontEndWatch, num_requests
from paged_backend.server.log import CRASHES, ServerLog
from paged_backend.server.ports import Addresses, PortClaim, resolve_host
from paged_backend.server.scratch import Scratch, sweep
from paged_backend.tracing import TRACE_HEADERS, asks_for_spans, check_tracing

_POLL_SECONDS = 0.05
_PROBE_SECONDS = 2.0
_METRICS_SECONDS = 2.0
_ATTEMPTS = 3
_FORBIDDEN = 403
_GIVE_UP_SECONDS = 3.0  # for a server that is told to stop while it loads
_LAST_SECONDS = 30.0  # for unloading, after the drain
_POLL_DRAIN_SECONDS = 0.5
_IDLE_SECONDS = 2.0  # without a request in the engine: the last pieces are with their callers, too


@dataclass(frozen=True)
class ServerSettings:
    """What to serve and where. Ports: 0 means a free one."""

    model: str = DEMO_MODEL  # folder or hub id
    options: Mapping[str, Any] = field(default_factory=dict)  # EngineConfig name -> value
    model_name: str = server_files.TEMPLATE_MODEL  # as clients call it
    instances: int | None = None  # front ends; None: as config.pbtxt says
    host: str = "127.0.0.1"
    http_port: int = 0
    grpc_port: int = 0
    metrics_port: int = 0
    drain_seconds: int = 30  # how long a stop waits for requests in flight
    show_log: bool = False  # every line of tritonserver's log, not only ours
    arguments: tuple[str, ...] = ()  # for tritonserver, as they are


class StoppedEarlyError(EngineError):
    """`stop` or `terminate` was called while the server was starting."""


class FrontEndsLostError(EngineError):
    """Front ends died, or tritonserver crashed, and so the server that nobody stopped has ended. Another one may be
    started, which answers at the same addresses.
    """

    def __init__(self, message: str, addresses: Addresses) -> None:
        super().__init__(message)
        self.addresses = addresses


@dataclass(frozen=True)
class _Failure:
    """A start that came to nothing."""

    why: str  # one sentence
    by_chance: bool  # a port that we chose was taken meanwhile, or tritonserver crashed: the next attempt may succeed


class Server:
    """One tritonserver: `start` returns when it answers, `stop` when it is gone. Usable as a context manager.

    `on_line` receives each log line for the operator, from a thread of the server's own.
    Nothing is left behind: temporary folders and shared memory are removed, and the server ends when this process does.
    What a process that was killed left is removed by the next start.
    """

    def __init__(self, settings: ServerSettings, on_line: Callable[[str], None] | None = None) -> None:
        self.settings = settings
        self._on_line = on_line
        self._log = ServerLog(settings.show_log)
        self._scratch: Scratch | None = None
        self._child: ServerChild | None = None
        self._addresses: Addresses | None = None
        self._front_ends: FrontEndWatch | None = None
        self._loss: str | None = None  # why it ends although nobody told it to
        self._stopping = False

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def addresses(self) -> Addresses:
        assert self._addresses is not None, "the server is not started"
        return self._addresses

    @property
    def stopping(self) -> bool:
        """`terminate`, `stop` or `kill` was called."""
        return self._stopping

    @property
    def pid(self) -> int:
        """tritonserver's process id."""
        assert self._child is not None, "the server is not started"
        return self._child.pid

    @property
    def _folder(self) -> Path:
        assert self._scratch is not None, "the server is not started"
        return self._scratch.folder

    @property
    def shm_prefix(self) -> str:
        """How the names of its files in /dev/shm begin."""
        assert self._scratch is not None, "the server is not started"
        return self._scratch.shm_prefix

    def log_lines(self) -> list[str]:
        """The first and last lines that tritonserver and its processes wrote, shown or not."""
        return self._log.lines()

    def start(self, timeout_seconds: float | None = None) -> Addresses:
        """Checks everything that can be checked beforehand, starts tritonserver and waits until the model is ready.

        Raises:
            EngineError: one sentence; nothing is left running.
            StoppedEarlyError: it was told to stop meanwhile.
        """
        assert self._child is None, "a server is started once"
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        options = engine_options(self.settings)
        config = EngineConfig.parse(options)
        check_tracing(config.otlp_traces_endpoint)
        server_files.check_checkpoint(config)
        resolve_host(self.settings.host)
        installation = server_files.find_installation()
        sweep()
        try:
            attempts = 1
            while (failure := self._attempt(installation, options, deadline)) is not None:
                if not failure.by_chance or attempts == _ATTEMPTS:
                    raise EngineError(failure.why)
                attempts += 1
                if self._on_line is not None:
                    self._on_line(f"paged: {failure.why}; trying again")
            self._front_ends = FrontEndWatch(self.pid, self._folder, self._is_ready, self._lose_front_ends)
            return self.addresses
        except BaseException:
            self.kill()
            self._clean_up()
            raise

    def _attempt(
        self, installation: server_files.Installation, options: Mapping[str, str], deadline: float | None
    ) -> _Failure | None:
        """None: the model is ready."""
        self._clean_up()
        settings = self.settings
        self._log = ServerLog(settings.show_log)
        ports = PortClaim(
            settings.host, http=settings.http_port, grpc=settings.grpc_port, metrics=settings.metrics_port
        )
        try:
            self._scratch = Scratch()
            self._addresses = ports.addresses
            command, environment = self._command(installation, options)
            self._child = ServerChild(command, environment, self._take_line, self._scratch.lock)
            exit_code = self._wait_until_ready(self._child, deadline)
        finally:
            ports.release()
        if exit_code is None:
            self._log.note_ready()
            return None
        return _Failure(
            self._log.failure(exit_code), self._log.busy_port() in ports.chosen or self._log.crashed(exit_code)
        )

    def _wait_until_ready(self, child: ServerChild, deadline: float | None) -> int | None:
        """None when the model is ready, the exit code if tritonserver ended before."""
        metrics_deadline = None
        while True:
            if self._is_ready():  # the metrics service starts last
                metrics_deadline = metrics_deadline or time.monotonic() + _METRICS_SECONDS
                if (
                    _get(self.addresses.host, self.addresses.metrics_port, "/metrics")[0]
                    or time.monotonic() > metrics_deadline
                ):
                    return None
            exit_code = child.wait(_POLL_SECONDS)
            if self._stopping:
                child.wait(_GIVE_UP_SECONDS)
                raise StoppedEarlyError("stopped before it was ready")
            if exit_code is not None:
                return exit_code
            if deadline is not None and time.monotonic() > deadline:
                raise EngineError("tritonserver was not ready in time; --log-verbose shows its log")

    def _command(
        self, installation: server_files.Installation, options: Mapping[str, str]
    ) -> tuple[list[str], dict[str, str]]:
        settings, addresses = self.settings, self.addresses
        repository = server_files.prepare_repository(
            self._folder, model_name=settings.model_name, options=options, instances=settings.instances
        )
        address = resolve_host(settings.host)
        command = [
            str(installation.executable),
            f"--id={self._folder.name}",
            f"--model-repository={repository}",
            f"--backend-directory={server_files.prepare_backends(installation, self._folder)}",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={settings.drain_seconds}",
            *(f"--{service}-address={address}" for service in ("http", "grpc", "metrics")),
            f"--http-port={addresses.http_port}",
            f"--grpc-port={addresses.grpc_port}",
            f"--metrics-port={addresses.metrics_port}",
            *_forwarding(options.get("otlp_traces_endpoint", "")),
            *settings.arguments,
        ]
        environment = server_files.prepare_environment(installation, self._folder)
        # sockets of the engine that a kill leaves behind go with it
        return command, {**environment, "TMPDIR": str(self._folder)}

    def _take_line(self, line: str) -> None:
        if self._log.add(line) and self._on_line is not None:
            try:
                self._on_line(line)
            except OSError:  # the reader of our own output left
                self._on_line = None

    def _is_ready(self) -> bool:
        """The server that answers must be ours, by its id or (with restricted APIs) its log: another one may have taken
        the port.
        """
        scratch = self._scratch
        if scratch is None:
            return False  # it is gone already
        host, port = self.addresses.host, self.addresses.http_port
        status, body = _get(host, port, "/v2")
        ours = (
            _server_id(body) == scratch.folder.name if status == 200 else status == _FORBIDDEN and self._log.listens()
        )
        return ours and _get(host, port, f"/v2/models/{self.settings.model_name}/ready")[0] in (200, _FORBIDDEN)

    def terminate(self) -> None:
        """Asks the server to drain and end, and returns at once. Safe in a signal handler; a second call changes
        nothing.
        """
        if not self._stopping:
            self._stopping = True
            if self._child is not None:
                self._child.send(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the server and every process under it now, without draining."""
        self._stopping = True
        if self._child is not None:
            self._child.kill_all()

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code once the server has ended (negative: minus the signal), None if `seconds` passed before."""
        return 0 if self._child is None else self._child.wait(seconds)

    def stop(self) -> int:
        """Drains and ends the server, waits for it and removes what it left. Returns its exit code; may be called
        again.
        """
        if self._front_ends is not None:
            self._front_ends.close()
        self.terminate()
        exit_code = self.wait(self.settings.drain_seconds + _LAST_SECONDS)
        if exit_code is None:
            self.kill()
            exit_code = self.wait()
        self._clean_up()
        assert exit_code is not None
        return exit_code

    def _lose_front_ends(self, dead: list[int], num_living: int) -> None:
        """Triton Server cannot start another one, and would give it requests: so it stops, once the others' streams are
        at their end.

        The requests of the dead never end for the server, which would wait for its whole exit timeout.
        """
        child, front_ends = self._child, self._front_ends
        assert child is not None and front_ends is not None
        who = f"front end process {', '.join(map(str, dead))} died, with its callers' requests"
        self._loss = f"{who}; the server must be started again"
        if self._on_line is not None:
            self._on_line(
                f"paged: error: {who}; no more requests are taken, {num_living} others finish theirs (at most "
                f"{self.settings.drain_seconds} s)"
            )
        child.send(signal.SIGTERM)
        num_idle = 0
        while child.wait(_POLL_DRAIN_SECONDS) is None:
            waited_for = num_requests(
                _get(self.addresses.host, self.addresses.metrics_port, "/metrics")[1].decode(errors="replace")
            )
            num_idle = num_idle + 1 if waited_for == 0 else 0
            if num_idle * _POLL_DRAIN_SECONDS > _IDLE_SECONDS or not front_ends.living():
                child.kill_all()

    def failure(self) -> EngineError:
        """One sentence on why a server that nobody stopped is gone."""
        exit_code = self.wait() or 0
        if self._loss is None and -exit_code not in CRASHES:
            return EngineError(self._log.failure(exit_code))
        return FrontEndsLostError(self._loss or self._log.failure(exit_code), self.addresses)

    def _clean_up(self) -> None:
        """After the child is gone: its processes that lag behind, its folder, its shared memory."""
        if self._child is not None:
            self._child.kill_all()
            self._child.wait()
        scratch, self._scratch = self._scratch, None
        if scratch is not None:
            scratch.remove()


def engine_options(settings: ServerSettings) -> dict[str, str]:
    """`settings` as parameters for config.pbtxt, with folders made absolute.

    Raises:
        EngineError: an unknown name or a wrong value, or a model given twice.
    """
    if "model" in settings.options and settings.model != DEMO_MODEL:
        raise EngineError("the model is given twice: with --model and with --set model=…")
    # the server has no other model, and there may be an orchestrator
    options = {"on_engine_loss": "exit", "model": settings.model, **settings.options}
    config = EngineConfig.parse(options)
    folder = config.model_folder()
    if folder is not None and config.model != DEMO_MODEL:
        options["model"] = folder.resolve()
    if config.lora_directory:
        options["lora_directory"] = Path(config.lora_directory).expanduser().resolve()
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in options.items()}


def _forwarding(otlp_traces_endpoint: str) -> list[str]:
    """Where spans are collected, the model must see which span of the caller's a request belongs to: headers become
    request parameters.
    """
    if not asks_for_spans(otlp_traces_endpoint):
        return []
    return [f"--{protocol}-header-forward-pattern=(?i)({'|'.join(TRACE_HEADERS)})" for protocol in ("http", "grpc")]


def _get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """Status and body; status 0 if nobody answers."""
    connection = http.client.HTTPConnection(host, port, timeout=_PROBE_SECONDS)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def _server_id(described: bytes) -> str | None:
    try:
        answer = json.loads(described)
    except ValueError:
        return None
    return answer.get("name") if isinstance(answer, dict) else None
