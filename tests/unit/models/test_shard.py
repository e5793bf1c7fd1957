"""A model cut into shards and added up again is the model: tokens and log-probabilities of every rank are those of one
rank alone, and of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.architecture import read_architecture
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.models.shard import Shard
from paged_backend.models.weights import Weights, allocate_weights, load_weights, randomise_weights
from paged_backend.request import SamplingParams
from paged_backend.runner.builder import build_runner
from paged_backend.runner.model_runner import ModelRunner
from paged_kernels.codes import dequantise
from tests.adapter_oracle import save_adapter
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.published_configs import save_published
from tests.runner_driver import GREEDY, Driver, load_runner
from tests.thread_ranks import ThreadRanks, on_every_rank
from tests.unit.models.test_expert_checkpoints import save_mxfp4

CPU = torch.device("cpu")
LENGTHS = (1, 5, 33)
MAX_TOKENS = 8
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
EIGHT_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
LATENTS = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama, one KV head, tied": ("LlamaForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral, window": ("MistralForCausalLM", {"sliding_window": 9}),
    "qwen2, biases of q, k and v": ("Qwen2ForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2-moe, a shared expert": (
        "Qwen2MoeForCausalLM",
        {**EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
    ),
    "deepseek-v3, latents": ("DeepseekV3ForCausalLM", {**LATENTS, "q_lora_rank": 24}),
    "deepseek-v2, latents": ("DeepseekV2ForCausalLM", {**LATENTS, "q_lora_rank": None}),
    "qwen3, norms of q and k": (
        "Qwen3ForCausalLM",
        {"head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
}
# each rank has one query head of them, and four ranks the same KV head
CASES_OF_EIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss, sinks and biases": (
        "GptOssForCausalLM",
        {**EIGHT_HEADS, **LOCAL_EXPERTS, "attention_bias": True, "sliding_window": 9},
    ),
    "minimax-m2, norms of all heads together": (
        "MiniMaxM2ForCausalLM",
        {**EIGHT_HEADS, **LOCAL_EXPERTS, "rotary_dim": 8},
    ),
}
SAMPLINGS = {
    "drawn": SamplingParams(temperature=0.9, seed=3),
    "truncated": SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01),
    "edited": SamplingParams(
        temperature=0.0,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={7: 1.5, 190: 2.0},
    ),
    "log-probabilities": SamplingParams(temperature=0.0, logprobs=5),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, options = request.param
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), architecture, **{"num_hidden_layers": 2, **options})


def generate(
    folder: Path, size: int, sampling: SamplingParams, **options: Any
) -> list[tuple[list[list[int]], list[Any], int]]:
    """Of each rank: its answers, its log-probabilities of them, and how often it gathered logits."""
    common = {"model": str(folder), "device": "cpu", "dtype": "float32", "num_pages": 64}
    config = EngineConfig(**common | {"tensor_parallel_size": size} | options)
    checkpoint = open_checkpoint(config)

    def one(ranks: ThreadRanks) -> tuple[list[list[int]], list[Any], int]:
        driver = Driver(build_runner(config, lambda sentence: None, checkpoint, ranks))
        answers = driver.generate(
            random_prompts(LENGTHS), MAX_TOKENS, sampling, chunk=7, arrive_every=2, seeds=(5, 6, 7)
        )
        return answers, [result.logprobs for _, result in driver.results], ranks.num_gathers

    return on_every_rank(size, one)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("size", [2, 4])
def test_greedy_tokens_of_every_rank_are_those_of_transformers(folder: Path, size: int) -> None:
    expected = Oracle(folder).greedy(random_prompts(LENGTHS), MAX_TOKENS)
    for answers, _, num_gathers in generate(folder, size, GREEDY):
        assert answers == expected
        assert num_gathers == 0


@pytest.mark.one_in(2)
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("case", CASES_OF_EIGHT.values(), ids=CASES_OF_EIGHT)
def test_sinks_biases_and_norms_of_all_heads_are_divided_with_the_heads(
    case: tuple[str, dict[str, Any]], size: int, tmp_path: Path
) -> None:
    architecture, options = case
    folder = save_checkpoint(tmp_path, architecture, num_hidden_layers=2, **options)
    expected = Oracle(folder).greedy(random_prompts(LENGTHS), MAX_TOKENS)
    assert [answers for answers, _, _ in generate(folder, size, GREEDY)] == [expected] * size


@pytest.mark.parametrize(
    ("size", "counts"),
    [(2, [160, 128]), (4, [96, 64, 64, 64]), pytest.param(8, [64] + [32] * 7, marks=pytest.mark.long)],
)
def test_experts_in_mxfp4_are_divided_in_whole_groups(size: int, counts: list[int], tmp_path: Path) -> None:
    """Nine groups of 32 numbers, as gpt-oss has ninety; each rank reads the bytes of its own."""
    folder = save_mxfp4(tmp_path / "packed", tmp_path / "plain", **EIGHT_HEADS, intermediate_size=288)
    expected = Oracle(tmp_path / "plain").greedy(random_prompts(LENGTHS), MAX_TOKENS)
    assert [answers for answers, _, _ in generate(folder, size, GREEDY)] == [expected] * size
    experts = [weights.layers[1].mlp.experts for weights in shards(folder, size)]  # type: ignore[union-attr]
    assert [(e.gate_up.num_rows, e.down.num_columns) for e in experts] == [(2 * count, count) for count in counts]
    (whole,) = (weights.layers[1].mlp.experts for weights in shards(folder, 1))  # type: ignore[union-attr]
    parts = torch.cat([torch.stack([dequantise(e.down.of(i)) for i in range(e.num_experts)]) for e in experts], 2)
    assert torch.equal(parts, torch.stack([dequantise(whole.down.of(i)) for i in range(whole.num_experts)]))
    assert [e.down.bias is None for e in experts] == [False] + [True] * (size - 1), "added once"


@pytest.mark.parametrize(("name", "size"), [("qwen3-moe", 4), ("Qwen3-VL-30B-A3B", 2)])
def test_experts_that_are_stored_together_are_divided(name: str, size: int, tmp_path: Path) -> None:
    """Gate above up, [experts, out, in] and [experts, in, out]."""
    if name == "qwen3-moe":
        one_by_one = save_checkpoint(tmp_path / "one", "Qwen3MoeForCausalLM", num_hidden_layers=2, **EXPERTS)
        folder = tmp_path / "together"
        AutoModelForCausalLM.from_pretrained(one_by_one, dtype=torch.float32).save_pretrained(
            folder, save_original_format=False
        )
    else:
        folder = save_published(tmp_path, name)
    expected = Oracle(folder).greedy(random_prompts(LENGTHS), MAX_TOKENS)
    assert [answers for answers, _, _ in generate(folder, size, GREEDY)] == [expected] * size


@pytest.mark.parametrize(("name", "size"), [("phi-4-mini", 2), ("GLM-4-32B-0414", 4)])
def test_several_matrices_in_one_tensor_are_divided_each(name: str, size: int, tmp_path: Path) -> None:
    """Against one rank: transformers changes Phi's positions while a sequence grows."""
    folder = save_published(tmp_path, name)
    expected = Driver(load_runner(folder, num_pages=64)).generate(random_prompts(LENGTHS), MAX_TOKENS, chunk=7)
    assert [answers for answers, _, _ in generate(folder, size, GREEDY)] == [expected] * size


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "name",
    ["gemma-2-9b", "granite-3.3-8b", "c4ai-command-r7b-12-2024", "starcoder2-3b", "Qwen3-VL-4B", "OLMo-2-1124-7B"],
)
def test_norms_and_multipliers_behind_a_block_come_after_the_sum_over_ranks(name: str, tmp_path: Path) -> None:
    folder = save_published(tmp_path, name)
    expected = Oracle(folder).greedy(random_prompts(LENGTHS), MAX_TOKENS)
    assert [answers for answers, _, _ in generate(folder, 2, GREEDY)] == [expected, expected]


