"""The memory benchmark: its two pools, and its verdict on runs whose numbers are known."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.server.launch import ServerSettings
from paged_client.bench.figures import summarise
from paged_client.bench.load import Level
from paged_client.bench.memory import (
    PAGED,
    RESERVED,
    MemoryPlan,
    check_plan,
    draw_memory,
    judge,
    pool_options,
    print_memory,
)
from paged_client.bench.pool import PoolFigures, PoolSample
from paged_client.bench.profile import Trace
from paged_client.bench.sweep import Run
from paged_client.bench.workload import Workload

PLAN = MemoryPlan(ServerSettings(), 16, 2048, 8, None, 30.0, None, Workload(None, None))


def run(
    kind: str, rate: float, latency: float, tokens: int, utilisation: float, running: float, full: bool = True
) -> Run:
    """Ten requests that take `latency` seconds each, all at once, with `tokens` tokens."""
    traces = [
        Trace(0, np.array([latency * 5e8, latency * 1e9]).astype(np.int64), np.array([1, tokens - 1]), tokens)
        for _ in range(10)
    ]
    pool = PoolFigures(100, 16, 50, 90, utilisation, running, int(running) + 1, running if full else math.nan, {})
    samples = [PoolSample(0.0, 50, 0, 100, 16, utilisation, running, float(full))]
    return Run(kind, Level(rate=rate), 0, summarise(traces), pool, samples, 0.0)


# p90 latency 1 s at 1 request/s, 3 s at 4; the paged pool 1 s and 2 s. tokens/s: 10 * tokens / latency.
RUNS = [
    run(RESERVED, 1, 1, 10, 0.3, 4),
    run(RESERVED, 4, 3, 60, 0.25, 8),
    run(PAGED, 1, 1, 10, 0.9, 4),
    run(PAGED, 4, 2, 120, 0.96, 32),
]


@pytest.mark.parametrize("max_model_len", [512, 2048, 1000, 4096])
def test_both_pools_have_the_same_slots_and_options_that_the_engine_takes(max_model_len: int) -> None:
    plan = MemoryPlan(ServerSettings(), 16, max_model_len, 8, None, 30.0, None, Workload(None, None))
    reserved, paged = (EngineConfig.parse(pool_options(plan, kind)) for kind in (RESERVED, PAGED))
    assert (reserved.page_size, reserved.num_pages) == (max_model_len, 8)
    assert paged.page_size == 16
    assert 0 <= reserved.num_pages * reserved.page_size - paged.num_pages * paged.page_size < 16
    assert reserved.max_model_len == paged.max_model_len == max_model_len


def test_the_verdict_compares_memory_at_the_highest_rate_and_speed_at_one_latency() -> None:
    verdict = judge(RUNS, None)
    assert verdict is not None
    assert verdict.wasted == {RESERVED: pytest.approx(0.75), PAGED: pytest.approx(0.04)}
    assert verdict.running_ratio == 4
    assert verdict.latency_limit == 2  # twice the reserved pool's best
    assert verdict.tokens_per_second[PAGED] == pytest.approx(600)
    assert verdict.tokens_per_second[RESERVED] == pytest.approx(150)  # half way from 100 at 1 s to 200 at 3 s
    assert verdict.speed_ratio == pytest.approx(4)


def test_a_given_latency_limit_counts() -> None:
    verdict = judge(RUNS, 1.5)
    assert verdict is not None
    assert verdict.tokens_per_second == {RESERVED: pytest.approx(125), PAGED: pytest.approx(350)}
    out_of_reach = judge(RUNS, 0.5)
    assert out_of_reach is not None
    assert math.isnan(out_of_reach.speed_ratio)


def test_there_is_no_verdict_without_both_pools() -> None:
    assert judge(RUNS[:2], None) is None
    assert judge([], None) is None


def test_the_table_fits_100_columns_and_tells_the_ratios() -> None:
    console = Console(width=100, file=io.StringIO(), highlight=False)
    print_memory(console, RUNS, judge(RUNS, None))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text
    assert "8.0 reserved, 32.0 paged: 4.0 ×" in text
    assert "75 % reserved, 4.0 % paged" in text


def test_a_paged_pool_that_never_filled_is_said_so() -> None:
    console = Console(width=100, file=io.StringIO(), highlight=False)
    runs = [*RUNS[:3], run(PAGED, 4, 2, 120, 0.96, 9, full=False)]
    print_memory(console, runs, judge(runs, None))
    assert "the paged pool was never full" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = draw_memory(tmp_path / "memory.png", RUNS, judge(RUNS, None), "a title")
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("page_size", "options", "sentence"),
    [
        pytest.param(24, {}, "--page-size 24: expected a power of two", id="no power of two"),
        pytest.param(2048, {}, "--page-size 2048: expected less than --max-model-len", id="as long as a sequence"),
        pytest.param(
            16, {"num_pages": "5"}, "--set num_pages: this benchmark sets it itself", id="an option of the pool"
        ),
    ],
)
def test_a_wrong_option_is_refused_by_name(page_size: int, options: dict[str, str], sentence: str) -> None:
    plan = MemoryPlan(ServerSettings(options=options), page_size, 2048, 8, None, 30.0, None, Workload(None, None))
    with pytest.raises(EngineError, match=sentence):
        check_plan(plan)


def test_a_length_that_the_checkpoint_does_not_allow_is_refused_before_a_server_starts() -> None:
    plan = MemoryPlan(ServerSettings(), 16, 4096, 16, None, 30.0, None, Workload(None, None))
    with pytest.raises(EngineError, match=r"^--max-model-len 4096 is more than the checkpoint allows \(2048\)$"):
        check_plan(plan)


def test_after_an_interrupt_only_rates_that_both_pools_had_are_compared() -> None:
    verdict = judge(RUNS[:3], None)
    assert verdict is not None
    assert verdict.wasted == {RESERVED: pytest.approx(0.7), PAGED: pytest.approx(0.1)}
    assert verdict.running_ratio == 1
