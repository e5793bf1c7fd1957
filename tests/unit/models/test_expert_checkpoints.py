"""Checkpoints with experts: stored one by one or together, what is refused by name, and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from paged_backend.errors import EngineError, RequestError
from paged_backend.models.adapter_files import check_adapter
from paged_backend.models.adapter_layout import AdapterLayout
from paged_backend.models.architecture import read_architecture
from paged_backend.models.weights import Weights, allocate_weights, load_weights, randomise_weights, settle_weights
from tests.adapter_oracle import AdapterOracle, save_adapter
from tests.oracle import Oracle, random_prompts, save_checkpoint, save_over
from tests.runner_driver import Driver, load_runner

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**EXPERTS, "head_dim": 8, "mlp_only_layers": [0]}),
}


def save(folder: Path, name: str, **options: Any) -> Path:
    architecture, own = CHECKPOINTS[name]
    return save_checkpoint(folder, architecture, **{**SMALL, **own, **options})


def load(folder: Path) -> Weights:
    weights = allocate_weights(read_architecture(folder), torch.float32, torch.device("cpu"))
    load_weights(weights, folder, lambda sentence: None)
    return weights


@pytest.mark.one_in(3)
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu2"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_experts_have_the_activation_that_the_config_names(name: str, activation: str, tmp_path: Path) -> None:
    """The shared one and the layers without experts, too."""
    folder = save(tmp_path, name, hidden_act=activation)
    prompts = random_prompts((3, 20))
    assert Driver(load_runner(folder)).generate(prompts, 8, chunk=7) == Oracle(folder).greedy(prompts, 8)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_experts_stored_together_are_those_stored_one_by_one(name: str, tmp_path: Path) -> None:
    """Published files have them one by one; transformers 5 keeps them together and saves them so when it is told to."""
    one_by_one = save(tmp_path / "published", name)
    AutoModelForCausalLM.from_pretrained(one_by_one, dtype=torch.float32).save_pretrained(
        tmp_path / "fused", save_original_format=False
    )
    stored = [set(load_file(folder / "model.safetensors")) for folder in (one_by_one, tmp_path / "fused")]
    assert any(".experts.0." in tensor for tensor in stored[0]) and any(
        tensor.endswith(".experts.gate_up_proj") for tensor in stored[1]
    )
    layers = [load(folder).layers for folder in (one_by_one, tmp_path / "fused")]
    for published, fused in zip(*layers, strict=True):
        for tensor, other in zip(published.parameters().values(), fused.parameters().values(), strict=True):
            assert torch.equal(tensor, other)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, "qwen3-moe")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if ".experts.4." not in name}, folder / "model.safetensors"
    )
    with pytest.raises(
        EngineError, match=r"tensor model\.layers\.1\.mlp\.experts\.4\.gate_proj\.weight is missing, and 2 more"
    ):
        settle_weights(read_architecture(folder), folder)


def test_an_expert_of_another_size_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, "mixtral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 25}))
    with pytest.raises(
        EngineError, match=r"experts\.0\.w1\.weight has shape \[24, 32\], config\.json implies \[25, 32\]"
    ):
        settle_weights(read_architecture(folder), folder)


def save_mxfp4(folder: Path, plain: Path, **changed: Any) -> Path:
    """gpt-oss as it is published, of random bytes; in `plain` the same numbers as transformers makes them of those
    bytes. changed: entries of its config.
    """
    options: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 9,
    }
    save_checkpoint(plain, "GptOssForCausalLM", **options | changed)
    tensors, generator = load_file(plain / "model.safetensors"), torch.Generator().manual_seed(0)
    packed = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            count, columns, rows = tensor.shape
            blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(121, 125, (count, rows, columns // 32), generator=generator, dtype=torch.uint8)
            del packed[name]
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    folder.mkdir()
    save_file(packed, folder / "model.safetensors")
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")})
    )
    return folder


def test_experts_in_mxfp4_say_what_their_numbers_say(tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "packed", tmp_path / "plain")
    assert read_architecture(folder).dtype == "bfloat16"  # which gpt-oss's config does not say
    prompts = random_prompts((3, 20, 41))
    expected = Oracle(tmp_path / "plain").greedy(prompts, 8)
    assert Driver(load_runner(folder)).generate(prompts, 8, chunk=7) == expected
    assert [linear.weight.dtype for linear in load(folder).layers[0].packed_experts] == [torch.uint8] * 2


def test_a_scale_that_is_no_number_is_named(tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "packed", tmp_path / "plain")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 0, 0] = 255
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        EngineError, match=r"model\.layers\.1\.mlp\.experts\.down_proj_scales holds numbers that are not finite"
    ):
        load(folder)


def test_scales_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "packed", tmp_path / "plain")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj_scales"
    save_over({**tensors, name: tensors[name][:, 1:].contiguous()}, folder / "model.safetensors")
    with pytest.raises(EngineError, match=rf"tensor {name} has shape \[\d+, \d+, \d+\], config\.json implies"):
        load(folder)


def test_gpt_oss_in_another_format_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "packed", tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        EngineError,
        match="quantization_config: fp8 is not supported for experts that are stored like these; supported: mxfp4",
    ):
        read_architecture(folder)


def test_random_weights_fill_mxfp4_too(tmp_path: Path) -> None:
    weights = allocate_weights(
        read_architecture(save_mxfp4(tmp_path / "packed", tmp_path / "plain")), torch.float32, torch.device("cpu")
    )
    randomise_weights(weights, read_architecture(tmp_path / "packed"), seed=0)
    _, down = weights.layers[0].packed_experts
    assert down.scale is not None and set(down.scale.flatten().tolist()) == {0}
    assert down.row_scale is not None and set(down.row_scale.flatten().tolist()) == {2.0**-6}
    assert len(down.weight.unique()) > 100


def test_a_layer_of_multi_token_prediction_is_left_unread_and_the_log_says_so(tmp_path: Path) -> None:
    options = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "num_nextn_predict_layers": 1,
    }
    folder = save_checkpoint(tmp_path, "Glm4MoeForCausalLM", **SMALL, **options)
    tensors = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if not name.startswith("model.layers.2.")
    }
    save_file(tensors | {"model.layers.2.eh_proj.weight": torch.zeros(32, 64)}, folder / "model.safetensors")
    weights = allocate_weights(read_architecture(folder), torch.float32, torch.device("cpu"))
    assert "ignored 1 tensors that the model has no use for (model.layers.2.eh_proj.weight)" in load_weights(
        weights, folder, lambda sentence: None
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_qk_norm", False), ("scoring_func", "softmax"), ("use_routing_bias", False), ("shared_intermediate_size", 8)],
)
def test_what_minimax_m2_does_not_compute_is_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path, "MiniMaxM2ForCausalLM", **SMALL, num_local_experts=4, num_experts_per_tok=2, head_dim=8, rotary_dim=4
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(EngineError, match=f"{key}: {value} is not supported"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok: 9", "6 experts"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok", "greater than or equal to 1"]),
        ({"num_experts": 5000}, ["num_experts", "1024"]),
        ({"decoder_sparse_step": 0}, ["decoder_sparse_step"]),
        ({"mlp_only_layers": "none"}, ["mlp_only_layers"]),
        ({"hidden_act": "quick_gelu"}, ["hidden_act: quick_gelu"]),
        ({"quantization_config": {"quant_method": "mxfp4"}}, ["quantization_config: mxfp4", "gpt-oss"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_by_name(options: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    folder = save(tmp_path, "qwen3-moe")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | options))
    with pytest.raises(EngineError) as refusal:
        read_architecture(folder)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_adapters_of_attention_and_of_the_shared_expert_say_what_peft_says(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "qwen2-moe")
    targets = ("q_proj", "o_proj", "shared_expert.gate_proj", "shared_expert.down_proj")
    save_adapter(tmp_path / "adapters" / "one", folder, 0, targets=targets)
    prompts = random_prompts((3, 20, 41))
    expected = AdapterOracle(folder, tmp_path / "adapters" / "one").greedy(prompts, 8)
    runner = load_runner(folder, lora_directory=str(tmp_path / "adapters"), max_lora_rank=4)
    assert runner.adapter_slots is not None
    runner.adapter_slots.fill(0, runner.adapter_slots.read("one"))
    assert Driver(runner).generate(prompts, 8, chunk=7, adapter_slots=[0, 0, 0]) == expected


def test_adapters_of_experts_are_refused_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "qwen3-moe")
    adapter = save_adapter(tmp_path / "adapter", folder, 0, targets=("q_proj",))
    path = adapter / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.mlp.experts.3.gate_proj.lora_A.weight"
    save_file(load_file(path) | {name: torch.zeros(4, 32)}, path)
    architecture = read_architecture(folder)
    with pytest.raises(
        RequestError,
        match=r"experts\.3\.gate_proj\.lora_A\.weight is an expert's: adapters of experts are not supported",
    ):
        check_adapter(adapter, AdapterLayout.of(architecture.layers, architecture.hidden_size), max_rank=8)
