"""Small checkpoints in the library compressed-tensors' formats, and its own model of what they mean: the truth for
quantised weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.oracle import save_checkpoint, save_over

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
# of static activations: 448 and 127 of them reach beyond what the model computes
INPUT_SCALE = {"float": 0.02, "int": 0.05}


class CompressedModel:
    """transformers' model with the library's quantised forward pass, as float32 computes it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, token_ids: Sequence[int] | Any) -> Tensor:
        """[len(token_ids), vocab] float32."""
        with torch.inference_mode():
            logits: Tensor = self.model(torch.as_tensor(token_ids, dtype=torch.int64)[None]).logits[0]
        return logits

    def greedy(self, prompts: Sequence[Any], max_tokens: int) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            tokens = [int(token) for token in prompt]
            for _ in range(max_tokens):
                tokens.append(int(self.logits(tokens)[-1].argmax()))
            answers.append(tokens[len(prompt) :])
        return answers


def save_compressed(
    folder: Path, groups: Mapping[str, Any], ignore: Sequence[str] = ("lm_head",), **options: Any
) -> CompressedModel:
    """Quantises a random Qwen3 by `groups` (presets or schemes of the library) and writes it as the library does;
    `options`: entries of its config.
    """
    save_checkpoint(folder, "Qwen3ForCausalLM", **{**SIZES, **options})
    model, stored = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    for each in (model, stored):
        apply_quantization_config(each, QuantizationConfig(config_groups=dict(groups), ignore=list(ignore)))
        for module in each.modules():
            if hasattr(module, "quantization_scheme"):
                _choose_scales(module)
    compressor = ModelCompressor.from_pretrained_model(stored)
    assert compressor is not None
    compressor.compress_model(stored)
    save_over({name: tensor.contiguous() for name, tensor in stored.state_dict().items()}, folder / "model.safetensors")
    compressor.update_config(str(folder))
    return CompressedModel(model)


def _choose_scales(module: Any) -> None:
    """For the greatest magnitude of each group of weights to fit."""
    weights, activations = module.quantization_scheme.weights, module.quantization_scheme.input_activations
    weight = module.weight.detach()
    rows, columns = module.weight_scale.shape if module.weight_scale.dim() == 2 else (1, 1)
    blocks = weight.view(rows, len(weight) // rows, columns, -1)
    on_top = None
    if hasattr(module, "weight_global_scale"):
        on_top = generate_gparam(weight.amin(), weight.amax())
        module.weight_global_scale.data.copy_(on_top)
    scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), weights, global_scale=on_top)
    module.weight_scale.data.copy_(scale.view(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.view(module.weight_zero_point.shape))
    if activations is not None and hasattr(module, "input_scale"):
        module.input_scale.data.fill_(INPUT_SCALE[activations.type])
    if hasattr(module, "input_zero_point"):
        module.input_zero_point.data.zero_()
    module.quantization_status = QuantizationStatus.FROZEN


def behead(folder: Path) -> None:
    """Leaves the layers alone, by the names that they have in a model of embeddings."""
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
    save_over({name: tensor.clone() for name, tensor in tensors.items() if name != "lm_head.weight"}, path)


def edit_config(folder: Path, **quantization: Any) -> None:
    """Changes entries of quantization_config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {**config.get("quantization_config", {}), **quantization}
    path.write_text(json.dumps(config))
