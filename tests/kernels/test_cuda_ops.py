"""The decoder on kernels: the tokens of transformers, as on plain torch. Here the interpreter runs them in float32; on
CUDA the captured steps do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paged_backend.config import EngineConfig
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Found, PromptLogprobs, Submit
from paged_backend.models.decoder import Decoder
from paged_backend.models.layer_spec import LatentSpec
from paged_backend.models.rope import rope_tensors
from paged_backend.request import SamplingParams
from paged_backend.runner.model_runner import ModelRunner
from paged_backend.runner.sampler import Sampler
from paged_kernels import cuda_ops
from paged_kernels.cuda_ops import CudaOps
from paged_kernels.cuda_rank_ops import CudaRankOps
from paged_kernels.decode_attention import DecodePlan, plan_decode_attention
from paged_kernels.rank_ops import Ranks, VocabularyPart
from tests.adapter_oracle import AdapterOracle, save_adapter
from tests.e2e.test_speculation import Drafting, Knowing
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.published_configs import CONFIGS, save_published
from tests.runner_driver import Driver, load_runner

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 24,  # rows of a matrix are programs, which the interpreter runs one after another
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
_CHOICE: dict[str, Any] = {"num_local_experts": 6, "num_experts_per_tok": 3}
_GLM: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
    "use_qk_norm": True,
}
_LATENTS: dict[str, Any] = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
WITH_LATENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**_LATENTS, "q_lora_rank": 40}),
    "deepseek-v2": ("DeepseekV2ForCausalLM", {**_LATENTS, "q_lora_rank": None, "topk_method": "group_limited_greedy"}),
}
WITH_EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", _CHOICE),
    "qwen3-moe": ("Qwen3MoeForCausalLM", EXPERTS),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 40}),
    "glm4-moe": ("Glm4MoeForCausalLM", _GLM),
    "minimax-m2": ("MiniMaxM2ForCausalLM", {**_CHOICE, "rotary_dim": 8}),
    "gpt-oss": (
        "GptOssForCausalLM",
        {**_CHOICE, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"], "swiglu_limit": 1.5},
    ),
}


def use_kernels(runner: ModelRunner, make: Callable[..., CudaOps] = CudaOps, num_decodes: int = 4) -> None:
    """Puts the kernels, in the interpreter, in the place of plain torch. Of a runner of 4 rows and 64 tokens;
    num_decodes of a step, at most.
    """
    a = runner.architecture
    ops = make(
        num_heads=a.attention.num_heads,
        num_kv_heads=a.attention.num_kv_heads,
        head_dim=a.attention.head_dim,
        sliding_windows=a.sliding_windows,
        vocab_size=a.vocab_size,
        max_sequences=num_decodes,
        max_outputs=num_decodes,
        kv_dtype=torch.float32,
        device=runner.device,
        latents=(a.attention.rank, torch.float32) if isinstance(a.attention, LatentSpec) else None,
    )
    weights = runner._decoder._weights
    adapted = (
        None
        if runner.adapter_slots is None
        else runner.adapter_slots.products(ops, weights, runner._rows.adapter_slots, 64)
    )
    runner._decoder = Decoder(weights, rope_tensors(a.ropes, 64, runner.device), ops, adapted)
    runner._sampler = Sampler(ops)
    runner._rows._ops = ops
    runner._rows._copy_pages = partial(ops.copy_pages, [layer.tensor for layer in runner._kv_pages])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        pytest.param("Qwen3ForCausalLM", {}, id="qwen3: norms of q and k", marks=pytest.mark.long),
        pytest.param("MistralForCausalLM", {"sliding_window": 7}, id="mistral: sliding window"),
    ],
)
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, architecture: str, options: dict[str, Any]) -> None:
    folder = save_checkpoint(tmp_path, architecture, **SMALL, **options)
    runner = load_runner(
        folder, page_size=4, num_pages=64, max_model_len=64, max_num_sequences=4, max_batched_tokens=64
    )
    use_kernels(runner)
    prompts = random_prompts((1, 9, 14))
    assert Driver(runner, num_rows=4).generate(prompts, 4, chunk=6, arrive_every=1) == Oracle(folder).greedy(prompts, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        pytest.param("Qwen3ForCausalLM", {}, id="qwen3", marks=pytest.mark.long),
        pytest.param("MistralForCausalLM", {"sliding_window": 7}, id="mistral: sliding window"),
    ],
)
def test_drafts_that_attention_packs_change_no_token(
    tmp_path: Path, architecture: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two sequences, each of which has fewer drafts at its end; one that is left alone is attended to unpacked."""
    monkeypatch.setattr(cuda_ops, "_APART", 4)
    folder = save_checkpoint(tmp_path, architecture, **SMALL, **options)
    runner = load_runner(
        folder, page_size=4, num_pages=128, max_model_len=64, max_num_sequences=8, max_batched_tokens=64
    )
    use_kernels(runner, partial(CudaOps, queries=4), num_decodes=8)
    given = []

    def plan(seq_lens: torch.Tensor, plan: DecodePlan, rows: torch.Tensor | None = None) -> None:
        given.append([] if rows is None else rows.tolist())
        plan_decode_attention(seq_lens, plan, rows)

    monkeypatch.setattr(cuda_ops, "plan_decode_attention", plan)
    prompts = random_prompts((5, 9))
    expected = Oracle(folder).greedy(prompts, 10)
    propose = Knowing(0.7)
    propose.texts = [[*prompt.tolist(), *answer] for prompt, answer in zip(prompts, expected, strict=True)]
    runner._rows.speculate(propose, 3)
    drafting = Drafting(runner, propose)
    found = drafting.ask(prompts, 3, steps_ahead=1, temperature=0.0, max_tokens=10)
    assert [answer.tokens for answer in found] == expected
    assert drafting.num_accepted > 0
    assert any(len(rows) > len(set(rows)) > 1 for rows in given), "no drafts of two sequences were packed"
    assert [] in given, "a step without drafts, or of one sequence, was packed"


