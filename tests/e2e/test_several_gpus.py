"""The whole engine on two GPUs: by NCCL and by one kernel over memory that both read, the tokens are those of
transformers. An engine is a process of its own, for it ends with its ranks.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from paged_backend.config import EngineConfig
from paged_backend.engine.loading import load_engine
from tests.engine_answers import answers
from tests.oracle import Oracle, random_prompts, save_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

LENGTHS = [1, 16, 33, 100, 200, 5]
MAX_TOKENS = 24
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 7}
ENGINE = "import sys; from tests.e2e.test_several_gpus import run_engine; run_engine(sys.argv[1], sys.argv[2])"


def run_engine(options: str, directory: str) -> None:
    """Prints the greedy answers and the drawn ones, as JSON."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    engine, *_ = load_engine(EngineConfig.parse(json.loads(options)), Path(directory))
    prompts = random_prompts(LENGTHS)
    answered = [
        answers(engine, prompts, max_tokens=MAX_TOKENS, **sampling) for sampling in ({"temperature": 0.0}, SAMPLED)
    ]
    print(json.dumps(answered), flush=True)
    os._exit(0)


def ask(folder: Path, directory: Path, **options: Any) -> tuple[Any, str]:
    """What an engine answers, and its log."""
    common = {"model": str(folder), "dtype": "float32", "max_num_sequences": 4, "max_model_len": 300, "num_pages": 100}
    directory.mkdir()
    command = [sys.executable, "-c", ENGINE, json.dumps(common | options), str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def test_two_gpus_answer_as_one(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint", "LlamaForCausalLM")
    alone, _ = ask(folder, tmp_path / "alone", tensor_parallel_size=1)
    assert alone[0] == Oracle(folder).greedy(random_prompts(LENGTHS), MAX_TOKENS)
    for fused in (False, True):
        found, log = ask(folder, tmp_path / f"fused {fused}", tensor_parallel_size=2, fused_all_reduce=fused)
        assert found == alone, f"fused_all_reduce {fused}"
        assert "cannot read each other's memory" not in log