def test_adapters_of_several_matrices_in_one_tensor_are_divided_with_them(tmp_path: Path) -> None:
    folder = save_published(tmp_path / "model", "phi-4-mini")
    save_adapter(tmp_path / "adapters" / "a", folder, 0, targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))
    options = {"lora_directory": str(tmp_path / "adapters"), "max_lora_rank": 4, "num_pages": 64}
    prompts = random_prompts(LENGTHS)

    def answers(runner: ModelRunner, rank: int) -> list[list[int]]:
        assert runner.adapter_slots is not None
        runner.adapter_slots.fill(0, runner.adapter_slots.read("a").part_of(rank))
        return Driver(runner).generate(prompts, MAX_TOKENS, chunk=7, adapter_slots=(0, -1, 0))

    expected = answers(load_runner(folder, **options), 0)
    assert expected != Driver(load_runner(folder, num_pages=64)).generate(prompts, MAX_TOKENS, chunk=7)
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32", tensor_parallel_size=2, **options)
    checkpoint = open_checkpoint(config)

    def one(ranks: ThreadRanks) -> list[list[int]]:
        return answers(build_runner(config, lambda sentence: None, checkpoint, ranks), ranks.rank)

    assert on_every_rank(2, one) == [expected, expected]


def test_groups_that_are_fewer_than_ranks_are_refused(tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "packed", tmp_path / "plain", intermediate_size=96)
    message = r"4 ranks are too many for moe_intermediate_size \(96\), of which 32 stay together"
    with pytest.raises(EngineError, match=f"^tensor_parallel_size: {message}$"):
        read_architecture(folder).of_rank(Shard(0, 4))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_sampled_tokens_of_every_rank_are_those_of_one(tmp_path: Path, sampling: SamplingParams) -> None:
    folder = save_checkpoint(tmp_path, "LlamaForCausalLM", num_hidden_layers=2)  # 199 tokens: the last rank has fewer
    alone = Driver(load_runner(folder, num_pages=64))
    expected = alone.generate(random_prompts(LENGTHS), MAX_TOKENS, sampling, chunk=7, arrive_every=2, seeds=(5, 6, 7))
    for answers, logprobs, num_gathers in generate(folder, 4, sampling):
        assert answers == expected
        assert (num_gathers == 0) == (sampling is SAMPLINGS["drawn"])
        for mine, (_, result) in zip(logprobs, alone.results, strict=True):
            assert (mine is None) == (result.logprobs is None)
            np.testing.assert_allclose(
                mine if mine is not None else 0, result.logprobs if result.logprobs is not None else 0, atol=1e-4
            )