# in CI: the kernels themselves, test_shard_sampling.py
@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.long), 0.8])
def test_a_rank_that_has_the_vocabulary_but_for_one_token_chooses_as_one_that_has_it_all(
    tmp_path: Path, temperature: float
) -> None:
    """Its tokens come from keys, for it never has the logits of the last one."""
    folder = save_checkpoint(tmp_path, "LlamaForCausalLM", **SMALL)
    found = []
    for make in (CudaOps, partial(CudaRankOps, Ranks(), VocabularyPart(first=0, count=199, width=199, whole=200))):
        runner = load_runner(
            folder, page_size=4, num_pages=64, max_model_len=64, max_num_sequences=4, max_batched_tokens=64
        )
        use_kernels(runner, make)
        sampling = SamplingParams(temperature=temperature)
        found.append(Driver(runner, num_rows=4).generate(random_prompts((1, 9)), 3, sampling, chunk=6, arrive_every=1))
    assert found[0] == found[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
@pytest.mark.parametrize("name", ["deepseek-v3", pytest.param("deepseek-v2", marks=pytest.mark.long)])
def test_greedy_tokens_of_families_that_keep_latents_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Decodes of several sequences beside prompts in chunks."""
    architecture, options = WITH_LATENTS[name]
    folder = save_checkpoint(tmp_path, architecture, **SMALL | options)
    runner = load_runner(
        folder, page_size=4, num_pages=64, max_model_len=64, max_num_sequences=4, max_batched_tokens=64
    )
    use_kernels(runner)
    prompts = random_prompts((1, 25, 14))
    assert Driver(runner, num_rows=4).generate(prompts, 4, chunk=9, arrive_every=1) == Oracle(folder).greedy(prompts, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
@pytest.mark.long
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_greedy_tokens_of_every_family_with_experts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    architecture, options = WITH_EXPERTS[name]
    folder = save_checkpoint(tmp_path, architecture, **SMALL, **options)
    runner = load_runner(
        folder, page_size=4, num_pages=64, max_model_len=64, max_num_sequences=4, max_batched_tokens=64
    )
    use_kernels(runner)
    prompts = random_prompts((1, 14))
    assert Driver(runner, num_rows=4).generate(prompts, 3, chunk=6, arrive_every=1) == Oracle(folder).greedy(prompts, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_of_every_family_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Prompts beyond sliding windows and, of longrope, beyond the original length, which the longest sequence decides
    for all.
    """
    folder = save_published(tmp_path, name)
    runner = load_runner(
        folder, page_size=8, num_pages=64, max_model_len=64, max_num_sequences=4, max_batched_tokens=64
    )
    use_kernels(runner)
    prompts = random_prompts((33,))
    assert Driver(runner, num_rows=4).generate(prompts, 2, chunk=30) == Oracle(folder).greedy(prompts, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
def test_beams_and_prompt_logprobs_are_those_of_plain_torch(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint", "LlamaForCausalLM", **SMALL, initializer_range=0.08)
    heard = []
    for kernels in (False, True):
        options = {
            "page_size": 4,
            "num_pages": 64,
            "max_model_len": 64,
            "max_num_sequences": 4,
            "max_batched_tokens": 64,
        }
        engine, *_ = load_engine(
            EngineConfig(model=str(folder), device="cpu", dtype="float32", speculation="off", **options), tmp_path
        )
        if kernels:
            use_kernels(engine._runner)
        params = SamplingParams(
            use_beam_search=True, beam_width=3, n=3, temperature=0.0, max_tokens=4, prompt_logprobs=2
        )
        engine.submit(Submit(0, random_prompts([6])[0].tobytes(), params, (), "", 1e18))
        outputs = []
        while not engine.idle:
            outputs += engine.step()
        (found,) = [one for output in outputs for one in output.feature_outputs if isinstance(one, Found)]
        told = [
            np.frombuffer(one.top_logprobs, np.float32)
            for output in outputs
            for one in output.feature_outputs
            if isinstance(one, PromptLogprobs)
        ]
        heard.append(
            (
                [one.token_ids for one in found.sequences],
                np.concatenate([*told, *(np.frombuffer(one.logprobs, np.float32) for one in found.sequences)]),
            )
        )
    assert heard[0][0] == heard[1][0]
    np.testing.assert_allclose(heard[0][1], heard[1][1], atol=1e-4)


# in CI: the kernels themselves, test_lora.py
@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
def test_with_adapters_greedy_tokens_are_those_of_peft(tmp_path: Path) -> None:
    """Two adapters and none in the same steps, of prompts and of single tokens, alone and beside each other."""
    folder = save_checkpoint(tmp_path / "model", "LlamaForCausalLM", **SMALL)
    adapters = [
        save_adapter(tmp_path / name, folder, seed, rank, lora_alpha=8)
        for seed, (name, rank) in enumerate({"a": 4, "b": 7}.items())
    ]
    options = {"lora_directory": str(tmp_path), "max_loras": 2, "max_lora_rank": 8}
    runner = load_runner(
        folder, page_size=4, num_pages=64, max_model_len=64, max_num_sequences=4, max_batched_tokens=64, **options
    )
    use_kernels(runner)
    assert runner.adapter_slots is not None
    for adapter, name in enumerate("ab"):
        runner.adapter_slots.fill(adapter, runner.adapter_slots.read(name))
    prompts, chosen = random_prompts((1, 14, 9, 6)), (1, 0, -1, 0)
    answers = Driver(runner, num_rows=4).generate(prompts, 4, chunk=6, arrive_every=1, adapter_slots=chosen)
    oracles = {0: AdapterOracle(folder, adapters[0]), 1: AdapterOracle(folder, adapters[1]), -1: Oracle(folder)}
    assert answers == [oracles[adapter].greedy([prompt], 4)[0] for prompt, adapter in zip(prompts, chosen, strict=True)]
