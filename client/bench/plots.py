"""Pictures of a sweep, as PNG. matplotlib is imported here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from paged_client.bench.figures import Figures, Seconds, Spread
from paged_client.bench.sweep import Run, median_runs

TARGET_COLOURS = ("#1f77b4", "#e1812c")
_LIVE, _WASTED = "#2a9d8f", "#e76f51"
_LIMIT_TEXT: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": 8.5, "color": "#555555"}
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def draw(out: Path, runs: Sequence[Run], title: str) -> list[Path]:
    """Writes every picture there is something to draw for, and returns the files."""
    shown = [run for run in median_runs(runs) if run.figures is not None]
    files = []
    with matplotlib.rc_context(_STYLE):
        if shown:
            files += [
                _throughput_latency(out / "throughput_latency.png", shown, title),
                _distributions(out / "latencies.png", shown, title),
            ]
        first = runs[0].target if runs else ""
        sampled = [run for run in shown if run.samples and run.target == first]
        if sampled:
            files.append(_pool(out / "pool.png", sampled, title))
    return files


def new_figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10.5, color="#555555", x=0.01, ha="left")
    return figure


def _throughput_latency(file: Path, runs: Sequence[Run], title: str) -> Path:
    """One point a level: further right is more work, further down is less waiting."""
    figure = new_figure(10, 4.8, title)
    panels: list[tuple[str, Callable[[Figures], Spread]]] = [
        ("First token", lambda figures: figures.first_token),
        ("Between tokens", lambda figures: figures.inter_token),
    ]
    for axes, (name, spread) in zip(figure.subplots(1, 2), panels, strict=True):
        for number, target in enumerate(_targets(runs)):
            colour, offset = TARGET_COLOURS[number], (0, -13) if number == 0 else (0, 6)
            own = [run for run in runs if run.target == target]
            figures = [run.figures for run in own if run.figures is not None]
            speed = [each.tokens_per_second for each in figures]
            low, high = (np.array([getattr(spread(each), part) for each in figures]) * 1000 for part in ("p50", "p99"))
            axes.fill_between(speed, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(speed, high, "--", color=colour, linewidth=1, label=f"{target}, p99")
            axes.plot(speed, low, "o-", color=colour, linewidth=2, markersize=5, label=f"{target}, p50")
            for x, y, run in zip(speed, low, own, strict=True):
                axes.annotate(
                    _short(run),
                    (x, y),
                    xytext=offset,
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                    color=colour,
                )
        axes.set(title=name, xlabel="tokens/s, all requests together", ylabel="milliseconds", yscale="log")
        _plain_log(axes.yaxis)
        axes.set_xlim(left=0)
        axes.margins(y=0.15)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=4)
    return _save(figure, file)


def _distributions(file: Path, runs: Sequence[Run], title: str) -> Path:
    """The share of requests that waited no longer than x, one line a level."""
    figure = new_figure(11, 4.4, title)
    levels = list(dict.fromkeys(run.level for run in runs))
    palette: Any = matplotlib.colormaps["viridis"]
    colours = palette(np.linspace(0.05, 0.85, len(levels)))
    panels: list[tuple[str, Callable[[Figures], Seconds]]] = [
        ("Time to first token", lambda figures: figures.samples.first_token),
        ("Inter-token latency", lambda figures: figures.samples.inter_token),
    ]
    several = len(_targets(runs)) > 1
    for axes, (name, values) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for run in runs:
            assert run.figures is not None
            waits = np.sort(values(run.figures)) * 1000
            if len(waits):
                style = "-" if run.target == _targets(runs)[0] else "--"
                share = np.arange(1, len(waits) + 1) / len(waits) * 100
                label = f"{run.level}, {run.target}" if several else str(run.level)
                axes.step(
                    [waits[0], *waits],
                    [0, *share],
                    style,
                    where="post",
                    color=colours[levels.index(run.level)],
                    linewidth=1.8,
                    label=label,
                )
        axes.set(title=name, xlabel="milliseconds", xscale="log", ylim=(0, 101))
        _plain_log(axes.xaxis)
    first = figure.axes[0]
    first.set_ylabel("requests no slower, %")
    figure.legend(*first.get_legend_handles_labels(), fontsize=9, loc="outside right upper")
    return _save(figure, file)


def _pool(file: Path, runs: Sequence[Run], title: str) -> Path:
    """The pool over the time of all runs, put end to end: held pages with a token in their slots and without,
    utilisation, requests.
    """
    figure = new_figure(10, 6, title)
    pages, utilisation, requests = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1])
    offset = 0.0
    for run in runs:
        samples, first = run.samples, run is runs[0]
        times = np.array([sample.time for sample in samples]) - samples[0].time + offset
        held = np.array([sample.pages_held for sample in samples])
        share = np.array([sample.utilisation for sample in samples])
        labels = ["slots with a token", "slots without: wasted"] if first else []
        pages.stackplot(times, held * share, held * (1 - share), colors=[_LIVE, _WASTED], labels=labels)
        utilisation.plot(times, np.where(held > 0, 100 * share, np.nan), color=_LIVE, linewidth=1.5)
        requests.plot(
            times,
            [sample.running for sample in samples],
            color=_LIVE,
            linewidth=1.5,
            label="running" if first else None,
        )
        requests.plot(
            times,
            [sample.waiting for sample in samples],
            color=_WASTED,
            linewidth=1.5,
            label="waiting" if first else None,
        )
        for axes in (pages, utilisation, requests):
            axes.axvline(offset, color="#999999", linewidth=0.8)
        pages.annotate(
            str(run.level),
            (offset, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -11),
            textcoords="offset points",
            fontsize=8.5,
        )
        offset = float(times[-1]) + 0.2
    pages.set(title=f"Pages held, of {runs[0].samples[0].pages_total:,.0f} in the pool")
    pages.margins(y=0.2)
    pages.set_ylim(bottom=0)
    pages.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    utilisation.set(title="Utilisation: slots with a token, % of those held", ylim=(0, 105))
    requests.set(title="Requests in the engine", xlabel="seconds of load", xlim=(0, offset))
    requests.set_ylim(bottom=0)
    requests.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    for axes in (pages, requests):
        axes.legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, file)


def _targets(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.target for run in runs))


def _short(run: Run) -> str:
    return f"{run.level.streams}" if run.level.rate is None else f"{run.level.rate:g}/s"


def _plain_log(axis: Any) -> None:
    """1, 10, 100 rather than powers, with as many numbers between them as a short scale needs."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    low, high = axis.get_view_interval()
    shown = "23456789" if high < 3 * low else "2357" if high < 10 * low else "25" if high < 100 * low else ""
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,.3g}" if f"{value:e}"[0] in shown else ""))


