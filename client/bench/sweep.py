"""A sweep: every level of load on every target, in alternation, with the pool watched meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from paged_backend.errors import EngineError
from paged_client.bench.figures import NANO, Figures, summarise
from paged_client.bench.load import Level, LoadError, LoadLimits, Prompting, answers, run_load
from paged_client.bench.perf_analyzer import PerfAnalyzer
from paged_client.bench.pool import PoolFigures, PoolSample, PoolWatch, pool_figures, settle
from paged_client.bench.profile import Trace
from paged_client.bench.target import Target
from paged_client.bench.workload import Span, Workload, make_requests

# tokens, where the workload names no prompt length of its own or shorter answers
_WARM_UP_PROMPT, _WARM_UP_ANSWER = 128, 8
_WARM_UP_REQUESTS = 64  # at most
_WARM_UP_ROUND = 2**31  # of prompts that no measured run sends


@dataclass(frozen=True)
class Run:
    """One target under one level of load, once. Without figures it broke off, and `error` says why."""

    target: str
    level: Level
    repeat: int
    figures: Figures | None
    pool: PoolFigures | None
    samples: Sequence[PoolSample]  # of the pool, while it lasted
    started: float  # seconds since 1970
    error: str | None = None

    @property
    def num_errors(self) -> int:
        """Requests that failed or brought another number of tokens than they asked for; a run that broke off counts as
        one.
        """
        return 1 if self.figures is None else self.figures.num_errors


@dataclass(frozen=True)
class Plan:
    """What to run: levels with the number of requests of each."""

    levels: Sequence[tuple[Level, int]]
    workload: Workload
    repeats: int
    warm_up: bool

    def num_requests(self, num_targets: int) -> int:
        return sum(count for _, count in self.levels) * self.repeats * num_targets


@dataclass(frozen=True)
class Bench:
    """What measuring needs besides targets."""

    tool: PerfAnalyzer
    prompting: Prompting
    limits: LoadLimits


def sweep(bench: Bench, plan: Plan, targets: Sequence[Target], console: Console, runs: list[Run]) -> None:
    """Runs the plan and appends what is finished to `runs`, so that an interrupt loses none of it. A run that breaks
    off is kept with its error; if its server is gone as well, the sweep ends there.

    Raises:
        EngineError: a target cannot even be warmed up.
    """
    with progress_bar(console) as progress:
        task = progress.add_task("", total=plan.num_requests(len(targets)))
        if plan.warm_up:
            for target in targets:
                progress.update(task, description=f"{target.name}: warming up")
                warm_up(bench, plan, target)
        for level_number, (level, count) in enumerate(plan.levels):
            for repeat in range(plan.repeats):
                # whoever goes first gains nothing over the whole
                order = targets if (level_number + repeat) % 2 == 0 else targets[::-1]
                for target in order:
                    progress.update(task, description=f"{target.name}: {level}")
                    run = measure(bench, plan, target, level, count, repeat, advancing(progress, task))
                    runs.append(run)
                    if run.error is not None and not answers(target.url):
                        return


def progress_bar(console: Console) -> Progress:
    """On a terminal a bar; elsewhere a line on stderr now and then."""
    if not console.is_terminal:
        return SpokenProgress()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


class SpokenProgress(Progress):
    """Says what begins, and from time to time how far it is."""

    def __init__(self, seconds: float = 20.0) -> None:
        super().__init__(disable=True)
        self._seconds = seconds
        self._reported = ""
        self._next = 0.0

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        task, now = self.tasks[task_id], time.monotonic()
        if task.description and (task.description != self._reported or now >= self._next):
            self._reported, self._next = task.description, now + self._seconds
            print(
                f"paged: {task.description}: {task.completed:.0f} of {task.total or 0:.0f} requests",
                file=sys.stderr,
                flush=True,
            )


def advancing(progress: Progress, task: TaskID) -> Callable[[float], None]:
    """Takes the number of requests done since now."""
    base = progress.tasks[0].completed
    return lambda done: progress.update(task, completed=base + done)


def warm_up(bench: Bench, plan: Plan, target: Target) -> None:
    """Prompts of the workload's kind with short answers, as many at once as will come.

    Raises:
        EngineError: it broke off.
    """
    at_once = min(_WARM_UP_REQUESTS, max(level.streams or 8 for level, _ in plan.levels))
    longest_prompt, longest_answer = plan.workload.longest_request
    own = min(_WARM_UP_PROMPT, longest_prompt - plan.workload.shared_prefix)
    answer = min(_WARM_UP_ANSWER, longest_answer)
    workload = replace(plan.workload, prompt=plan.workload.prompt or Span(own, own), answer=Span(answer, answer))
    requests = make_requests(workload, at_once, _WARM_UP_ROUND)
    try:
        run_load(
            bench.tool, target, Level(streams=at_once), workload, requests, bench.prompting, bench.limits, lambda: None
        )
    except LoadError as error:
        raise EngineError(f"{target.name}: the warm-up broke off: {error}") from None


def measure(
    bench: Bench, plan: Plan, target: Target, level: Level, count: int, repeat: int, advance: Callable[[float], None]
) -> Run:
    """One run; the prompts of another level or repeat are different ones, so that no prefix cache knows them (all
    targets get the same).
    """
    round_number = repeat * len(plan.levels) + [known for known, _ in plan.levels].index(level)
    requests = make_requests(plan.workload, count, round_number)
    started = time.time()
    with PoolWatch(target.metrics_url, target.model_name) as watch:
        finished, counters = watch.num_finished, watch.counters()
        try:
            traces = run_load(
                bench.tool,
                target,
                level,
                plan.workload,
                requests,
                bench.prompting,
                bench.limits,
                lambda: advance(min(watch.num_finished - finished, count)),
            )
        except LoadError as error:
            return Run(target.name, level, repeat, None, None, watch.samples(started, time.time()), started, str(error))
        settle()
    advance(count)
    start, end = _window(traces)
    samples = watch.samples(start, end)
    gained = {name: value - counters.get(name, 0.0) for name, value in watch.counters().items()}
    return Run(target.name, level, repeat, summarise(traces), pool_figures(samples, gained), samples, start)


def _window(traces: Iterable[Trace]) -> tuple[float, float]:
    """From the first request sent to the last response, seconds since 1970."""
    bounds = [(trace.sent, int(trace.arrivals[-1]) if len(trace.arrivals) else trace.sent) for trace in traces]
    return min((start for start, _ in bounds), default=0) * NANO, max((end for _, end in bounds), default=0) * NANO


def median_runs(runs: Sequence[Run]) -> list[Run]:
    """Of each target's repeats of a level the one with the median tokens/s (the lower of the two middle ones); the
    broken one if one broke off. By level, then by target, in the order in which they first came.
    """
    targets, levels = list(dict.fromkeys(run.target for run in runs)), list(dict.fromkeys(run.level for run in runs))
    groups = [
        [run for run in runs if (run.level, run.target) == (level, target)] for level in levels for target in targets
    ]
    return [_median(group) for group in groups if group]


def _median(group: Sequence[Run]) -> Run:
    broken = next((run for run in group if run.figures is None), None)
    if broken is not None:
        return broken
    ordered = sorted(group, key=lambda run: run.figures.tokens_per_second if run.figures else 0.0)
    return ordered[(len(ordered) - 1) // 2]


def free_folder(out: Path) -> Path:
    """Makes the folder for results.

    Raises:
        EngineError: it cannot be made or written to, or holds results already.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EngineError(f"--out {out}: cannot be written to: {error.strerror}") from None
    if (out / "results.json").exists():
        raise EngineError(f"--out {out}: holds results already; name another folder")
    return out
