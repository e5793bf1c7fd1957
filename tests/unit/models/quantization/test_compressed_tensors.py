"""Checkpoints that the library compressed-tensors writes give the tokens and logits of its own quantised model in
float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paged_backend.batch import Batch, NewRow
from paged_backend.runner.step_plan import plan_step, shape_of
from paged_kernels.codes import dequantise
from tests.oracle import random_prompts
from tests.quantised_checkpoints import behead, save_compressed
from tests.runner_driver import GREEDY, Driver, load_runner

WEIGHTS_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
CASES: dict[str, dict[str, Any]] = {
    "W4A16-g128": {"W4A16": ["Linear"]},
    "W4A16-g32": {"all": {"targets": ["Linear"], "weights": {**WEIGHTS_INT4, "symmetric": True}}},
    "W4A16-g32-asymmetric": {"all": {"targets": ["Linear"], "weights": {**WEIGHTS_INT4, "symmetric": False}}},
    "W4A16-per-channel": {
        "all": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True},
        }
    },
    "W8A16": {"W8A16": ["Linear"]},
    "W8A8": {"W8A8": ["Linear"]},
    "W8A8-static": {
        "all": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True},
            "input_activations": {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True},
        }
    },
    "FP8-static": {"FP8": ["Linear"]},
    "FP8-dynamic": {"FP8_DYNAMIC": ["Linear"]},
    "FP8-block": {"FP8_BLOCK": ["Linear"]},
    "NVFP4A16": {"NVFP4A16": ["Linear"]},
    "MXFP4A16": {"MXFP4A16": ["Linear"]},
}
LENGTHS = (3, 20)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_the_librarys(case: str, tmp_path: Path) -> None:
    truth = save_compressed(tmp_path, CASES[case])
    heard: list[str] = []
    prompts = random_prompts(LENGTHS)
    assert Driver(load_runner(tmp_path, tell=heard.append)).generate(prompts, 6, chunk=7) == truth.greedy(prompts, 6)
    assert [sentence for sentence in heard if sentence.startswith("quantization: compressed-tensors")]


def test_expressions_mean_the_names_that_a_model_of_embeddings_has(tmp_path: Path) -> None:
    save_compressed(tmp_path, CASES["W4A16-g32"])
    whole = load_runner(tmp_path)._decoder._weights
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["targets"] = [r"re:layers\.\d+\..*_proj"]
    path.write_text(json.dumps(config))
    behead(tmp_path)
    alone = load_runner(tmp_path)._decoder._weights
    for one, other in zip(whole.linears, alone.linears, strict=True):
        assert torch.equal(dequantise(one), dequantise(other))


def test_older_files_call_it_compression_config(tmp_path: Path) -> None:
    truth = save_compressed(tmp_path, CASES["W4A16-g32"])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["compression_config"] = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    prompts = random_prompts((12,))
    assert Driver(load_runner(tmp_path)).generate(prompts, 6) == truth.greedy(prompts, 6)


@pytest.mark.parametrize("case", ["W4A16-g128", "W8A8", "FP8-static", "FP8-dynamic", "FP8-block"])
def test_logits_are_the_librarys_but_for_rounding(case: str, tmp_path: Path) -> None:
    """Where activations are rounded, sums in another order put a few of them on the other side of an edge."""
    truth = save_compressed(tmp_path, CASES[case])
    tokens = random_prompts((20,))[0]
    runner = load_runner(tmp_path)
    update = np.array([(1, 0, 5), (1, 1, 2)], np.int32)
    one = np.array([1], np.int64)
    new = (NewRow(1, tokens, len(tokens), GREEDY, 0, (), ()),)
    step = Batch(
        0, one.astype(np.int32), np.zeros(1, np.int32), np.array([20], np.int32), np.ones(1, np.bool_), one, new, update
    )
    with torch.inference_mode():
        hidden = runner._decoder.hidden(runner._rows.apply(step, plan_step(step, shape_of(step))), runner._kv_pages)
        logits = runner._decoder.logits(hidden[:20])
    expected = truth.logits(tokens)
    assert (logits - expected).norm() < 1e-3 * expected.norm()
