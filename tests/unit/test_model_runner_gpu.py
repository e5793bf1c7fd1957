"""The same runner on CUDA: what only a device that computes while the host goes on can get wrong, and the memory a step takes there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from paged_backend.batch import Batch, NewRow, features_of
from paged_backend.config import EngineConfig
from paged_backend.kv_store import step_bytes
from paged_backend.model_runner import ModelRunner
from paged_backend.request import SamplingParams
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.runner_driver import GREEDY, Driver, load_runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1, "tie_word_embeddings": True}
    return save_checkpoint(tmp_path_factory.mktemp("tiny"), "Qwen2ForCausalLM", **options)


@pytest.mark.parametrize("steps_ahead", [0, 1, 4])
def test_greedy_tokens_equal_transformers_with_steps_in_flight(folder: Path, steps_ahead: int) -> None:
    prompts = random_prompts((1, 64, 65, 300, 20, 33))
    driver = Driver(load_runner(folder, device="cuda"))
    assert driver.generate(prompts, 20, chunk=32, arrive_every=2, steps_ahead=steps_ahead) == Oracle(folder).greedy(prompts, 20)


def test_seeded_tokens_equal_those_of_the_cpu(folder: Path) -> None:
    prompts = random_prompts((12, 30, 5, 18, 44))
    options = [{"top_p": 0.9}, {"temperature": 1.4}, {"top_k": 3, "logprobs": 2}, {"min_p": 0.1, "logit_bias": {4: 3.0}}, {"presence_penalty": 1.0}]
    samplings = [SamplingParams(**option) for option in options]
    cpu, cuda = (Driver(load_runner(folder, device=device)).generate(prompts, 25, samplings, steps_ahead=1) for device in ("cpu", "cuda"))
    assert cpu == cuda


def test_many_new_rows_outgrow_the_staging_buffer_while_steps_are_in_flight(folder: Path) -> None:
    prompts = random_prompts([400] * 8 + [700] * 8 + [3] * 8)
    runner = load_runner(folder, device="cuda", num_pages=2000, max_batched_tokens=20_000)
    answers = Driver(runner).generate(prompts, 6, GREEDY, arrive_every=1, steps_ahead=3, chunk=300)
    assert answers == Driver(load_runner(folder, num_pages=2000)).generate(prompts, 6)


@pytest.mark.parametrize("num_sequences", [1, 256])
def test_the_largest_step_takes_no_more_memory_than_reserved(tmp_path: Path, num_sequences: int) -> None:
    """bfloat16, a vocabulary of 150,000 and every row truncated and penalised: the hungriest step there is."""
    options = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 2}
    shape = {"vocab_size": 150_000, "max_position_embeddings": 8192, "dtype": "bfloat16", **options}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **shape}))
    config = EngineConfig(model=str(tmp_path), load_format="dummy", device="cuda", pool_bytes=2**30, max_batched_tokens=4096)
    runner = ModelRunner.load(config, lambda sentence: None)
    length = 4096 // num_sequences
    sampling = SamplingParams(top_p=0.9, presence_penalty=1.0, repetition_penalty=1.1, logprobs=5)
    rows = np.arange(num_sequences, dtype=np.int32)
    new = tuple(NewRow(row, np.arange(length, dtype=np.int32), length, sampling, row, (), ()) for row in range(num_sequences))
    per_row = -(-length // 16)
    pages = np.array([(row, index, row * per_row + index) for row in range(num_sequences) for index in range(per_row)], np.int32)
    counts, starts = np.full(num_sequences, length, np.int32), np.zeros(num_sequences, np.int32)
    batch = Batch(1, rows, starts, counts, np.ones(num_sequences, np.bool_), rows.astype(np.int64), new, pages, features_of(sampling, (), ()))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    runner.launch(batch)
    list(runner.finished(0))
    taken = torch.cuda.max_memory_reserved() - before
    reserved = step_bytes(config, runner.architecture, torch.bfloat16, runner.limits.max_model_len)
    print(f"largest step of {num_sequences}: takes {taken / 2**20:.0f} MiB, {reserved / 2**20:.0f} MiB are reserved")
    assert taken <= reserved