@pytest.mark.parametrize("size", [2, 4])
def test_quantised_weights_are_divided_as_they_are_stored(tmp_path: Path, size: int) -> None:
    """int4 in groups of 128 columns, which no rank's part cuts through."""
    options = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    }
    folder = save_checkpoint(tmp_path, "LlamaForCausalLM", num_hidden_layers=2, **options)
    expected = Driver(load_runner(folder, num_pages=64, quantization="int4")).generate(
        random_prompts(LENGTHS), MAX_TOKENS, chunk=7, arrive_every=2
    )
    assert expected != Oracle(folder).greedy(random_prompts(LENGTHS), MAX_TOKENS), "rounding to 4 bits changes tokens"
    for answers, *_ in generate(folder, size, GREEDY, quantization="int4"):
        assert answers == expected


def shards(folder: Path, size: int) -> list[Weights]:
    found = []
    for rank in range(size):
        weights = allocate_weights(read_architecture(folder).of_rank(Shard(rank, size)), torch.float32, CPU)
        load_weights(weights, folder, lambda sentence: None)
        found.append(weights)
    return found


def test_each_rank_reads_its_part_and_together_they_have_everything_once(tmp_path: Path) -> None:
    folder = save_checkpoint(
        tmp_path, "LlamaForCausalLM", num_hidden_layers=1, num_key_value_heads=2, attention_bias=True, mlp_bias=True
    )
    tensors = load_file(folder / "model.safetensors")
    parts = shards(folder, 4)
    attention = [weights.layers[0].attention for weights in parts]
    q, k = tensors["model.layers.0.self_attn.q_proj.weight"], tensors["model.layers.0.self_attn.k_proj.weight"]
    for rank, block in enumerate(attention):
        found = block.parameters()
        assert torch.equal(found["self_attn.q_proj.weight"], q[16 * rank : 16 * (rank + 1)])
        assert torch.equal(found["self_attn.k_proj.weight"], k[16 * (rank // 2) : 16 * (rank // 2 + 1)]), (
            "two ranks share a KV head"
        )
        assert (
            ("self_attn.o_proj.bias" in found) == ("mlp.down_proj.bias" in weights_of_mlp(parts[rank])) == (rank == 0)
        )
    assert torch.equal(
        torch.cat([block.out.weight for block in attention], dim=1), tensors["model.layers.0.self_attn.o_proj.weight"]
    )
    assert torch.equal(
        torch.cat([weights.layers[0].mlp.down.weight for weights in parts], dim=1),
        tensors["model.layers.0.mlp.down_proj.weight"],
    )
    heads = torch.cat([weights.head.weight[: weights.vocabulary.count] for weights in parts])
    assert torch.equal(heads, tensors["lm_head.weight"])
    assert [weights.vocabulary.count for weights in parts] == [50, 50, 50, 49]


def weights_of_mlp(weights: Weights) -> dict[str, torch.Tensor]:
    return weights.layers[0].mlp.parameters()


def test_what_every_rank_has_whole_is_equal_when_it_is_random(tmp_path: Path) -> None:
    folder = save_checkpoint(
        tmp_path, "LlamaForCausalLM", num_hidden_layers=2, num_key_value_heads=1, attention_bias=True
    )
    keys = []
    for rank in range(2):
        a = read_architecture(folder).of_rank(Shard(rank, 2))
        weights = allocate_weights(a, torch.float32, CPU)
        randomise_weights(weights, a, seed=1)
        keys.append(weights.layers[1].attention.parameters()["self_attn.k_proj.weight"])
    assert torch.equal(*keys)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (3, {}, r"3 ranks cannot have equal parts of num_attention_heads \(4\)"),
        (
            6,
            {"num_attention_heads": 12, "num_key_value_heads": 4},
            r"6 ranks cannot have equal parts of num_key_value_heads \(4\)",
        ),
        (
            2,
            {"num_attention_heads": 6, "num_key_value_heads": 3},
            r"2 ranks cannot have equal parts of num_key_value_heads \(3\)",
        ),
        (4, {"intermediate_size": 90}, r"4 ranks cannot have equal parts of intermediate_size \(90\)"),
        (
            2,
            {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 25},
            r"2 ranks cannot have equal parts of moe_intermediate_size \(25\)",
        ),
        (4, {"vocab_size": 5}, r"4 ranks are too many for vocab_size 5"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused_in_a_sentence(
    tmp_path: Path, size: int, options: dict[str, Any], message: str
) -> None:
    architecture = "Qwen3MoeForCausalLM" if "num_experts" in options else "LlamaForCausalLM"
    folder = save_checkpoint(tmp_path, architecture, **{"hidden_size": 48, "head_dim": 16, **options})
    with pytest.raises(EngineError, match=f"^tensor_parallel_size: {message}$"):
        read_architecture(folder).of_rank(Shard(0, size))
