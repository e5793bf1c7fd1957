"""Every family on a GPU: in float32 its kernels give transformers' tokens, in bfloat16 they are as near to float32 as
plain torch in bfloat16 is.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from tests.expert_models import MODELS, save_expert_model
from tests.oracle import Oracle, random_prompts
from tests.published_configs import CONFIGS, published_config, save_published
from tests.runner_driver import Driver, last_logits, load_runner
from tests.unit.models.test_expert_checkpoints import save_mxfp4
from tests.unit.models.test_families import lengths_of

pytestmark = pytest.mark.gpu

MAX_TOKENS = 10
NEAR = 0.02  # relative RMS difference of logits that bfloat16 may make in any case


MXFP4 = "gpt-oss-20b, mxfp4"


@pytest.fixture(params=[*CONFIGS, *MODELS, MXFP4])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    """Name, the folder that is served, and the one that transformers reads."""
    folder, plain = tmp_path / "checkpoint", tmp_path / "plain"
    if request.param == MXFP4:
        return request.param, save_mxfp4(folder, plain, hidden_size=160, intermediate_size=96), plain
    if request.param in CONFIGS and published_config(request.param)["model_type"] not in CONFIG_MAPPING:
        pytest.skip("this version of transformers does not have it")
    save = save_published if request.param in CONFIGS else save_expert_model
    return request.param, save(folder, request.param), folder


def test_a_familys_kernels_agree_with_transformers_and_with_plain_torch(
    checkpoint: tuple[str, Path, Path],
) -> None:
    """bfloat16 takes another expert now and then, where two are nearly alike, in plain torch too: the median counts."""
    name, folder, truth = checkpoint
    prompts = random_prompts(lengths_of(name) if name in CONFIGS else (1, 5, 21, 40, 90))
    on_gpu = {"page_size": 16, "device": "cuda", "cuda_graphs": False}
    found = Driver(load_runner(folder, **on_gpu)).generate(prompts, MAX_TOKENS, chunk=11, arrive_every=2, steps_ahead=1)
    assert found == Oracle(truth).greedy(prompts, MAX_TOKENS)
    prompts = random_prompts([max(len(prompt), 21) for prompt in prompts] * 3, seed=1)
    exact = last_logits(load_runner(folder, page_size=16), prompts)
    plain = last_logits(load_runner(folder, page_size=16, dtype="bfloat16"), prompts)
    ours = last_logits(load_runner(folder, dtype="bfloat16", **on_gpu), prompts)
    of_plain, of_ours = (((some - exact).norm(dim=1) / exact.norm(dim=1)).median() for some in (plain, ours))
    print(f"{name}: relative RMS difference of logits, median: {of_ours:.4f}, of plain torch {of_plain:.4f}")
    assert torch.isfinite(ours).all()
    assert of_ours <= max(NEAR, 1.5 * of_plain)
