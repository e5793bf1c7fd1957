"""Small random checkpoints and what transformers generates from them: the truth that the engine's tokens are compared
with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

from paged_backend.arrays import Int32

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Glm4MoeForCausalLM": "glm4_moe",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "GptOssForCausalLM": "gpt_oss",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
}
_SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # wide, so that the largest logit leads by more than rounding
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def save_checkpoint(
    folder: Path,
    architecture: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    **options: Any,
) -> Path:
    """Writes a random checkpoint of `architecture` with transformers' save_pretrained; `options` are entries of its
    config.

    Biases, norms, sinks and corrections of scores are random too: transformers starts them at 0 and 1, which would hide
    that they are forgotten.
    """
    config = AutoConfig.for_model(_MODEL_TYPES[architecture], **{**_SMALL, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("bias", "sinks")):
                torch.nn.init.normal_(parameter, 0, 0.2)
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def save_over(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file in the place of one that a model may still have mapped: writing into it would change
    that model, or end the process.
    """
    beside = path.with_suffix(".new")
    save_file(tensors, beside, metadata={"format": "pt"})
    beside.replace(path)


def random_prompts(lengths: Sequence[int], vocab_size: int = _SMALL["vocab_size"], seed: int = 0) -> list[Int32]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, length, dtype=np.int32) for length in lengths]


def kind_of(config: Any) -> Any:
    """The auto class of a model that makes text."""
    return (
        AutoModelForImageTextToText
        if type(config) in AutoModelForImageTextToText._model_mapping
        else AutoModelForCausalLM
    )


class RoundedCache(DynamicCache):
    """Of a model whose keys and values are kept in 8 bits: rounded to float8_e4m3fn, the greatest of which is 448."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) for x in (key_states, value_states))
        return super().update(keys, values, *args, **options)


class Oracle:
    """transformers' own model on a checkpoint, in float32."""

    def __init__(self, folder: Path, cache: type[DynamicCache] = DynamicCache) -> None:
        self._folder = folder
        self._cache = cache
        self.model = self._load()

    def _load(self) -> Any:
        config = AutoConfig.from_pretrained(self._folder)
        # it has no caps and no sinks
        attention = (
            "eager" if getattr(config, "attn_logit_softcapping", None) or config.model_type == "gpt_oss" else "sdpa"
        )
        return kind_of(config).from_pretrained(self._folder, dtype=torch.float32, attn_implementation=attention).eval()

    def greedy(self, prompts: Sequence[Sequence[int] | Int32], max_tokens: int) -> list[list[int]]:
        """The answers to the prompts, each generated alone: max_tokens tokens, or fewer if the checkpoint's EOS comes
        first (it is included).
        """
        return [self._greedy(prompt, max_tokens) for prompt in prompts]

    def _greedy(self, prompt: Sequence[int] | Int32, max_tokens: int) -> list[int]:
        if (self.model.config.get_text_config().rope_parameters or {}).get("rope_type") == "dynamic":
            self.model = self._load()  # it keeps the frequencies of the longest sequence it has seen
        ids = torch.as_tensor(np.asarray(prompt, np.int64))[None]
        options = {
            "attention_mask": torch.ones_like(ids),
            "past_key_values": self._cache(config=self.model.config.get_text_config()),
        }
        with torch.inference_mode():
            answer = self.model.generate(ids, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0, **options)
        return answer[0, ids.shape[1] :].tolist()

    def logits(self, token_ids: Sequence[int] | Int32) -> torch.Tensor:
        """[len(token_ids), vocab] float32."""
        with torch.inference_mode():
            return self.model(torch.as_tensor(np.asarray(token_ids, np.int64))[None]).logits[0]
