"""Adapters on several ranks, each a process with gloo between them: every sequence's tokens are those that PEFT gives
alone, with biases behind the sums, and with KV heads that two ranks keep alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.runner.parallel.rank_processes import RankProcesses
from tests.e2e.test_adapters import ADAPTERS, adapters_of, answers, everybody, oracle, save_all

MAX_TOKENS = 10
NAMES = ["all of rank 4", None, *list(ADAPTERS)[1:]]
SIZES = [
    pytest.param(2, id="2 ranks"),
    pytest.param(4, id="4 ranks, two for each KV head", marks=pytest.mark.long),
]


@pytest.fixture(scope="module", params=SIZES)
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Engine]]:
    folder = save_all(tmp_path_factory.mktemp("checkpoint"), "llama, biases")
    config = EngineConfig.parse(
        {
            "model": str(folder),
            "lora_directory": str(adapters_of(folder)),
            "device": "cpu",
            "speculation": "off",
            "max_num_sequences": 24,
            "max_lora_rank": 16,
            "max_loras": 2,  # fewer than there are: they replace each other
            "num_pages": 256,
            "tensor_parallel_size": request.param,
        }
    )
    others = RankProcesses(config, on_death=lambda: None)
    engine, *_ = load_engine(config, tmp_path_factory.mktemp("several"), others)
    yield folder, engine
    others.close()
    torch.distributed.destroy_process_group()


# in CI ranks that are threads have adapters: tests/unit/models/test_shard.py
@pytest.mark.long
def test_every_sequence_has_the_tokens_of_its_adapter_alone(several: tuple[Path, Engine]) -> None:
    folder, engine = several
    asked = everybody(NAMES)
    expected = {
        name: iter(oracle(folder, name).greedy([prompt for prompt, other in asked if other == name], MAX_TOKENS))
        for name in NAMES
    }
    found, finishes = answers(engine, asked, max_tokens=MAX_TOKENS)
    assert not [finish for finish in finishes if finish.error is not None]
    for (_, name), tokens in zip(asked, found, strict=True):
        assert tokens == next(expected[name]), name
