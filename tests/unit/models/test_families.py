"""Every dense family against transformers in float32: greedy tokens and log-probabilities, beyond sliding windows and
original lengths.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paged_backend.errors import EngineError
from paged_backend.models.architecture import read_architecture
from paged_backend.models.layer_spec import MlpSpec, MoeSpec
from paged_backend.request import SamplingParams
from tests.adapter_oracle import ALL, AdapterOracle, save_adapter
from tests.bench.geometries import GEOMETRIES
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.published_configs import CONFIGS, published_config, save_published
from tests.runner_driver import Driver, load_runner

LENGTHS = (1, 5, 21, 40, 90)
MAX_TOKENS = 10
NO_SHARED_EXPERT = {"shared_expert_intermediate_size": 0, "qkv_bias": False, "use_qk_norm": True}
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
    answers = driver.generate(
        prompts, MAX_TOKENS, SamplingParams(temperature=0.0, logprobs=4), chunk=11, arrive_every=2
    )
    assert answers == oracle.greedy(prompts, MAX_TOKENS)
    assert len({token for answer in answers for token in answer}) > MAX_TOKENS, "answers that say little prove little"
    heard: list[list[float]] = [[] for _ in prompts]
    for batch, result in driver.results:
        for index, logprob in zip(batch.request_ids[batch.samples].tolist(), result.logprobs.tolist(), strict=True):
            heard[index].append(logprob)
    for prompt, answer, logprobs in zip(prompts, answers, heard, strict=True):
        truth = oracle.logits(np.concatenate([prompt, np.array(answer, np.int32)])).log_softmax(-1)[
            len(prompt) - 1 : -1
        ]
        np.testing.assert_allclose(
            logprobs, truth.gather(1, torch.tensor(answer)[:, None]).squeeze(1), rtol=0, atol=TOLERANCE
        )


TARGETS = {  # of adapters, where they are not q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
    "qwen3_vl_moe": ("q_proj", "k_proj", "v_proj", "o_proj"),  # experts have none
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "glm": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    "glm4": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    "starcoder2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
}


@pytest.mark.one_in(3)
def test_with_adapters_greedy_tokens_are_those_of_peft(checkpoint: tuple[str, Path], tmp_path: Path) -> None:
    """One sequence with an adapter of all modules and one without share their steps."""
    name, folder = checkpoint
    targets = TARGETS.get(CONFIGS[name]["model_type"], ALL)
    adapter = save_adapter(
        tmp_path / "a", folder, seed=1, rank=3, targets=targets, lora_alpha=6, exclude_modules=".*vis(ion|ual).*"
    )
    runner = load_runner(folder, page_size=8, lora_directory=str(tmp_path), max_loras=1, max_lora_rank=4)
    assert runner.adapter_slots is not None
    runner.adapter_slots.fill(0, runner.adapter_slots.read("a"))
    prompts = random_prompts((40, 70))
    answers = Driver(runner).generate(prompts, 6, chunk=30, adapter_slots=(0, -1))
    assert answers == AdapterOracle(folder, adapter).greedy(prompts[:1], 6) + Oracle(folder).greedy(prompts[1:], 6)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gemma-2-9b", {"use_bidirectional_attention": True}, "use_bidirectional_attention: expected False, got true"),
        ("gemma-2-9b", {"hidden_activation": "swiglu"}, "hidden_activation: swiglu is not supported"),
        ("gemma-2-9b", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping: expected greater than 0"),
        ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: expected None, got 50.0"),
        ("gemma-3-1b", {"layer_types": ["chunked_attention"] * 4}, "layer_types: chunked_attention is not supported"),
        ("phi-4-mini", {"lm_head_bias": True}, "lm_head_bias: expected False, got true"),
        ("glm-4-9b-chat", {"partial_rotary_factor": 0.7}, "partial_rotary_factor: 0.7 of a head of 16 numbers is 11"),
        ("phi-4-mini", {"full_attn_mod": 2}, "full_attn_mod: expected 1, got 2"),
        (
            "phi-4-mini",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor",
        ),
        ("GLM-4-32B-0414", {"hidden_act": "quick_gelu"}, "hidden_act: quick_gelu is not supported"),
        ("granite-3.3-8b", {"logits_scaling": 0}, "logits_scaling: expected greater than 0"),
        (
            "granite-3.3-8b",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor: 0.5 is not supported for GraniteForCausalLM",
        ),
        ("Olmo-3-7B", {"layer_types": ["full_attention"]}, "layer_types"),
        ("SmolLM3-3B", {"no_rope_layers": [1, 2, 1, 0]}, "no_rope_layers"),
        ("SmolLM3-3B", {"no_rope_layers": [1]}, "no_rope_layers: 1 entries for 4 layers"),
        ("Seed-OSS-36B", {"attention_out_bias": "no"}, "attention_out_bias"),
        ("EXAONE-4.0-32B", {"layer_types": ["linear_attention"] * 4}, "layer_types: linear_attention is not supported"),
        ("c4ai-command-r7b-12-2024", {"use_parallel_block": False}, "use_parallel_block: expected True, got false"),
        ("c4ai-command-r7b-12-2024", {"position_embedding_type": "alibi"}, "position_embedding_type"),
        ("c4ai-command-r7b-12-2024", {"use_qk_norm": True}, "use_qk_norm: expected False, got true"),
        ("starcoder2-3b", {"mlp_type": "gated"}, "mlp_type: expected 'default'"),
        ("starcoder2-3b", {"norm_type": "rms_norm"}, "norm_type: expected 'layer_norm'"),
        ("internlm3-8b-instruct", {"bias": True}, "qkv_bias"),
        (
            "Ministral-3-8B",
            {"text_config": {"model_type": "mamba"}},
            "text_config: model_type: mamba is not supported for Mistral3ForConditionalGeneration",
        ),
        ("gemma-3-4b", {"text_config": None}, "text_config: expected an object, got null"),
        ("gemma-3-4b", {"text_config": {"model_type": "gemma3_text", "vocab_size": "many"}}, "vocab_size"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_a_family_does_not_compute_is_refused_by_name(
    name: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**published_config(name), **options}))
    with pytest.raises(EngineError) as refusal:
        read_architecture(tmp_path)
    assert words in str(refusal.value)


def test_short_sequences_take_longropes_short_frequencies_where_none_can_be_long(tmp_path: Path) -> None:
    folder = save_published(tmp_path, "phi-4-mini")
    prompts = random_prompts((1, 7, 20))
    assert Driver(load_runner(folder, max_model_len=32)).generate(prompts, 8) == Oracle(folder).greedy(prompts, 8)


def test_mimo_is_qwen2_by_another_name(tmp_path: Path) -> None:
    own = {"attention_bias": True, "num_nextn_predict_layers": 1, "use_mrope": False, "head_dim": 16}
    save_checkpoint(tmp_path, "Qwen2ForCausalLM", head_dim=16)
    prompts = random_prompts((1, 30))
    expected = Oracle(tmp_path).greedy(prompts, 8)
    path = tmp_path / "config.json"
    named = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own, **named}))
    assert Driver(load_runner(tmp_path)).generate(prompts, 8, chunk=7) == expected
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_bias": False}))
    with pytest.raises(EngineError, match="attention_bias: expected True, got false"):
        read_architecture(tmp_path)


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_experts_that_lie_together_are_read_either_way(quantization: str, tmp_path: Path) -> None:
    """Qwen3-VL is published with the matrices transposed, and transformers 5 saves them as they are computed."""
    saved = save_published(tmp_path / "saved", "Qwen3-VL-30B-A3B")
    published = shutil.copytree(saved, tmp_path / "published")
    tensors = load_file(saved / "model.safetensors")
    experts = {name: tensor.transpose(1, 2).contiguous() for name, tensor in tensors.items() if ".mlp.experts." in name}
    assert len(experts) == 2 * 4
    save_file(tensors | experts, published / "model.safetensors", metadata={"format": "pt"})
    prompts = random_prompts((1, 30))
    answers = [
        Driver(load_runner(folder, quantization=quantization)).generate(prompts, 8) for folder in (saved, published)
    ]
    assert answers[0] == answers[1]
    if quantization == "none":
        assert answers[1] == Oracle(published).greedy(prompts, 8)


def test_a_head_that_text_config_ties_is_tied_where_the_whole_says_nothing(tmp_path: Path) -> None:
    config = published_config("Qwen3-VL-4B")
    del config["tie_word_embeddings"]
    for tied in (True, False):
        (tmp_path / "config.json").write_text(
            json.dumps({**config, "text_config": {**config["text_config"], "tie_word_embeddings": tied}})
        )
        assert read_architecture(tmp_path).tied_head is tied


def test_keys_of_experts_in_a_dense_models_file_may_say_that_there_are_none(tmp_path: Path) -> None:
    """And those of a shared expert in the file of a model without one: Qwen3-Coder-480B's."""
    for name, keys in (("Qwen3-VL-4B", ("num_experts", "num_experts_per_tok")), ("Olmo-3-7B", ("num_local_experts",))):
        config = published_config(name)
        part = config.get("text_config", config)
        part.update(dict.fromkeys(keys, 0))
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert all(isinstance(layer.mlp, MlpSpec) for layer in read_architecture(tmp_path).layers)
    (tmp_path / "config.json").write_text(json.dumps({**GEOMETRIES["qwen3-30b-a3b"], **NO_SHARED_EXPERT}))
    layer = read_architecture(tmp_path).layers[0]
    assert isinstance(layer.mlp, MoeSpec) and layer.mlp.shared_size == 0


@pytest.mark.parametrize("name", ["gemma-3-4b", "Ministral-3-8B", "Qwen2-VL-2B", "Qwen2.5-VL-7B", "Qwen3-VL-4B"])
def test_tensors_for_images_are_left_unread_and_the_log_says_so(name: str, tmp_path: Path) -> None:
    towers = "visual" if name.startswith("Qwen") else "multi_modal_projector, vision_tower"
    heard: list[str] = []
    load_runner(save_published(tmp_path, name), tell=heard.append)
    (sentence,) = [sentence for sentence in heard if sentence.startswith("weights: ")]
    assert f"tensors of {towers} are left unread" in sentence and "ignored" not in sentence
