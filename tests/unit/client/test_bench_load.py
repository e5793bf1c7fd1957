"""Runs of load with a stand-in for perf_analyzer: what it is asked, and what becomes of its failures."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paged_client.bench import load
from paged_client.bench.load import Level, LoadError, LoadLimits, Prompting, num_processes, run_load
from paged_client.bench.perf_analyzer import PerfAnalyzer
from paged_client.bench.profile import Trace
from paged_client.bench.target import Target
from paged_client.bench.workload import Span, Workload, make_requests

RECORDED = Path(__file__).parent / "recorded_profiles" / "counted.json"
WORKLOAD = Workload(Span(4, 4), Span(8, 8))
PROMPTING = Prompting(as_ids=True, tokens_per_word=1, count_tokens=True)
EXPORT = 'while [ "$1" != --profile-export-file ]; do shift; done; echo "$*" >> calls; '


@pytest.fixture
def url() -> Iterator[str]:
    """Something that listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def run(
    folder: Path,
    script: str,
    url: str,
    *,
    level: Level | None = None,
    processes: int = 1,
    timeout: float = 20,
    requests: int = 4,
) -> list[Trace]:
    """A run with a shell script in perf_analyzer's place; it sees RECORDED, and its arguments are kept in
    `arguments`.
    """
    executable = folder / "perf_analyzer"
    executable.write_text(f'#!/bin/sh\ncd {folder}\necho "$@" >> arguments\n{script}\n')
    executable.chmod(0o755)
    tool = PerfAnalyzer(executable, {**os.environ, "RECORDED": str(RECORDED)}, "stand-in", False)
    target = Target("model", url, "model", None, True, True, True)
    limits = LoadLimits(processes, timeout, 8)
    return run_load(
        tool,
        target,
        level or Level(streams=4),
        WORKLOAD,
        make_requests(WORKLOAD, requests),
        PROMPTING,
        limits,
        lambda: None,
    )


def arguments(folder: Path, option: str) -> list[str]:
    """The option's value in every call."""
    calls = [line.split() for line in (folder / "arguments").read_text().splitlines()]
    return [call[call.index(option) + 1] for call in calls]


def test_the_export_is_what_a_run_returns(tmp_path: Path, url: str) -> None:
    traces = run(tmp_path, EXPORT + 'cp "$RECORDED" "$2"', url)
    assert [trace.num_tokens for trace in traces] == [8, 8, 8, 8]
    assert arguments(tmp_path, "--concurrency-range") == ["4"]
    assert arguments(tmp_path, "--request-count") == ["4"]
    assert arguments(tmp_path, "-u") == [url]


def test_several_processes_share_streams_and_requests_and_their_exports_are_merged(tmp_path: Path, url: str) -> None:
    traces = run(tmp_path, EXPORT + 'cp "$RECORDED" "$2"', url, level=Level(streams=7), processes=3, requests=20)
    assert len(traces) == 12
    assert sorted(arguments(tmp_path, "--concurrency-range")) == ["2", "2", "3"]
    assert sorted(arguments(tmp_path, "--request-count")) == ["6", "7", "7"]


def test_a_rate_is_shared_and_has_both_ends(tmp_path: Path, url: str) -> None:
    """A single number below 1 is taken for the start of a range that ends at 1."""
    run(tmp_path, EXPORT + 'cp "$RECORDED" "$2"', url, level=Level(rate=0.5), processes=2)
    assert arguments(tmp_path, "--request-rate-range") == ["0.25:0.25"] * 2
    assert arguments(tmp_path, "--request-distribution") == ["poisson"] * 2


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        pytest.param(
            "echo 'Thread [1] had error: max_tokens: 9 is too much'; exit 99",
            "^max_tokens: 9 is too much$",
            id="a request failed",
        ),
        pytest.param(
            "echo 'error: Failed to init: no model'; exit 1", "^Failed to init: no model$", id="perf_analyzer refuses"
        ),
        pytest.param("echo something; exit 3", "exit code 3: something", id="unknown"),
        pytest.param("exit 0", "exit code 0: no message", id="no export"),
    ],
)
def test_a_run_that_breaks_off_says_why(script: str, sentence: str, tmp_path: Path, url: str) -> None:
    with pytest.raises(LoadError, match=sentence):
        run(tmp_path, script, url)


def test_one_process_that_fails_ends_the_others(tmp_path: Path, url: str) -> None:
    before = time.monotonic()
    with pytest.raises(LoadError, match="broken"):
        run(
            tmp_path,
            "if mkdir first; then sleep 60; else echo 'Thread [0] had error: broken'; exit 99; fi",
            url,
            processes=2,
        )
    assert time.monotonic() - before < 10


def test_a_run_ends_at_its_timeout(tmp_path: Path, url: str) -> None:
    before = time.monotonic()
    with pytest.raises(LoadError, match="--timeout 1 s"):
        run(tmp_path, "sleep 60", url, timeout=1)
    assert time.monotonic() - before < 10


def test_a_server_that_is_gone_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_ALIVE_SECONDS", 0.1)
    with pytest.raises(LoadError, match="stopped answering"):
        run(tmp_path, "sleep 60", "127.0.0.1:1")


def test_a_cut_export_is_measured_again(tmp_path: Path, url: str) -> None:
    traces = run(
        tmp_path, EXPORT + 'if mkdir cut; then head -c 3000 "$RECORDED" > "$2"; else cp "$RECORDED" "$2"; fi', url
    )
    assert len(traces) == 4
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_an_export_that_is_always_cut_is_an_error_with_a_remedy(tmp_path: Path, url: str) -> None:
    with pytest.raises(LoadError, match="cut 3 times; with a C compiler"):
        run(tmp_path, EXPORT + 'head -c 3000 "$RECORDED" > "$2"', url)


@pytest.mark.parametrize(
    ("level", "cores", "asked", "expected"),
    [
        (Level(streams=1), 16, None, 1),
        (Level(streams=64), 16, None, 1),
        (Level(streams=256), 16, None, 4),
        (Level(streams=256), 2, None, 1),
        (Level(rate=100), 16, None, 1),
        (Level(streams=4), 16, 8, 4),
        (Level(rate=100), 2, 8, 8),
        (Level(rate=1000), 2, 3, 2),  # three would have 333 requests for 333.3 a second
    ],
    ids=str,
)
def test_processes_follow_streams_and_cores_unless_they_are_given(
    level: Level, cores: int, asked: int | None, expected: int
) -> None:
    assert num_processes(level, LoadLimits(asked, 1, cores), 1000) == expected
