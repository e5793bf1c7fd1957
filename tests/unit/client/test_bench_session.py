"""Around a measurement: an interrupt loses nothing that is finished, and progress is told without a terminal, too."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import typer
from rich.console import Console

from paged_client.bench import session as session_module
from paged_client.bench.load import LoadLimits
from paged_client.bench.perf_analyzer import PerfAnalyzer
from paged_client.bench.report import Facts
from paged_client.bench.session import INTERRUPTED, Session
from paged_client.bench.sweep import Run, SpokenProgress, progress_bar
from tests.unit.client.test_bench_memory import PAGED, RUNS, run


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setattr(
        session_module, "find_perf_analyzer", lambda _: PerfAnalyzer(Path("/bin/true"), {}, "none", False)
    )
    return Session(tmp_path / "out", False, LoadLimits(1, 10.0, 2))


FACTS = Facts("today", "paged bench", "2 cores", "none", "some", "counted", "ids", {})


def test_an_interrupt_keeps_what_is_finished_and_the_command_ends_as_interrupted(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[Run] = []
    with session.measuring(runs):
        runs.append(RUNS[0])
        raise KeyboardInterrupt
    with pytest.raises(typer.Exit) as left:
        session.finish(FACTS, runs, [])
    assert left.value.exit_code == INTERRUPTED
    assert len(json.loads((session.folder / "results.json").read_text())["runs"]) == 1
    captured = capsys.readouterr()
    assert "paged: interrupted: 1 finished run follows" in captured.err
    assert "results.json" in captured.out


def test_an_interrupt_before_the_first_run_is_one(session: Session) -> None:
    with pytest.raises(KeyboardInterrupt), session.measuring([]):
        raise KeyboardInterrupt


def test_a_whole_measurement_ends_with_its_errors_only(session: Session) -> None:
    with session.measuring([]):
        pass
    session.finish(FACTS, [run(PAGED, 1, 1, 10, 0.9, 4)], [])


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with SpokenProgress(seconds=3600.0) as progress:
        task = progress.add_task("", total=12)
        progress.update(task, description="paged_llm: 1 stream")
        for done in range(9):
            progress.update(task, completed=done)
        progress.update(task, description="paged_llm: 8 streams")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["paged: paged_llm: 1 stream: 0 of 12 requests", "paged: paged_llm: 8 streams: 8 of 12 requests"]
    with SpokenProgress(seconds=0.0) as progress:
        task = progress.add_task("warming up", total=2)
        progress.update(task, completed=1)
    assert capsys.readouterr().err == "paged: warming up: 1 of 2 requests\n"


def test_a_terminal_has_a_bar() -> None:
    assert not isinstance(progress_bar(Console(file=io.StringIO(), force_terminal=True)), SpokenProgress)
    assert isinstance(progress_bar(Console(file=io.StringIO())), SpokenProgress)
