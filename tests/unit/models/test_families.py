"""Every dense family against transformers in float32: greedy tokens and log-probabilities, beyond sliding windows and original lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from paged_backend.request import SamplingParams
from tests.adapter_oracle import ALL, AdapterOracle, save_adapter
from tests.oracle import Oracle, random_prompts
from tests.published_configs import CONFIGS, published_config, save_published
from tests.runner_driver import Driver, load_runner

LENGTHS = (1, 5, 21, 40, 90)
MAX_TOKENS = 10
TOLERANCE = 1e-4  # of a log-probability: sums of a few hundred float32 terms, in another order


def lengths_of(name: str) -> tuple[int, ...]:
    """Longrope's two sets of frequencies: a pool of long sequences takes the second for all."""
    original = published_config(name).get("original_max_position_embeddings", 1)
    return tuple(length for length in LENGTHS if original in (1, 1024) or length > original)


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, save_published(tmp_path_factory.mktemp("checkpoint"), request.param)


def test_greedy_tokens_and_log_probabilities_are_those_of_transformers(checkpoint: tuple[str, Path]) -> None:
    """Prompts in chunks of 11, new ones while others decode, in scattered pages of 8 tokens."""
    name, folder = checkpoint
    prompts, oracle = random_prompts(lengths_of(name)), Oracle(folder)
    driver = Driver(load_runner(folder, page_size=8))
    answers = driver.generate(prompts, MAX_TOKENS, SamplingParams(temperature=0.0, logprobs=4), chunk=11, arrive_every=2)
    assert answers == oracle.greedy(prompts, MAX_TOKENS)
    heard: list[list[float]] = [[] for _ in prompts]
    for batch, result in driver.results:
        for index, logprob in zip(batch.request_ids[batch.samples].tolist(), result.logprobs.tolist(), strict=True):
            heard[index].append(logprob)
    for prompt, answer, logprobs in zip(prompts, answers, heard, strict=True):
        truth = oracle.logits(np.concatenate([prompt, np.array(answer, np.int32)])).log_softmax(-1)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(logprobs, truth.gather(1, torch.tensor(answer)[:, None]).squeeze(1), rtol=0, atol=TOLERANCE)


TARGETS = {  # of adapters, where they are not q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "glm": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    "glm4": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    "starcoder2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
}


def test_with_adapters_greedy_tokens_are_those_of_peft(checkpoint: tuple[str, Path], tmp_path: Path) -> None:
    """One sequence with an adapter of all modules and one without share their steps."""
    name, folder = checkpoint
    targets = TARGETS.get(CONFIGS[name]["model_type"], ALL)
    adapter = save_adapter(tmp_path / "a", folder, seed=1, rank=3, targets=targets, lora_alpha=6, exclude_modules=".*vision.*")
    runner = load_runner(folder, page_size=8, lora_directory=str(tmp_path), max_loras=1, max_lora_rank=4)
    assert runner.adapter_slots is not None
    runner.adapter_slots.fill(0, runner.adapter_slots.read("a"))
    prompts = random_prompts((40, 70))
    answers = Driver(runner).generate(prompts, 6, chunk=30, adapter_slots=(0, -1))
    assert answers == AdapterOracle(folder, adapter).greedy(prompts[:1], 6) + Oracle(folder).greedy(prompts[1:], 6)
