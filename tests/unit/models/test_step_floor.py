"""The benchmarks' floor of a decode step, against figures worked out from the published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from paged_backend.models.architecture import read_architecture
from tests.bench.geometries import write_geometry
from tests.bench.step_floor import step_floor


@pytest.mark.parametrize(
    ("model", "batch", "gigabytes"),
    [
        ("llama-3.1-8b", 1, 15.01),  # 8.03e9 parameters less the embedding's 0.53e9, two bytes each
        ("llama-3.2-1b", 1, 2.47),  # the embedding is the head
        ("qwen3-30b-a3b", 1, 6.06),  # 8 of 128 experts
        ("qwen3-30b-a3b", 32, 52.9),  # (1 - 8 / 128) ** 32 = 0.127 of them are not chosen
        ("gpt-oss-20b", 1, 3.67),  # mxfp4: 4.25 bits a number of 4 of 32 experts
        ("gpt-oss-20b", 32, 12.5),
    ],
)
def test_bytes_of_the_weights_that_a_step_reads(model: str, batch: int, gigabytes: float, tmp_path: Path) -> None:
    architecture = read_architecture(write_geometry(model, tmp_path))
    seconds = step_floor(architecture, batch, 0, bandwidth=1e9, rate=1e30)
    assert seconds == pytest.approx(gigabytes, rel=0.02)


def test_keys_and_values_come_on_top_and_windows_end_them(tmp_path: Path) -> None:
    dense = read_architecture(write_geometry("llama-3.1-8b", tmp_path / "dense"))
    short, long = (step_floor(dense, 4, context, bandwidth=1e9, rate=1e30) for context in (0, 1000))
    assert long - short == pytest.approx(4 * 1000 * 131072 / 1e9)
    windows = read_architecture(write_geometry("gpt-oss-20b", tmp_path / "windows"))
    short, long = (step_floor(windows, 1, context, bandwidth=1e9, rate=1e30) for context in (0, 1000))
    assert long - short == pytest.approx((12 * 128 + 12 * 1000) * 2 * 8 * 64 * 2 / 1e9)


def test_operations_count_where_they_take_longer(tmp_path: Path) -> None:
    architecture = read_architecture(write_geometry("llama-3.1-8b", tmp_path))
    assert step_floor(architecture, 100, 0, bandwidth=1e30, rate=1e12) == pytest.approx(
        2 * 7.504e9 * 100 / 1e12, rel=1e-3
    )