def _save(figure: Figure, file: Path) -> Path:
    figure.savefig(file)
    return file


def draw_panels(
    file: Path,
    lines: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    colours: Mapping[str, str],
    across: str,
    title: str,
    *,
    log: Sequence[str] = (),
    limits: Mapping[str, float] = MappingProxyType({}),
) -> Path:
    """Panels of lines over one common quantity: panel -> line -> points. `log`: panels with a logarithmic scale;
    `limits`: panel -> a level to mark.
    """
    with matplotlib.rc_context(_STYLE):
        figure = new_figure(10, 7, title)
        panels = figure.subplots(-(-len(lines) // 2), 2, sharex=True).ravel()
        for axes, (name, members) in zip(panels, lines.items(), strict=True):
            for label, points in members.items():
                drawn = np.array([point for point in points if np.isfinite(point[1])]).reshape(-1, 2)
                axes.plot(drawn[:, 0], drawn[:, 1], "o-", color=colours[label], linewidth=2, markersize=5, label=label)
            axes.set_title(name)
            if name in log:
                axes.set_yscale("log")
                _plain_log(axes.yaxis)
            else:
                axes.set_ylim(bottom=0)
                axes.margins(y=0.12)
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            if name in limits:
                axes.axhline(limits[name], color="#555555", linewidth=1, linestyle=":")
                axes.annotate(
                    "limit of the comparison",
                    (1, limits[name]),
                    xycoords=("axes fraction", "data"),
                    xytext=(0, 3),
                    **_LIMIT_TEXT,
                )
        for axes in panels[-2:]:
            axes.set_xlabel(across)
            axes.set_xlim(left=0)
        panels[0].legend(loc="center right", fontsize=10)
        return _save(figure, file)
