"""Greedy tokens and logits of every architecture and option equal transformers' in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paged_backend.batch import Batch, NewRow
from paged_backend.models.architecture import read_architecture
from paged_backend.models.decoder import Decoder
from paged_backend.models.rope import rope_tensors
from paged_backend.models.step import LayerPages
from paged_backend.models.weights import allocate_weights, load_weights
from paged_backend.runner.step_plan import plan_step, shape_of
from paged_backend.runner.step_tensors import DeviceRows
from paged_kernels.reference import reference
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.runner_driver import GREEDY, Driver, load_runner

THETA = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **THETA}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    **THETA,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
GLM = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "head_dim": 16,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
}
GLM |= {"routed_scaling_factor": 2.5, "use_qk_norm": True, "attention_bias": True, "first_k_dense_replace": 1}
GPT_OSS: dict[str, Any] = {
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "head_dim": 16,
    "sliding_window": 9,
    "swiglu_limit": 1.5,
}
GPT_OSS |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-mha-tied": ("LlamaForCausalLM", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-one-kv-head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("LlamaForCausalLM", {"head_dim": 24}),
    "llama-linear": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA}}),
    "llama-dynamic": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, **THETA}, "max_position_embeddings": 52},
    ),
    "llama-yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "LlamaForCausalLM",
        {"rope_parameters": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False}},
    ),
    "llama-llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 9}),
    "mistral-window-head-dim": ("MistralForCausalLM", {"sliding_window": 16, "head_dim": 32, "rms_norm_eps": 1e-3}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-tied-window-from-layer-1": (
        "Qwen2ForCausalLM",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen2-window-unused": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3-bias-tied": ("Qwen3ForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-layer-types": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": YARN,
        },
    ),
}
CASES |= {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "mixtral-window": ("MixtralForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 9}),
    "qwen2-moe-sparse-step": (
        "Qwen2MoeForCausalLM",
        {**EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    ),
    "qwen2-moe-renormalised-windows": (
        "Qwen2MoeForCausalLM",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
        },
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3-moe-dense-layer": (
        "Qwen3MoeForCausalLM",
        {**EXPERTS, "head_dim": 16, "mlp_only_layers": [1], "attention_bias": True},
    ),
    "glm4-moe-groups": ("Glm4MoeForCausalLM", GLM),
    "minimax-m2": (
        "MiniMaxM2ForCausalLM",
        {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 16, "rotary_dim": 8},
    ),
    "gpt-oss": ("GptOssForCausalLM", GPT_OSS),
    "qwen3-moe-window": (
        "Qwen3MoeForCausalLM",
        {**EXPERTS, "head_dim": 16, "use_sliding_window": True, "sliding_window": 9},
    ),
}
LENGTHS = (1, 5, 16, 33, 50)
MAX_TOKENS = 12


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_transformers(case: str, tmp_path: Path) -> None:
    """Prompts in chunks of 7, new ones while others decode, pages and rows in random order."""
    architecture, options = CASES[case]
    save_checkpoint(tmp_path, architecture, **options)
    prompts = random_prompts(LENGTHS)
    expected = Oracle(tmp_path).greedy(prompts, MAX_TOKENS)
    assert Driver(load_runner(tmp_path)).generate(prompts, MAX_TOKENS, chunk=7, arrive_every=2) == expected


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GQA, biases, tied head and layers with and without a window: what paging could get wrong."""
    options = {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1, "tie_word_embeddings": True}
    return save_checkpoint(tmp_path_factory.mktemp("windowed"), "Qwen2ForCausalLM", **options)


@pytest.fixture(scope="module")
def windowed_truth(windowed: Path) -> list[list[int]]:
    return Oracle(windowed).greedy(random_prompts((1, 64, 65, 300)), 20)


