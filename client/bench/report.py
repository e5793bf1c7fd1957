"""What a sweep found: tables for people (100 columns at most), JSON and CSV for programs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from paged_client.bench.figures import Figures, Spread
from paged_client.bench.pool import PoolFigures
from paged_client.bench.sweep import Run, median_runs

WIDTH = 100
_NAME_WIDTH = 14
_SPREADS = ("first_token", "inter_token", "gap", "latency", "request_speed")


@dataclass(frozen=True)
class Facts:
    """What a reader needs to repeat the measurement."""

    date: str
    command: str
    machine: str
    perf_analyzer: str
    workload: str
    counting: str  # where token counts come from
    prompting: str  # how prompts are sent
    servers: dict[str, str]  # target -> address and model, or what the started server said


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[Figures, PoolFigures | None], str]


def print_report(console: Console, facts: Facts, runs: Sequence[Run]) -> None:
    shown = median_runs(runs)
    several = len({run.target for run in shown}) > 1
    some, some_pool = any(run.figures for run in shown), any(run.pool for run in shown)
    guessed = any(run.pool and run.pool.counters.get(f"{_DRAFTS}checked_total") for run in shown)
    tables = (
        ("Speed", _SPEED, True),
        ("Latency", _LATENCY, some),
        ("KV pool", _POOL, some_pool),
        ("Speculation", _SPECULATION, guessed),
    )
    for title, columns, wanted in tables:
        if wanted:
            console.print(_table(title, columns, shown, several))
    if ratios(shown):
        console.print(_ratio_table(shown))
    for run in runs:
        if run.error is not None:
            console.print(
                f"{run.target}, {run.level}: broke off: {run.error}", style="red", markup=False, highlight=False
            )
    console.print(f"{facts.workload}. {facts.counting} {facts.prompting}", style="dim", markup=False, highlight=False)


def new_table(title: str) -> Table:
    """Nothing in it is ever wrapped, so that numbers stay readable; 100 columns hold every table of ours."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def _table(title: str, columns: Sequence[_Column], runs: Sequence[Run], several: bool) -> Table:
    table = new_table(title)
    table.add_column("streams" if runs and runs[0].level.rate is None else "req/s\nsent", justify="right", no_wrap=True)
    if several:
        table.add_column("server", no_wrap=True, max_width=_NAME_WIDTH)
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for run in runs:
        head = [run.level.number, *([run.target] if several else [])]
        figures = run.figures
        table.add_row(
            *head, *(["broke off"] if figures is None else [column.cell(figures, run.pool) for column in columns])
        )
    return table


