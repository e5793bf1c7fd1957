"""Proposers on kernels, in the interpreter: their guesses are those on plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paged_backend.engine.engine import Engine
from paged_backend.models.decoder import Decoder
from paged_backend.runner.proposer import DraftModel, HeadProposer
from paged_kernels.cuda_ops import CudaOps
from tests.drafts_heard import Listener
from tests.e2e.test_eagle3 import save_head
from tests.engine_answers import answers, load
from tests.kernels.test_cuda_ops import SMALL, use_kernels
from tests.oracle import random_prompts, save_checkpoint

FEW = {"intermediate_size": SMALL["intermediate_size"]}
HEAD = {"hidden_size": 48, **FEW, "target_hidden_size": 64, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}


def use_kernels_in_proposer(engine: Engine) -> None:
    runner = engine._runner
    use_kernels(runner)  # type: ignore[arg-type]
    proposer = runner._proposer  # type: ignore[attr-defined]
    spec = proposer._decoder._weights.layers[0].attention.spec if isinstance(proposer, DraftModel) else None
    spec = spec or proposer._head._weights.layer.attention.spec
    ops = CudaOps(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        sliding_windows=(None,),
        vocab_size=199 if isinstance(proposer, DraftModel) else 60,
        max_sequences=16,
        max_outputs=16,
        kv_dtype=torch.float32,
        device=torch.device("cpu"),
    )
    proposer._ops = ops
    if isinstance(proposer, DraftModel):
        proposer._decoder = Decoder(proposer._decoder._weights, proposer._decoder._ropes, ops)
    else:
        assert isinstance(proposer, HeadProposer)
        proposer._head._ops = ops
        proposer._tapped = runner._decoder.tap(proposer._head.taps, 64)  # type: ignore[attr-defined]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("draft", marks=pytest.mark.long), "eagle3"])
def test_guesses_on_kernels_are_those_on_plain_torch(tmp_path: Path, kind: str) -> None:
    target = save_checkpoint(tmp_path / "target", "Qwen3ForCausalLM", head_dim=16, num_hidden_layers=4, **FEW)
    if kind == "draft":
        draft_model = save_checkpoint(tmp_path / "draft", "LlamaForCausalLM", seed=7, **SMALL)
    else:
        draft_model = save_head(tmp_path / "head", 3, **HEAD)
    sizes = {"page_size": 4, "num_pages": 64, "max_model_len": 64, "max_num_sequences": 4, "max_batched_tokens": 64}
    heard = []
    for kernels in (False, True):
        options = {"speculation": kind, "draft_model": str(draft_model), "num_speculative_tokens": 2}
        engine = load(target, tmp_path, **sizes, **options)
        if kernels:
            use_kernels_in_proposer(engine)
        listener = Listener(engine)
        answers(engine, random_prompts((9,)), max_tokens=5, ignore_eos=True)
        heard.append(listener.heard)
    assert heard[0] == heard[1] and len(heard[0]) > 1
