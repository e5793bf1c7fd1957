"""How many sequences may run where nobody says: by what is free, what a pool of it holds, and what steps take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from paged_backend.config import EngineConfig
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.runner import builder
from paged_backend.runner.builder import RunnerBuilder
from paged_backend.runner.kv_store import MemoryNeeds
from paged_backend.runner.sequence_limit import sequence_limits
from tests.oracle import save_checkpoint

GIB = 2**30
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("free", "num_tokens", "wanted"),
    [
        pytest.param(110 * GIB, 800_000, [1024, 512, 256], id="8B on 141 GB"),
        pytest.param(60 * GIB, 430_000, [512, 256], id="8B on 80 GB"),
        pytest.param(18 * GIB, 550_000, [512, 256], id="1B on 24 GB"),
        pytest.param(6 * GIB, 48_000, [256], id="8B on 24 GB"),
    ],
)
def test_more_than_256_need_memory_and_512_tokens_each(free: int, num_tokens: int, wanted: list[int]) -> None:
    assert sequence_limits(CUDA, free, num_tokens) == wanted
    assert sequence_limits(torch.device("cpu"), free, num_tokens) == [256]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"), "Qwen3ForCausalLM", head_dim=16)


@pytest.fixture
def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RunnerBuilder, list[str]]]:
    """A start on a CPU of which `share` of the free memory is taken by steps, for each 1,024 sequences."""

    def make(share: float, max_num_sequences: int) -> tuple[RunnerBuilder, list[str]]:
        told: list[str] = []
        config = EngineConfig(model=str(folder), device="cpu", num_pages=64, max_num_sequences=max_num_sequences)
        monkeypatch.setattr(builder, "sequence_limits", lambda *sizes: [1024, 512, 256])
        made = RunnerBuilder(config, told.append, open_checkpoint(config))

        def measure_steps(*arguments: object) -> None:
            made.needs = MemoryNeeds(step=int(share * made._max_sequences / 1024 * 2**40))

        monkeypatch.setattr(made, "_measure_steps", measure_steps)
        monkeypatch.setattr(builder, "affordable", lambda needs, free: needs.step <= 2**40)
        monkeypatch.setattr(made, "_size_pool", lambda size=made._size_of: size(MemoryNeeds()))
        return made, told

    return make


@pytest.mark.parametrize(("share", "limit"), [(0.9, 1024), (1.9, 512), (3.9, 256), (100, 256)])
def test_the_most_that_is_affordable_as_measured_is_chosen_and_told(
    start: Callable[..., tuple[RunnerBuilder, list[str]]], share: float, limit: int
) -> None:
    made, told = start(share, 0)
    runner = made.build()
    assert runner.num_rows == runner.limits.max_num_sequences == limit
    assert [sentence for sentence in told if sentence.startswith(f"max_num_sequences: {limit}, chosen because")]


def test_what_the_operator_says_is_not_tried_twice(start: Callable[..., tuple[RunnerBuilder, list[str]]]) -> None:
    made, told = start(100, 700)
    runner = made.build()
    assert runner.num_rows == runner.limits.max_num_sequences == 700
    assert not [sentence for sentence in told if sentence.startswith("max_num_sequences")]
