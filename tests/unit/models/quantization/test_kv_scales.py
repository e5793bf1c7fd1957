"""With kv_dtype=fp8_e4m3 keys and values are divided by the checkpoint's scales before they are rounded: tokens equal a
model whose cache does so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from paged_backend.errors import EngineError
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.published_formats import FORMATS, save_published
from tests.runner_driver import Driver, load_runner

K_SCALE, V_SCALE = 0.03, 3.0  # used as 2 ** -5 and 4


class ScaledCache(DynamicCache):
    """Of a model whose keys and values are divided, rounded to float8_e4m3fn and multiplied."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = ((key_states, 2.0**-5), (value_states, 4.0))
        keys, values = ((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale for x, scale in scaled)
        return super().update(keys, values, *args, **options)


def add_scales(folder: Path, names: tuple[str, str], k: torch.Tensor, v: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    for layer in layers:
        tensors |= {
            f"model.layers.{layer}.self_attn.{name}": scale.clone() for name, scale in zip(names, (k, v), strict=True)
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("architecture", "options", "names"),
    [
        ("Qwen2ForCausalLM", {}, ("k_scale", "v_scale")),
        ("Qwen3ForCausalLM", {"attention_bias": True}, ("k_proj.k_scale", "v_proj.v_scale")),
    ],
    ids=["biases", "norms of keys, modelopt's names"],
)
def test_tokens_equal_a_model_whose_cache_is_scaled(
    architecture: str, options: dict[str, Any], names: tuple[str, str], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, architecture, **options)
    prompts = random_prompts((3, 20))
    expected = Oracle(tmp_path, ScaledCache).greedy(prompts, 8)
    add_scales(tmp_path, names, torch.tensor(K_SCALE), torch.tensor([V_SCALE]))
    heard: list[str] = []
    runner = load_runner(tmp_path, kv_dtype="fp8_e4m3", tell=heard.append)
    assert Driver(runner).generate(prompts, 8, chunk=7) == expected
    assert "scales of K and V: the checkpoint's, of 3 layers, rounded up to powers of two" in heard


def test_scales_change_nothing_but_rounding_of_quantised_products(tmp_path: Path) -> None:
    """Of a model with one scale for activations: the products after and before the KV store mean the same as before."""
    save_published(tmp_path, FORMATS["fp8-static"])
    plain = load_runner(tmp_path)._decoder._weights.layers[0].attention
    add_scales(tmp_path, ("k_scale", "v_scale"), torch.tensor(K_SCALE), torch.tensor(V_SCALE))
    scaled = load_runner(tmp_path, kv_dtype="fp8_e4m3")._decoder._weights.layers[0].attention
    q, kv = plain.spec.q_size, plain.spec.kv_size
    # queries and keys are normed: their norms have the scale
    assert torch.equal(scaled.qkv.weight[: q + kv], plain.qkv.weight[: q + kv])
    assert torch.equal(scaled.qkv.weight[q + kv :] * 4, plain.qkv.weight[q + kv :])
    assert torch.equal(scaled.out.weight, plain.out.weight * 4)
    assert scaled.out.input_scale is not None and plain.out.input_scale is not None
    assert torch.equal(scaled.out.input_scale * 4, plain.out.input_scale)
    assert scaled.qk_norm is not None and plain.qk_norm is not None
    assert torch.equal(scaled.qk_norm[1].weight, plain.qk_norm[1].weight * 32)


@pytest.mark.parametrize(
    "scale", [torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(2)], ids=["zero", "nan", "two"]
)
def test_what_is_no_scale_is_refused(scale: torch.Tensor, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "Qwen2ForCausalLM")
    add_scales(tmp_path, ("k_scale", "v_scale"), torch.tensor(1.0), scale)
    with pytest.raises(
        EngineError, match=r"self_attn\.v_scale of shape .* is no scale: expected one positive finite number"
    ):
        load_runner(tmp_path, kv_dtype="fp8_e4m3")
    load_runner(tmp_path)  # nobody reads it
