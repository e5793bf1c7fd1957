"""What every measurement of `paged bench` needs around it: a folder for results, perf_analyzer, a console, and an end
that loses nothing.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from paged_backend.extras import install_command
from paged_backend.log_lines import without_stamp
from paged_client.bench.load import LoadLimits, Prompting
from paged_client.bench.perf_analyzer import find_perf_analyzer
from paged_client.bench.report import WIDTH, Facts, write_csv, write_json
from paged_client.bench.sweep import Run, free_folder
from paged_client.bench.workload import Workload

_PROGRESS = re.compile(r"\d ?% \(")  # "capturing steps 2 % (1 of 38 shapes)": nothing that was decided
_COUNTED = "Tokens are counted from the output num_output_tokens."
_ASSUMED = (
    "Tokens are not counted: a request is taken to have brought the max_tokens that it asked for with ignore_eos."
)
_AS_IDS = "Prompts go as input_ids of exact length."
_AS_TEXT = "Prompts go as text of about that length, {:.2f} tokens a word."
_BROKE_OFF = 1
INTERRUPTED = 130


class Session:
    """What every measurement needs, made before the first request: a folder that can be written to, perf_analyzer, a
    console.
    """

    def __init__(self, out: Path, plots: bool, limits: LoadLimits) -> None:
        self.folder = free_folder(out)
        self.plots = plots and _can_plot()
        self.limits = limits
        self.tool = find_perf_analyzer(say)
        self.console = Console(width=min(WIDTH, Console().width) if sys.stdout.isatty() else WIDTH, highlight=False)
        self.lines: list[str] = []  # of the server that was started
        self.interrupted = False
        if self.tool.may_cut_exports:
            say("paged: no C compiler on PATH: perf_analyzer may cut its export short, a run is then repeated")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        """A failure leaves no empty folder."""
        with suppress(OSError):
            self.folder.rmdir()

    def keep(self, line: str) -> None:
        line = without_stamp(line)
        say(line)
        if not _PROGRESS.search(line):
            self.lines.append(line)

    def facts(self, workload: Workload, prompting: Prompting, servers: dict[str, str]) -> Facts:
        started = {"started": "; ".join(line.removeprefix("paged: ") for line in self.lines)} if self.lines else {}
        return Facts(
            date=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            command=shlex.join(["paged", *sys.argv[1:]]),
            machine=_machine(),
            perf_analyzer=self.tool.found,
            workload=workload.describe(),
            counting=_COUNTED if prompting.count_tokens else _ASSUMED,
            prompting=_AS_IDS if prompting.as_ids else _AS_TEXT.format(prompting.tokens_per_word),
            servers={**servers, **started},
        )

    @contextmanager
    def measuring(self, runs: Sequence[Run]) -> Iterator[None]:
        """Ctrl-C ends the measuring; what is finished is reported all the same."""
        try:
            yield
        except KeyboardInterrupt:
            if not runs:
                raise
            self.interrupted = True
            say(
                f"paged: interrupted: {len(runs)} finished run{'s' if len(runs) > 1 else ''} "
                f"follow{'s' if len(runs) == 1 else ''}"
            )

    def finish(self, facts: Facts, runs: Sequence[Run], pictures: Sequence[Path], **extra: Any) -> None:
        """Writes the numbers, says where everything lies, and exits with 1 if a request failed, 130 after an
        interrupt.
        """
        write_json(self.folder / "results.json", facts, runs, **extra)
        write_csv(self.folder / "results.csv", runs)
        names = ", ".join(file.name for file in pictures)
        self.console.print(
            f"\nresults.json, results.csv{', ' + names if names else ''} in {self.folder}", soft_wrap=True, markup=False
        )
        if self.interrupted:
            raise typer.Exit(INTERRUPTED)
        if any(run.num_errors for run in runs):
            raise typer.Exit(_BROKE_OFF)


def _can_plot() -> bool:
    if find_spec("matplotlib") is None:
        say(f"paged: no pictures: matplotlib is not installed ({install_command('bench')})")
        return False
    return True


def _machine() -> str:
    """This machine, which is the server's if that was started here: GPUs if there are any, else the number of cores."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return f"{os.cpu_count()} cores {platform.machine()}, no GPU"
    names = asked.stdout.split("\n")[:-1]
    return f"{len(names)} × {names[0]}" if len(names) > 1 else names[0]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
