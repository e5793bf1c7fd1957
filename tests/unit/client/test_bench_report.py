"""Tables, files and pictures of runs."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from paged_client.bench.figures import Figures, summarise
from paged_client.bench.load import Level
from paged_client.bench.pool import PoolFigures, PoolSample
from paged_client.bench.profile import Trace
from paged_client.bench.report import WIDTH, Facts, print_report, ratios, write_csv, write_json
from paged_client.bench.sweep import Run, median_runs

FACTS = Facts(
    "2026-01-01",
    "paged bench",
    "a machine",
    "a wheel",
    "128 tokens in, 256 out",
    "Tokens are counted.",
    "Prompts go as ids.",
    {"a": "a at b"},
)


def figures(scale: float, num_requests: int = 20) -> Figures:
    """Of requests that take `scale` times as long as a second a first token and 10 ms another."""
    random = np.random.default_rng(0)
    waits = random.uniform(0.5, 1.5, num_requests) * scale * 1e9
    tokens = np.ones(300, np.int64)
    return summarise([Trace(0, (wait + np.arange(300) * scale * 1e7).astype(np.int64), tokens, 300) for wait in waits])


def run(target: str, level: Level, scale: float, repeat: int = 0, pool: bool = True) -> Run:
    samples = [PoolSample(100 + 0.1 * number, 30000 + number, 5, 65536, 16, 0.97, 256, 1024) for number in range(20)]
    summary = PoolFigures(65536, 16, 32768.4, 65536, 0.975, 255.5, 256, 255.9, {"paged_preemptions_total": 123456.0})
    return Run(target, level, repeat, figures(scale), summary if pool else None, samples if pool else [], 100.0)


def shown(runs: list[Run]) -> str:
    console = Console(width=WIDTH, file=io.StringIO(), highlight=False)
    print_report(console, FACTS, runs)
    return console.file.getvalue()  # type: ignore[attr-defined]


STREAMS = [Level(streams=1), Level(streams=256)]
RATES = [Level(rate=0.125), Level(rate=1024)]


@pytest.mark.parametrize("levels", [STREAMS, RATES], ids=["streams", "rates"])
def test_the_widest_tables_fit_100_columns_with_no_number_cut(levels: list[Level]) -> None:
    runs = [run(target, level, 12.345) for level in levels for target in ("paged_llm", "a_model_of_a_long_name")]
    text = shown(runs)
    assert max(len(line) for line in text.splitlines()) <= 100
    latency = runs[0].figures.latency if runs[0].figures else None
    assert latency is not None
    assert f"{latency.p50:,.2f} / {latency.p90:,.2f} / {latency.p99:,.2f}" in text
    assert "12,345" in text or f"{1000 * runs[0].figures.first_token.p50:,.0f}" in text  # type: ignore[union-attr]
    assert text.count("…") == 2 * 3, "only the long name may be shortened"


def test_drafts_have_a_table_where_there_were_any() -> None:
    plain = run("a", STREAMS[0], 12.345)
    assert plain.pool is not None and "Speculation" not in shown([plain])
    counted = {"proposed": 1e6, "accepted": 4e5, "checked": 25e4}
    counters = plain.pool.counters | {f"paged_drafts_{name}_total": value for name, value in counted.items()}
    drafting = replace(plain, target="a_model_of_a_long_name", pool=replace(plain.pool, counters=counters))
    text = shown([plain, drafting])
    assert [line.split()[2:] for line in text.split("Speculation")[1].splitlines()[5:7]] == [
        ["0", "–", "–"],
        ["1,000,000", "40", "%", "1.60"],
    ]
    assert max(len(line) for line in text.splitlines()) <= 100


def test_ratios_above_one_speak_for_the_first_server() -> None:
    (ratio,) = ratios([run("ours", STREAMS[0], 1.0), run("theirs", STREAMS[0], 2.0)])
    assert [round(value, 3) for name, value in ratio.items() if name != "level"] == [2.0] * 6


def test_a_level_that_broke_off_has_no_ratio_and_says_why() -> None:
    broken = Run("theirs", STREAMS[0], 0, None, None, [], 0.0, "max_tokens: 9 is too much")
    runs = [run("ours", STREAMS[0], 1.0), broken]
    assert ratios(runs) == []
    assert broken.num_errors == 1
    assert "theirs, 1 stream: broke off: max_tokens: 9 is too much" in " ".join(shown(runs).split())


def test_the_run_with_the_median_speed_stands_for_its_repeats() -> None:
    runs = [
        run(target, level, scale, number)
        for number, scale in enumerate([1.0, 3.0, 2.0])
        for level in STREAMS
        for target in ("b", "a")
    ]
    chosen = median_runs(runs)
    assert [(each.target, each.level, each.repeat) for each in chosen] == [
        (target, level, 2) for level in STREAMS for target in ("b", "a")
    ]


def test_files_hold_every_run_and_json_holds_no_nan(tmp_path: Path) -> None:
    lonely = Run("ours", STREAMS[1], 0, summarise([Trace(0, np.array([5]), np.array([3]), 3)]), None, [], 0.0)
    runs = [run("ours", STREAMS[0], 1.0), lonely]
    write_json(tmp_path / "results.json", FACTS, runs, verdict={"nothing": float("nan")})
    read = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert [each["level"]["streams"] for each in read["runs"]] == [1, 256]
    assert read["runs"][1]["figures"]["inter_token"]["p50"] is None
    assert read["runs"][0]["figures"]["num_tokens"] == 6000
    assert len(read["runs"][0]["pool_over_time"]) == 20
    write_csv(tmp_path / "results.csv", runs)
    with (tmp_path / "results.csv").open() as sheet:
        rows = list(csv.DictReader(sheet))
    assert [row["streams"] for row in rows] == ["1", "256"]
    assert float(rows[0]["tokens_per_second"]) == pytest.approx(read["runs"][0]["figures"]["tokens_per_second"])
    assert float(rows[0]["pool_utilisation"]) == 0.975


@pytest.mark.parametrize(
    "targets", [pytest.param(["ours"], marks=pytest.mark.long), ["ours", "theirs"]], ids=["one server", "two"]
)
def test_pictures_are_drawn_without_a_display(
    targets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from paged_client.bench.plots import draw

    monkeypatch.delenv("DISPLAY", raising=False)
    runs = [
        run(target, level, 1.0 + number, pool=target == "ours")
        for number, level in enumerate(STREAMS)
        for target in targets
    ]
    files = draw(tmp_path, runs, "a title")
    assert {file.name for file in files} == {"throughput_latency.png", "latencies.png", "pool.png"}
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000 for file in files)


def test_nothing_is_drawn_of_runs_that_broke_off(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from paged_client.bench.plots import draw

    assert draw(tmp_path, [Run("ours", STREAMS[0], 0, None, None, [], 0.0, "gone")], "a title") == []
