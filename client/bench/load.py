"""One run of load: perf_analyzer, as several processes if need be, within a time limit."""

from __future__ import annotations

import re
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paged_backend.server.child import ServerChild
from paged_client.bench.perf_analyzer import PerfAnalyzer
from paged_client.bench.profile import CutExportError, Trace, read_profile
from paged_client.bench.target import Target
from paged_client.bench.workload import Request, Workload, write_input_data

_POLL_SECONDS = 0.1
_ALIVE_SECONDS = 2.0  # between looks at the server's port
_CONNECT_SECONDS = 5.0
_LOST_LOOKS = 3
_ATTEMPTS = 3  # at a run whose export is cut
_FATAL = re.compile(r"Thread \[\d+\] had error: (?P<why>.*)|^(?:error|Error): (?P<other>.*)")


class LoadError(Exception):
    """A run broke off: a request failed (perf_analyzer then gives up), the server went away, or time ran out. The
    message is for the reader of the report.
    """


@dataclass(frozen=True)
class Level:
    """How hard to press: `streams` requests in flight all the time, or `rate` requests a second sent at random
    (Poisson) times.
    """

    streams: int | None = None
    rate: float | None = None

    @property
    def number(self) -> str:
        return f"{self.streams if self.rate is None else self.rate:g}"

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        return "1 stream" if self.streams == 1 else f"{self.streams} streams"


@dataclass(frozen=True)
class Prompting:
    """How prompts are sent, the same for all targets."""

    as_ids: bool
    tokens_per_word: float
    count_tokens: bool


@dataclass(frozen=True)
class LoadLimits:
    processes: int | None  # perf_analyzer processes; None: one for each 64 streams while cores allow
    timeout_seconds: float
    cores: int  # of this machine


def num_processes(level: Level, limits: LoadLimits, num_requests: int) -> int:
    """A perf_analyzer spends 30 to 60 us of a core on a response, so one of them is good for some 20,000
    responses/s.
    """
    most = min(level.streams or num_requests, num_requests)
    wanted = limits.processes or min(-(-(level.streams or 1) // 64), limits.cores // 4)
    if level.rate is not None:  # perf_analyzer wants no fewer requests than a second brings
        wanted = next((count for count in range(wanted, 1, -1) if num_requests // count >= level.rate / count), 1)
    return max(1, min(wanted, most))


def run_load(
    tool: PerfAnalyzer,
    target: Target,
    level: Level,
    workload: Workload,
    requests: Sequence[Request],
    prompting: Prompting,
    limits: LoadLimits,
    tick: Callable[[], None],
) -> list[Trace]:
    """Sends `requests` and returns what came back; calls `tick` several times a second.

    Raises:
        LoadError: the run broke off.
    """
    for _ in range(_ATTEMPTS):
        with tempfile.TemporaryDirectory(prefix="paged-bench-") as folder:
            run = _Run(tool, target, level, workload, requests, prompting, limits, Path(folder))
            try:
                return read_profile(run.exports(tick), counted=prompting.count_tokens)
            except CutExportError:
                continue
    raise LoadError(
        f"perf_analyzer's export was cut {_ATTEMPTS} times; with a C compiler (gcc) on PATH, paged keeps it from that"
    )


class _Run:
    """The processes of one attempt."""

    def __init__(
        self,
        tool: PerfAnalyzer,
        target: Target,
        level: Level,
        workload: Workload,
        requests: Sequence[Request],
        prompting: Prompting,
        limits: LoadLimits,
        folder: Path,
    ) -> None:
        self._target = target
        self._limits = limits
        self._files: list[Path] = []
        self._commands: list[list[str]] = []
        self._lines: list[str] = []
        self._environment = tool.environment
        count = num_processes(level, limits, len(requests))
        for index in range(count):
            share = requests[index::count]
            steps, export = folder / f"input_{index}.json", folder / f"profile_{index}.json"
            write_input_data(
                steps,
                workload,
                share,
                as_ids=prompting.as_ids,
                tokens_per_word=prompting.tokens_per_word,
                count_tokens=prompting.count_tokens,
            )
            self._files.append(export)
            command = [
                str(tool.executable),
                "-m",
                target.model_name,
                "-u",
                target.url,
                "-i",
                "grpc",
                "--streaming",
                "--async",
            ]
            command += [*_level_arguments(level, index, count), "--max-threads", str(max(1, min(4, limits.cores // 4)))]
            self._commands.append(
                [
                    *command,
                    "--input-data",
                    str(steps),
                    "--request-count",
                    str(len(share)),
                    "--profile-export-file",
                    str(export),
                ]
            )

    def exports(self, tick: Callable[[], None]) -> list[Path]:
        """Runs to the end.

        Raises:
            LoadError: see run_load.
        """
        children = [ServerChild(command, self._environment, self._lines.append) for command in self._commands]
        try:
            self._wait(children, tick)
        finally:
            for child in children:
                child.kill_all()
        for child, file in zip(children, self._files, strict=True):
            exit_code = child.wait()
            if exit_code != 0 or not file.is_file():
                raise LoadError(self._why(exit_code))
        return self._files

    def _wait(self, children: Sequence[ServerChild], tick: Callable[[], None]) -> None:
        deadline = time.monotonic() + self._limits.timeout_seconds
        next_look, lost = time.monotonic() + _ALIVE_SECONDS, 0
        while True:
            codes = [child.wait(_POLL_SECONDS / len(children)) for child in children]
            tick()
            if None not in codes or any(code not in (0, None) for code in codes):
                return
            if time.monotonic() > deadline:
                raise LoadError(f"not done within --timeout {self._limits.timeout_seconds:g} s")
            if time.monotonic() > next_look:
                lost = 0 if answers(self._target.url) else lost + 1
                next_look = time.monotonic() + _ALIVE_SECONDS
                if lost == _LOST_LOOKS:
                    raise LoadError(f"the server at {self._target.url} stopped answering")

    def _why(self, exit_code: int | None) -> str:
        for line in self._lines:
            if found := _FATAL.search(line):
                return (found["why"] or found["other"]).strip()
        said = next((line for line in reversed(self._lines) if line.strip()), "no message")
        return f"perf_analyzer ended with exit code {exit_code}: {said.strip()[:200]}"


def _level_arguments(level: Level, index: int, count: int) -> list[str]:
    """This process's part of the load; Poisson streams add up to a Poisson stream."""
    if level.rate is not None:
        rate = f"{level.rate / count:.9g}"
        return ["--request-rate-range", f"{rate}:{rate}", "--request-distribution", "poisson"]
    assert level.streams is not None
    return ["--concurrency-range", str(level.streams // count + (index < level.streams % count))]


def answers(url: str) -> bool:
    """Whether somebody listens at host:port."""
    host, _, port = url.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS):
            return True
    except OSError:
        return False