def ratios(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """First target against second, by level, each so that more than 1 speaks for the first. Of median runs."""
    names = list(dict.fromkeys(run.target for run in runs))
    if len(names) < 2:
        return []
    found = []
    for ours in (run for run in runs if run.target == names[0]):
        theirs = next((run for run in runs if run.target == names[1] and run.level == ours.level), None)
        if theirs is None or ours.figures is None or theirs.figures is None:
            continue
        a, b = ours.figures, theirs.figures
        found.append(
            {
                "level": str(ours.level),
                "tokens_per_second": _over(a.tokens_per_second, b.tokens_per_second),
                "first_token_p50": _over(b.first_token.p50, a.first_token.p50),
                "first_token_p99": _over(b.first_token.p99, a.first_token.p99),
                "inter_token_p50": _over(b.inter_token.p50, a.inter_token.p50),
                "inter_token_p99": _over(b.inter_token.p99, a.inter_token.p99),
                "latency_p90": _over(b.latency.p90, a.latency.p90),
            }
        )
    return found


def _ratio_table(runs: Sequence[Run]) -> Table:
    names = list(dict.fromkeys(run.target for run in runs))
    table = new_table(f"{names[0]} against {names[1]}: how many times better")
    titles = ("load", "tokens/s", "first token p50", "p99", "inter-token p50", "p99", "latency p90")
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for ratio in ratios(runs):
        table.add_row(
            ratio["level"],
            *(f"{value:.2f} ×" if math.isfinite(value) else "–" for name, value in ratio.items() if name != "level"),
        )
    return table


def write_json(file: Path, facts: Facts, runs: Sequence[Run], **extra: Any) -> None:
    """Everything but the single values behind the percentiles."""
    shown = median_runs(runs)
    content = {**asdict(facts), "runs": [_plain(run, run in shown) for run in runs], "ratios": ratios(shown), **extra}
    file.write_text(json.dumps(_without_nan(content), indent=1) + "\n")


def write_csv(file: Path, runs: Sequence[Run]) -> None:
    """One line a run; times in seconds."""
    rows = [_flat(run) for run in runs]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", newline="") as sheet:
        writer = csv.DictWriter(sheet, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _plain(run: Run, is_median: bool) -> dict[str, Any]:
    figures = (
        None
        if run.figures is None
        else {name: value for name, value in _fields(run.figures).items() if name != "samples"}
    )
    return {
        "target": run.target,
        "level": {"streams": run.level.streams, "rate": run.level.rate},
        "repeat": run.repeat,
        "median_of_repeats": is_median,
        "started": run.started,
        "error": run.error,
        "num_errors": run.num_errors,
        "figures": figures,
        "pool": None if run.pool is None else asdict(run.pool),
        "pool_over_time": [asdict(sample) for sample in run.samples],
    }


def _flat(run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {
        "target": run.target,
        "streams": run.level.streams,
        "rate": run.level.rate,
        "repeat": run.repeat,
        "error": run.error,
    }
    if run.figures is not None:
        for name, value in _fields(run.figures).items():
            if name in _SPREADS:
                row |= {f"{name}_{part}": number for part, number in value.items()}
            elif name != "samples":
                row[name] = value
    if run.pool is not None:
        row |= {
            f"pool_{name}": value for name, value in asdict(run.pool).items() if name != "counters"
        } | run.pool.counters
    return row


def _fields(figures: Figures) -> dict[str, Any]:
    return {name: asdict(value) if isinstance(value, Spread) else value for name, value in vars(figures).items()}


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {name: _without_nan(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_without_nan(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _over(above: float, below: float) -> float:
    return above / below if below else float("nan")


def milliseconds(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{1000 * value:.1f}" if value < 0.1 else f"{1000 * value:,.0f}"


def seconds(value: float) -> str:
    return f"{value:,.2f}"


def _three(spread: Spread, spell: Callable[[float], str] = milliseconds) -> str:
    return " / ".join(spell(value) for value in (spread.p50, spread.p90, spread.p99))


def _of_pool(spell: Callable[[PoolFigures], str]) -> Callable[[Figures, PoolFigures | None], str]:
    return lambda _, pool: "–" if pool is None else spell(pool)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


def _num_drafts(pool: PoolFigures, name: str) -> float:
    return pool.counters.get(f"{_DRAFTS}{name}_total", 0)


def _mean_accepted(pool: PoolFigures) -> str:
    num_checked = _num_drafts(pool, "checked")
    return f"{_num_drafts(pool, 'accepted') / num_checked:.2f}" if num_checked else "–"


_DRAFTS = "paged_drafts_"
_SPEED = (
    _Column("tokens/s", lambda figures, _: f"{figures.tokens_per_second:,.0f}"),
    _Column("tokens/s a\nrequest, p50", lambda figures, _: f"{figures.request_speed.p50:,.1f}"),
    _Column("requests/s", lambda figures, _: f"{figures.requests_per_second:,.2f}"),
    _Column("tokens a\nresponse", lambda figures, _: f"{figures.tokens_per_response:.2f}"),
    _Column("requests", lambda figures, _: f"{figures.num_requests:,}"),
    _Column("errors", lambda figures, _: f"{figures.num_errors:,}"),
)
_LATENCY = (
    _Column("first token, ms\np50 / p90 / p99", lambda figures, _: _three(figures.first_token)),
    _Column("inter-token, ms\np50 / p90 / p99", lambda figures, _: _three(figures.inter_token)),
    _Column("gap, ms\np99", lambda figures, _: milliseconds(figures.gap.p99)),
    _Column(
        "whole, s\np50 / p90 / p99",
        lambda figures, _: " / ".join(
            f"{value:.2f}" for value in (figures.latency.p50, figures.latency.p90, figures.latency.p99)
        ),
    ),
)
_POOL = (
    _Column(
        "pages in use\nmean / most", _of_pool(lambda pool: f"{pool.pages_held_mean:,.0f} / {pool.pages_held_max:,}")
    ),
    _Column("of the\npool", _of_pool(lambda pool: _share(pool.pages_held_max, pool.pages_total))),
    _Column("utilisation", _of_pool(lambda pool: f"{100 * pool.utilisation:.0f} %")),
    _Column("running at once\nmean / most", _of_pool(lambda pool: f"{pool.running_mean:,.1f} / {pool.running_max:,}")),
    _Column("pre-\nempted", _of_pool(lambda pool: f"{pool.counters.get('paged_preemptions_total', 0):,.0f}")),
    _Column(
        "prefix\nhits",
        _of_pool(
            lambda pool: _share(
                pool.counters.get("paged_prefix_cache_hits_total", 0),
                pool.counters.get("paged_prefix_cache_queries_total", 0),
            )
        ),
    ),
)
_SPECULATION = (
    _Column("guessed", _of_pool(lambda pool: f"{_num_drafts(pool, 'proposed'):,.0f}")),
    _Column("right", _of_pool(lambda pool: _share(_num_drafts(pool, "accepted"), _num_drafts(pool, "proposed")))),
    _Column("mean accepted\nlength", _of_pool(_mean_accepted)),
)
