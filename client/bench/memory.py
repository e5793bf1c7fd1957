"""`paged bench memory`: what paging does for memory and for speed, on real traffic.

The same server twice with the same bytes of KV memory, the same model and the same requests: pages as long as the
longest sequence (reservation: every sequence holds room for the most it could ever need), and pages of a few tokens.
One option differs: page_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.server.files import check_checkpoint
from paged_backend.server.launch import Server, ServerSettings, engine_options
from paged_client.bench.figures import Figures
from paged_client.bench.load import Level, answers
from paged_client.bench.pool import PoolFigures
from paged_client.bench.report import new_table
from paged_client.bench.sweep import Bench, Plan, Run, advancing, measure, progress_bar, warm_up
from paged_client.bench.target import Target, check_workload, find_target
from paged_client.bench.workload import Workload

RESERVED, PAGED = "reserved", "paged"
_RATE_STEPS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)  # of what the reserved pool can take
_LIMIT_FACTOR = 2.0  # the latency limit, when none is given, over the lowest p90 of the reserved pool
_LEAST_REQUESTS = 8
_DRAIN_SECONDS = 2
_OURS = ("page_size", "num_pages", "pool_bytes", "pool_memory_fraction", "max_model_len")


@dataclass(frozen=True)
class MemoryPlan:
    settings: ServerSettings  # but for the options that decide the pool
    page_size: int  # of the paged pool
    max_model_len: int
    pool_sequences: int  # KV memory, in sequences of max_model_len
    rates: Sequence[float] | None  # requests a second, rising; None: by what the reserved pool can take
    seconds: float  # of sending, at each rate
    latency_limit: float | None  # seconds; None: twice the lowest p90 of the reserved pool
    workload: Workload


@dataclass(frozen=True)
class Verdict:
    """The comparison in numbers. Memory at the highest rate, speed at the same p90 latency."""

    wasted: dict[str, float]  # share of the held slots without a token
    running: dict[str, float]  # sequences at once, mean while requests waited (if any did, else over all)
    full: dict[str, bool]  # requests waited: memory, not the load, was the limit
    latency_limit: float  # seconds, of the p90
    tokens_per_second: dict[str, float]  # the most within that limit, on the line between measured rates
    running_ratio: float
    speed_ratio: float


def check_plan(plan: MemoryPlan) -> None:
    """
    Raises:
        EngineError: an option is out of its bounds, or the checkpoint is not for it.
    """
    if plan.page_size & (plan.page_size - 1):
        raise EngineError(f"--page-size {plan.page_size}: expected a power of two")
    if plan.page_size >= plan.max_model_len:
        raise EngineError(f"--page-size {plan.page_size}: expected less than --max-model-len ({plan.max_model_len})")
    for name in _OURS:
        if name in plan.settings.options:
            raise EngineError(
                f"--set {name}: this benchmark sets it itself; use --max-model-len, --page-size and --pool-sequences"
            )
    try:
        check_checkpoint(EngineConfig.parse(engine_options(_settings_of(plan, PAGED))))
    except EngineError as error:
        raise EngineError(str(error).replace("max_model_len:", "--max-model-len")) from None


def pool_options(plan: MemoryPlan, kind: str) -> dict[str, str]:
    """The options that make the two pools; both have max_model_len * pool_sequences slots (the paged one less the part
    of a page that does not fit).
    """
    page_size = plan.max_model_len if kind == RESERVED else plan.page_size
    num_pages = plan.max_model_len * plan.pool_sequences // page_size
    return {"max_model_len": str(plan.max_model_len), "page_size": str(page_size), "num_pages": str(num_pages)}


def _settings_of(plan: MemoryPlan, kind: str) -> ServerSettings:
    options: Mapping[str, Any] = {**plan.settings.options, **pool_options(plan, kind)}
    return replace(plan.settings, options=options, drain_seconds=_DRAIN_SECONDS)


def run_memory(
    plan: MemoryPlan, bench: Bench, console: Console, on_line: Callable[[str], None], runs: list[Run]
) -> None:
    """Both servers, one after the other, at every rate. What is finished is appended to `runs`, so that an interrupt
    loses none of it.

    Raises:
        EngineError: a server cannot start, or refuses the workload.
    """
    rates = plan.rates
    for kind in (RESERVED, PAGED):
        settings = _settings_of(plan, kind)
        options = settings.options
        on_line(
            f"paged: starting the server with {kind} memory: page_size {options['page_size']}, num_pages "
            f"{options['num_pages']}"
        )
        with Server(settings, on_line) as server:
            target = find_target(
                kind,
                server.addresses.grpc_url,
                settings.model_name,
                url_option="gRPC",
                model_option="--model-name",
                metrics_url=server.addresses.metrics_url,
            )
            check_workload(
                target, plan.workload, as_ids=bench.prompting.as_ids, per_word=bench.prompting.tokens_per_word
            )
            if rates is None:
                rates = _find_rates(bench, plan, target, console)
                on_line(f"paged: rates: {', '.join(f'{rate:g}' for rate in rates)} requests/s")
            _at_rates(bench, plan, target, rates, console, runs)


def _plan_of(plan: MemoryPlan, rates: Sequence[float]) -> Plan:
    levels = [(Level(rate=rate), max(math.ceil(rate * plan.seconds), _LEAST_REQUESTS)) for rate in rates]
    return Plan(levels, plan.workload, 1, True)


def _find_rates(bench: Bench, plan: MemoryPlan, target: Target, console: Console) -> list[float]:
    """Steps around the requests a second that the reserved pool takes when there are always enough."""
    level, count = Level(streams=2 * plan.pool_sequences), 4 * plan.pool_sequences
    seeking = Plan([(level, count)], plan.workload, 1, True)
    with progress_bar(console) as progress:
        task = progress.add_task("reserved: how much it takes", total=count)
        warm_up(bench, seeking, target)
        run = measure(bench, seeking, target, level, count, 1, advancing(progress, task))
    if run.figures is None or not run.figures.requests_per_second:
        raise EngineError(f"no rate could be found: {run.error or 'no request was answered'}; give --rates")
    return list(dict.fromkeys(float(f"{step * run.figures.requests_per_second:.2g}") for step in _RATE_STEPS))


def _at_rates(
    bench: Bench, plan: MemoryPlan, target: Target, rates: Sequence[float], console: Console, runs: list[Run]
) -> None:
    sweep_plan = _plan_of(plan, rates)
    with progress_bar(console) as progress:
        task = progress.add_task(f"{target.name}: warming up", total=sweep_plan.num_requests(1))
        warm_up(bench, sweep_plan, target)
        for level, count in sweep_plan.levels:
            progress.update(task, description=f"{target.name}: {level}")
            runs.append(measure(bench, sweep_plan, target, level, count, 0, advancing(progress, task)))
            if runs[-1].error is not None and not answers(target.url):
                break


def judge(runs: Sequence[Run], latency_limit: float | None) -> Verdict | None:
    """None unless both kinds were measured with their pool. After an interrupt only the rates count that both were
    measured at.
    """
    common = {run.level for run in runs if run.target == RESERVED} & {run.level for run in runs if run.target == PAGED}
    runs = [run for run in runs if run.level in common]
    measured = {
        kind: [(run.figures, run.pool) for run in runs if run.target == kind and run.figures and run.pool]
        for kind in (RESERVED, PAGED)
    }
    if not all(measured.values()):
        return None
    limit = latency_limit or _LIMIT_FACTOR * min(figures.latency.p90 for figures, _ in measured[RESERVED] if figures)
    last = {kind: pool for kind, found in measured.items() for _, pool in found if pool}
    running = {kind: running_at_once(pool) for kind, pool in last.items()}
    speed = {
        kind: _most_within(limit, [figures for figures, _ in found if figures]) for kind, found in measured.items()
    }
    return Verdict(
        wasted={kind: 1 - pool.utilisation for kind, pool in last.items()},
        running=running,
        full={kind: was_full(pool) for kind, pool in last.items()},
        latency_limit=limit,
        tokens_per_second=speed,
        running_ratio=running[PAGED] / running[RESERVED],
        speed_ratio=speed[PAGED] / speed[RESERVED] if speed[RESERVED] else float("nan"),
    )


def running_at_once(pool: PoolFigures) -> float:
    """As many as memory lets run if requests ever waited for it, else as many as there were."""
    return pool.running_when_full if was_full(pool) else pool.running_mean


def was_full(pool: PoolFigures) -> bool:
    """Requests waited."""
    return math.isfinite(pool.running_when_full)


def _most_within(limit: float, figures: Sequence[Figures]) -> float:
    """The most tokens/s with a p90 latency of at most `limit`; 0 if no rate keeps it. Between two rates speed and
    latency go in a straight line.
    """
    most = 0.0
    points = [(each.latency.p90, each.tokens_per_second) for each in figures]
    for number, (latency, speed) in enumerate(points):
        if latency <= limit:
            most = max(most, speed)
        elif number and points[number - 1][0] <= limit:
            before, slower = points[number - 1]
            most = max(most, slower + (speed - slower) * (limit - before) / (latency - before))
    return most


def print_memory(console: Console, runs: Sequence[Run], verdict: Verdict | None) -> None:
    table = new_table("The same bytes of KV memory, reserved and paged")
    table.add_column("requests/s\nsent", justify="right", no_wrap=True)
    table.add_column("memory", no_wrap=True)
    for title in (
        "KV memory\nwasted",
        "running\nat once",
        "tokens/s",
        "latency, s\np50 / p90",
        "first token, s\np50 / p90",
        "errors",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for run in sorted(runs, key=lambda run: run.level.rate or 0):
        table.add_row(f"{run.level.rate:g}", run.target, *_cells(run), end_section=run.target == PAGED)
    console.print(table)
    for run in runs:
        if run.error is not None:
            console.print(
                f"{run.target}, {run.level}: broke off: {run.error}", style="red", markup=False, highlight=False
            )
    if verdict is not None:
        console.print("\n".join(sentences(verdict)), highlight=False, markup=False)


def _cells(run: Run) -> list[str]:
    figures, pool = run.figures, run.pool
    if figures is None:
        return ["broke off"]
    wasted, running = "–", "–"
    if pool is not None:
        wasted, running = (
            f"{100 * (1 - pool.utilisation):.1f} %",
            f"{running_at_once(pool):.1f}" + (" (full)" if was_full(pool) else ""),
        )
    latency, first = figures.latency, figures.first_token
    return [
        wasted,
        running,
        f"{figures.tokens_per_second:,.0f}",
        f"{latency.p50:.2f} / {latency.p90:.2f}",
        f"{first.p50:.2f} / {first.p90:.2f}",
        str(figures.num_errors),
    ]


def sentences(verdict: Verdict) -> list[str]:
    """The verdict in words."""
    wasted, running, speed = verdict.wasted, verdict.running, verdict.tokens_per_second
    return [
        f"KV memory wasted at the highest rate: {100 * wasted[RESERVED]:.0f} % reserved, "
        f"{100 * wasted[PAGED]:.1f} % paged",
        f"sequences at once in that memory: {running[RESERVED]:.1f} reserved, {running[PAGED]:.1f} paged: "
        f"{verdict.running_ratio:.1f} ×"
        + ("" if verdict.full[PAGED] else " (the paged pool was never full: higher --rates show more)"),
        f"tokens/s with a p90 latency of {verdict.latency_limit:.2f} s or less: {speed[RESERVED]:,.0f} reserved, "
        f"{speed[PAGED]:,.0f} paged: "
        + (
            f"{verdict.speed_ratio:.1f} ×" if math.isfinite(verdict.speed_ratio) else "the reserved pool never keeps it"
        ),
    ]


def draw_memory(file: Path, runs: Sequence[Run], verdict: Verdict | None, title: str) -> Path:
    """The one picture: waste, sequences at once, tokens/s and p90 latency over the request rate."""
    from paged_client.bench.plots import draw_panels

    colours = {RESERVED: "#e1812c", PAGED: "#1f77b4"}
    panels: list[tuple[str, Callable[[Run], float]]] = [
        ("KV memory wasted, %", lambda run: 100 * (1 - run.pool.utilisation) if run.pool else math.nan),
        ("Sequences running at once", lambda run: running_at_once(run.pool) if run.pool else math.nan),
        ("Tokens/s", lambda run: run.figures.tokens_per_second if run.figures else math.nan),
        ("Latency of a request, p90, seconds", lambda run: run.figures.latency.p90 if run.figures else math.nan),
    ]
    lines = {
        name: {
            kind: [(run.level.rate or 0.0, value(run)) for run in runs if run.target == kind]
            for kind in (RESERVED, PAGED)
        }
        for name, value in panels
    }
    limit = {panels[3][0]: verdict.latency_limit} if verdict else {}
    return draw_panels(file, lines, colours, "requests/s sent", title, log=(panels[3][0],), limits=limit)