@pytest.mark.parametrize(
    ("page_size", "chunk", "arrive_every"),
    [
        (1, 10_000, 0),
        (16, 10_000, 0),
        (64, 10_000, 0),
        (700, 10_000, 0),
        (1, 32, 1),
        (16, 32, 1),
        (64, 32, 1),
        (16, 1, 0),
    ],
)
def test_tokens_do_not_depend_on_paging_and_chunking(
    windowed: Path, windowed_truth: list[list[int]], page_size: int, chunk: int, arrive_every: int
) -> None:
    length = {"max_model_len": 700} if page_size == 700 else {}
    driver = Driver(
        load_runner(windowed, page_size=page_size, num_pages=3 * (-(-1600 // page_size) + 4), **length), seed=page_size
    )
    assert (
        driver.generate(random_prompts((1, 64, 65, 300)), 20, chunk=chunk, arrive_every=arrive_every) == windowed_truth
    )


@pytest.mark.parametrize(
    "case",
    [
        "llama-biases",
        "llama-yarn",
        "mistral-window",
        "qwen2",
        "qwen3",
        "mixtral",
        "qwen2-moe-sparse-step",
        "qwen3-moe",
        "glm4-moe-groups",
        "minimax-m2",
        "gpt-oss",
    ],
)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    architecture, options = CASES[case]
    save_checkpoint(tmp_path, architecture, **options)
    tokens = random_prompts([40])[0]
    a = read_architecture(tmp_path)
    cpu = torch.device("cpu")
    weights = allocate_weights(a, torch.float32, cpu)
    load_weights(weights, tmp_path, lambda sentence: None)
    rows = DeviceRows(2, 64, 16, 0, cpu)
    decoder = Decoder(weights, rope_tensors(a.ropes, 64, cpu), reference)
    kv_pages = [
        LayerPages(torch.zeros(8, 2, a.attention.num_kv_heads, 16, a.attention.head_dim)) for _ in range(a.num_layers)
    ]
    ours = []
    for start, end in ((0, 20), *((at, at + 1) for at in range(20, 40))):
        new = (NewRow(1, tokens, len(tokens), GREEDY, 0, (), ()),) if start == 0 else ()
        updates = np.array([(1, 0, 5), (1, 1, 2), (1, 2, 7)], np.int32) if start == 0 else np.empty((0, 3), np.int32)
        ids = np.array([1], np.int64)
        step = Batch(
            start,
            ids.astype(np.int32),
            np.array([start], np.int32),
            np.array([end - start], np.int32),
            np.ones(1, np.bool_),
            ids,
            new,
            updates,
        )
        with torch.inference_mode():
            ours.append(decoder.forward(rows.apply(step, plan_step(step, shape_of(step))), kv_pages))
    expected = Oracle(tmp_path).logits(tokens)[19:]
    assert (torch.cat(ours)[:-1] - expected[:-1]).abs().max() < 1e-4
    assert torch.cat(ours).dtype == torch.float32


def test_configs_of_older_checkpoints_mean_the_same(tmp_path: Path) -> None:
    """rope_theta and rope_scaling, with `type`, before transformers 5 joined them into rope_parameters."""
    save_checkpoint(tmp_path, "LlamaForCausalLM", rope_parameters={**LLAMA3, "rope_theta": 500_000.0})
    prompts = random_prompts((5, 40))
    expected = Oracle(tmp_path).greedy(prompts, MAX_TOKENS)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {**rope, "type": rope.pop("rope_type")}
    path.write_text(json.dumps(config))
    assert Driver(load_runner(tmp_path)).generate(prompts, MAX_TOKENS) == expected


def test_a_prompt_beyond_the_length_of_dynamic_scaling_does_not_depend_on_chunks(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path,
        "LlamaForCausalLM",
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, **THETA},
        max_position_embeddings=32,
    )
    prompts = random_prompts((80, 20))
    whole, parts = (Driver(load_runner(tmp_path)).generate(prompts, MAX_TOKENS, chunk=chunk) for chunk in (1000, 9))
    assert whole == parts
