"""How many pages fit: which option decides, what is refused, what the operator is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.architecture import Architecture, read_architecture
from paged_backend.runner import kv_store
from paged_backend.runner.kv_store import MemoryNeeds, PoolSize, allocate_kv_store, free_bytes, page_bytes_of, size_pool
from tests.oracle import save_checkpoint

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    """1,024 tokens; K and V of a token take 3 layers * 2 * 2 heads * 16 * 4 bytes = 768 bytes."""
    return read_architecture(save_checkpoint(tmp_path_factory.mktemp("tiny"), "LlamaForCausalLM"))


@pytest.fixture
def size(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """size(pool_room=bytes left for the pool once a CPU's tenth is kept for steps, **options)."""

    def of(pool_room: int = GIB, **options: Any) -> PoolSize:
        free = pool_room + (pool_room - 1) // 9
        assert free - free // 10 == pool_room
        monkeypatch.setattr(kv_store, "free_bytes", lambda device: free)
        return size_pool(EngineConfig(**options), architecture, torch.float32, CPU, MemoryNeeds())

    return of


def test_a_page_takes_k_and_v_of_its_tokens_in_all_layers(architecture: Architecture) -> None:
    assert page_bytes_of(architecture.attention, 3, 16, torch.float32) == 16 * 768
    assert page_bytes_of(architecture.attention, 3, 16, torch.bfloat16) == 8 * 768


def test_num_pages_wins_over_everything(size: Any) -> None:
    assert size(num_pages=77, pool_bytes=10**6, pool_memory_fraction=0.5).num_pages == 77


def test_pool_bytes_win_over_the_fraction(size: Any) -> None:
    pool = size(pool_bytes=10**6, pool_memory_fraction=0.5)
    assert pool.num_pages == 10**6 // (16 * 768)
    assert "pool_bytes" in pool.decided_by


@pytest.mark.parametrize(
    ("options", "fraction"), [({}, 0.25), ({"pool_memory_fraction": 0.5}, 0.5)], ids=["default", "given"]
)
def test_the_pool_takes_its_fraction_of_what_is_left(size: Any, options: dict[str, float], fraction: float) -> None:
    pool = size(pool_room=64 * 2**20, **options)
    assert pool.num_pages == int(64 * 2**20 * fraction) // (16 * 768)
    assert "pool_memory_fraction" in pool.decided_by


def test_the_pool_is_not_larger_than_the_sequences_can_use(size: Any) -> None:
    pool = size(pool_room=100 * GIB, max_num_sequences=3, page_size=64, max_model_len=1000)
    assert pool.num_pages == 3 * 16
    assert "max_num_sequences (3)" in pool.decided_by


@pytest.mark.parametrize("options", [{"num_pages": 1000}, {"pool_bytes": 12_288_000}], ids=["num_pages", "pool_bytes"])
def test_a_pool_that_does_not_fit_is_refused_with_the_numbers(size: Any, options: dict[str, int]) -> None:
    with pytest.raises(EngineError, match=r"1000 pages of 12 KiB are 11\.72 MiB") as refusal:
        size(pool_room=10 * 2**20, **options)
    assert next(iter(options)) in str(refusal.value)


@pytest.mark.parametrize("options", [{}, {"pool_bytes": 12_000}], ids=["fraction", "pool_bytes"])
def test_no_room_for_one_page_is_refused_with_the_numbers(size: Any, options: dict[str, int]) -> None:
    with pytest.raises(EngineError, match=r"one page of 12 KiB \(16 tokens\)"):
        size(pool_room=30_000, **options)


@pytest.mark.parametrize(
    ("device", "room", "words"),
    [
        (
            "cuda",
            10 * 2**20,
            r"100 MiB free after the weights, of which the largest step takes 50 MiB and the captured steps 40 MiB",
        ),
        ("cpu", 90 * 2**20, r"100 MiB free after the weights, of which a tenth, 10 MiB, is left for steps"),
    ],
)
def test_the_pool_leaves_what_weights_and_steps_need(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch, device: str, room: int, words: str
) -> None:
    """On a GPU as it was measured, on a CPU a share."""
    monkeypatch.setattr(kv_store, "free_bytes", lambda device: 107 * 2**20)
    needs = MemoryNeeds(weights=7 * 2**20, step=50 * 2**20, graphs=40 * 2**20)

    def fit(num_pages: int) -> PoolSize:
        return size_pool(EngineConfig(num_pages=num_pages), architecture, torch.float32, torch.device(device), needs)

    most = room // (16 * 768)
    assert words in fit(most).decided_by
    with pytest.raises(EngineError, match=words):
        fit(most + 1)


def test_max_model_len_shrinks_to_the_pool_and_says_so(size: Any) -> None:
    pool = size(num_pages=10)
    assert pool.max_model_len == 160
    assert "max_model_len is 160 instead of 1024" in pool.decided_by
    assert "room for 1 sequences of 160 tokens" in pool.decided_by


def test_max_model_len_is_the_checkpoints_unless_given(size: Any) -> None:
    assert size(num_pages=100).max_model_len == 1024
    assert size(num_pages=100, max_model_len=100).max_model_len == 100


def test_a_max_model_len_beyond_the_checkpoint_is_refused(size: Any) -> None:
    with pytest.raises(EngineError, match=r"max_model_len: 1025 is more than the checkpoint allows \(1024\)"):
        size(max_model_len=1025)


def test_the_store_is_zero_and_of_the_documented_shape(architecture: Architecture) -> None:
    store = allocate_kv_store(5, architecture.attention, 3, 16, torch.bfloat16, CPU)
    assert len(store) == 3
    assert all(
        layer.shape == (5, 2, 2, 16, 16) and layer.dtype == torch.bfloat16 and not layer.any() for layer in store
    )


def test_free_memory_of_a_cpu_is_at_most_the_machines() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_bytes(CPU) <= total


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 1\ninactive_file 50"}, 350),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": ""}, None),
        (
            {
                "memory.limit_in_bytes": "1000",
                "memory.usage_in_bytes": "1400",
                "memory.stat": "total_inactive_file 100",
            },
            0,
        ),
        ({}, None),
    ],
    ids=["v2", "v2-unlimited", "v1-over", "none"],
)
def test_a_containers_limit_counts(files: dict[str, str], room: int | None, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert kv_store._room(tmp_path) == room
