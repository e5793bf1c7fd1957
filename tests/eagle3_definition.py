"""What an EAGLE-3 head guesses by its definition, written down in plain torch over transformers' states."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import AutoModelForCausalLM


class Definition:
    """The paper's section 3, in float32, one sequence at a time, without any cache."""

    def __init__(self, target: Path, head: Path, taps: tuple[int, ...]) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        tensors = load_file(head / "model.safetensors")
        self._tensors = {name.removeprefix("midlayer.").removeprefix("layers.0."): t for name, t in tensors.items()}
        self._config = json.loads((head / "config.json").read_text())
        self._embedding = self._tensors.get("embed_tokens.weight", self._model.get_input_embeddings().weight)
        self._taps = taps

    @torch.inference_mode()
    def guesses(self, text: list[int], count: int) -> list[int]:
        layers = self._model(torch.tensor(text)[None], output_hidden_states=True).hidden_states
        num_layers = self._model.config.num_hidden_layers
        read = [layers[after][0] if after < num_layers else self._last(text) for after in self._taps]
        states = list(self._product(torch.cat(read, dim=1), "fc")[:-1])
        following = list(text[1:])
        for _ in range(count):
            state = self._layer(torch.stack(states), torch.tensor(following))[-1]
            guess = int(self._product(self._norm(state, "norm"), "lm_head").argmax())
            following.append(guess + int(self._tensors["d2t"][guess]) if "d2t" in self._tensors else guess)
            states.append(state)
        return following[-count:]

    def _last(self, text: list[int]) -> Tensor:
        """[T, hidden]: transformers gives the normed answer of the last layer."""
        found: list[Tensor] = []
        hook = self._model.model.norm.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0][0]))
        self._model(torch.tensor(text)[None])
        hook.remove()
        return found[0]

    def _layer(self, states: Tensor, following: Tensor) -> Tensor:
        """[T, hidden], [T] -> [T, hidden]"""
        normed = self._norm(states, "hidden_norm")
        x = torch.cat([self._norm(self._embedding[following], "input_layernorm"), normed], dim=1)
        head_dim, heads = self._config["head_dim"], self._config["num_attention_heads"]
        q, k, v = (
            self._product(x, f"self_attn.{letter}_proj").view(len(x), -1, head_dim).transpose(0, 1) for letter in "qkv"
        )
        k, v = (each.repeat_interleave(heads // len(each), 0) for each in (k, v))
        attended = scaled_dot_product_attention(self._rotated(q), self._rotated(k), v, is_causal=True)
        answer = self._product(attended.transpose(0, 1).reshape(len(x), -1), "self_attn.o_proj")
        y = (normed if self._config.get("norm_before_residual") else states) + answer
        inner = self._norm(y, "post_attention_layernorm")
        gated = silu(self._product(inner, "mlp.gate_proj")) * self._product(inner, "mlp.up_proj")
        return y + self._product(gated, "mlp.down_proj")

    def _rotated(self, x: Tensor) -> Tensor:
        """[heads, T, D] with the rotary positions 0, 1, 2 … (Su et al., 2021), halves as pairs."""
        size = x.shape[2]
        angles = torch.arange(x.shape[1])[:, None] * self._config["rope_theta"] ** -(torch.arange(0, size, 2) / size)
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
        )

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._tensors[f"{name}.weight"].float()
        return rms_norm(x, weight.shape, weight, self._config["rms_norm_eps"])

    def _product(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self._tensors[f"{name}.weight"].float())
