"""Weights in the formats of publishers whose libraries need a GPU, packed a number at a time as their documentation has
it, and what they mean in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.oracle import save_checkpoint, save_over
from tests.quantised_checkpoints import SIZES, CompressedModel

FP8 = torch.float8_e4m3fn
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
INPUT_SCALE = 0.02


@dataclass(frozen=True)
class Published:
    """A format: config.json's quantization_config, what a weight becomes (the last parts of names -> tensors, and the
    float32 matrix that they mean), and what a product does to its input.
    """

    config: dict[str, Any]
    pack: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
    rounded: Callable[[Tensor], Tensor] | None = None


def save_published(folder: Path, published: Published, plain: tuple[str, ...] = (), **options: Any) -> CompressedModel:
    """A random Qwen3 in that format; products whose names end with one of `plain` stay as they are. Returns the model
    that it means.
    """
    save_checkpoint(folder, "Qwen3ForCausalLM", **{**SIZES, **options})
    tensors = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name.endswith(("lm_head", *plain)):
            continue
        stored, meant = published.pack(tensors.pop(f"{name}.weight"))
        tensors |= {f"{name}.{ending}": tensor.contiguous() for ending, tensor in stored.items()}
        module.weight.data.copy_(meant)
        if published.rounded is not None:
            module.register_forward_pre_hook(lambda _, inputs: published.rounded(inputs[0]))  # type: ignore[misc]
    save_over(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": published.config}))
    return CompressedModel(model)


def fp8_block(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Blocks of 128 × 128, the last of a row or column smaller."""
    codes, scales, meant = torch.empty(weight.shape, dtype=FP8), [], torch.empty_like(weight)
    for i in range(0, len(weight), 128):
        row = []
        for j in range(0, weight.shape[1], 128):
            block = weight[i : i + 128, j : j + 128]
            scale = (block.abs().max() / 448).to(torch.bfloat16).float()
            codes[i : i + 128, j : j + 128] = (block / scale).clamp(-448, 448).to(FP8)
            meant[i : i + 128, j : j + 128] = codes[i : i + 128, j : j + 128].float() * scale
            row.append(scale)
        scales.append(torch.stack(row))
    return {"weight": codes, "weight_scale_inv": torch.stack(scales).to(torch.bfloat16)}, meant


def in_groups_of_128(power_of_two: bool) -> Callable[[Tensor], Tensor]:
    """Dynamic activations of fp8 blocks."""

    def rounded(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for j in range(0, x.shape[-1], 128):
            part = x[..., j : j + 128]
            scale = part.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
            scale = 2.0 ** torch.ceil(torch.log2(scale)) if power_of_two else scale
            out[..., j : j + 128] = (part / scale).clamp(-448, 448).to(FP8).float() * scale
        return out

    return rounded


def fp8_static(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One scale for the weight, one for the activations before it."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(FP8)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(INPUT_SCALE)}, codes.float() * scale


def static(x: Tensor) -> Tensor:
    return (x / INPUT_SCALE).clamp(-448, 448).to(FP8).float() * INPUT_SCALE


def nvfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Model Optimizer's: the scale on top multiplies."""
    groups = weight.view(len(weight), -1, 16)
    on_top = weight.abs().max() / (6 * 448)
    scale = (groups.abs().amax(2) / 6 / on_top).to(FP8)
    wide = scale.float() * on_top
    table = torch.tensor(E2M1)
    nearest = ((groups / wide[:, :, None]).abs()[..., None] - table).abs().argmin(-1)
    meant = torch.copysign(table[nearest], groups) * wide[:, :, None]
    codes = (nearest + 8 * (groups < 0)).view(weight.shape).to(torch.uint8)
    packed = codes[:, 0::2] + 16 * codes[:, 1::2]
    stored = {
        "weight": packed,
        "weight_scale": scale,
        "weight_scale_2": on_top,
        "input_scale": torch.tensor(INPUT_SCALE),
    }
    return stored, meant.view(weight.shape)


def _asymmetric(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers [out, in], zeros and scales (of float16) [out, groups], and the matrix that they mean."""
    groups = weight.view(len(weight), -1, group)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale.float()).round().clamp(0, 2**bits - 1)
    numbers = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    meant = (numbers - zero[..., None]) * scale.float()[..., None]
    return numbers.view(weight.shape).int(), zero.int(), scale, meant.view(weight.shape)


def awq(group: int) -> Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]:
    """qweight [in, out / 8]: the even columns of eight, then the odd ones."""

    def packed(numbers: Tensor) -> Tensor:
        out = np.zeros((numbers.shape[0], numbers.shape[1] // 8), np.uint32)
        for column in range(out.shape[1]):
            for place, of_eight in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                out[:, column] |= numbers[:, column * 8 + of_eight].numpy().astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(out.view(np.int32))

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        numbers, zero, scale, meant = _asymmetric(weight, 4, group)
        return {"qweight": packed(numbers.T), "qzeros": packed(zero.T), "scales": scale.T}, meant

    return pack


def gptq(bits: int, group: int, zeros_less_one: bool) -> Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]:
    """qweight [in * bits / 32, out]: rows in order; qzeros [groups, out * bits / 32]: columns in order."""
    count = 32 // bits

    def packed(rows: Tensor) -> Tensor:
        out = np.zeros((len(rows) // count, rows.shape[1]), np.uint32)
        for row in range(len(rows)):
            out[row // count] |= rows[row].numpy().astype(np.uint32) << np.uint32(bits * (row % count))
        return torch.from_numpy(out.view(np.int32))

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        numbers, zero, scale, meant = _asymmetric(weight, bits, group)
        stored_zero = (zero - 1) % 2**bits if zeros_less_one else zero
        g_idx = torch.arange(weight.shape[1], dtype=torch.int32) // group
        return {"qweight": packed(numbers.T), "qzeros": packed(stored_zero).T, "scales": scale.T, "g_idx": g_idx}, meant

    return pack


BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
MODELOPT_FP8 = {  # as Qwen3-32B's: no quant_method, and a group of the other library's spelling
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
            "weights": {"num_bits": 8, "type": "float"},
        }
    },
    "ignore": ["lm_head"],
    "quant_algo": "FP8",
    "kv_cache_scheme": "FP8",
    "producer": {"name": "modelopt", "version": "0.31.0"},
}
FORMATS = {
    "fp8-block": Published(BLOCKS, fp8_block, in_groups_of_128(False)),
    "fp8-block-ue8m0": Published({**BLOCKS, "scale_fmt": "ue8m0"}, fp8_block, in_groups_of_128(True)),
    "fp8-static": Published({"quant_method": "fp8", "activation_scheme": "static"}, fp8_static, static),
    "modelopt-fp8": Published(MODELOPT_FP8, fp8_static, static),
    "modelopt-nvfp4": Published(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}, nvfp4
    ),
    "awq-g32": Published(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, awq(32)
    ),
    "awq-g128": Published(
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}, awq(128)
    ),
    "gptq-4": Published(GPTQ, gptq(4, 32, True)),
    "gptq-8-v2": Published({**GPTQ, "bits": 8, "group_size": 128, "checkpoint_format": "gptq_v2"}, gptq(8, 128, False)),
}
