"""The decoder on kernels: the tokens of transformers, as on plain torch. Here the interpreter runs them in float32; on CUDA the captured steps do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paged_backend.models.decoder import Decoder
from paged_backend.models.rope import rope_table
from paged_backend.sampler import Sampler
from paged_kernels.cuda_ops import CudaOps
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.runner_driver import Driver, load_runner

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
@pytest.mark.parametrize(
    ("architecture", "options"),
    [("Qwen3ForCausalLM", {}), ("MistralForCausalLM", {"sliding_window": 7})],
    ids=["qwen3: norms of q and k", "mistral: sliding window"],
)
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, architecture: str, options: dict[str, Any]) -> None:
    folder = save_checkpoint(tmp_path, architecture, **SMALL, **options)
    runner = load_runner(folder, page_size=4, num_pages=64, max_model_len=64, max_num_sequences=4, max_batched_tokens=64)
    a = runner.architecture
    ops = CudaOps(
        num_heads=a.num_heads,
        num_kv_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        sliding_windows=a.sliding_windows,
        vocab_size=a.vocab_size,
        max_sequences=4,
        max_outputs=4,
        dtype=torch.float32,
        device=runner.device,
    )
    runner._decoder = Decoder(a, runner._decoder._weights, rope_table(a.rope, 64, runner.device), ops)
    runner._sampler = Sampler(ops)
    prompts = random_prompts((1, 9, 14))
    assert Driver(runner, num_rows=4).generate(prompts, 4, chunk=6, arrive_every=1) == Oracle(folder).greedy(prompts, 4)
