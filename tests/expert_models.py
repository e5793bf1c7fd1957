"""Models with experts: configs with the keys and options of the published ones, cut down in width and depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.bench.geometries import GEOMETRIES
from tests.oracle import save_checkpoint

SHRUNK = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
}
SHRUNK |= {
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# As many heads for keys as there are. Sizes of latents are true, so that scores are sums of hundreds of terms: with
# wider weights they would be large, and float32 would keep few of their digits behind the point.
_HEADS = {"num_key_value_heads": 4, "initializer_range": 0.1}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {},
    "qwen1.5-moe-a2.7b": {"shared_expert_intermediate_size": 40},
    "qwen3-30b-a3b": {},
    "glm-4.5-air": {},
    "minimax-m2": {"rotary_dim": 4},
    "gpt-oss-20b": {"layer_types": ["sliding_attention", "full_attention"]},
    "deepseek-v2-lite": _HEADS,
    "deepseek-v2": _HEADS,
    "deepseek-v3": {**_HEADS, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
    "kimi-k2": _HEADS,
    "glm-4.7-flash": {**_HEADS, "num_nextn_predict_layers": 0},
}


_NOT_OF_FLOATS = ("architectures", "model_type", "quantization_config")  # given apart, or not of a model of floats


def shrunk(name: str) -> dict[str, Any]:
    """The published config of a model with less width and depth, and nothing else changed."""
    published = {key: value for key, value in GEOMETRIES[name].items() if key not in _NOT_OF_FLOATS}
    own = {key: value for key, value in SHRUNK.items() if key in published or key.endswith("_token_id")}
    return {**published, **own, "initializer_range": 0.2, **MODELS[name]}


def save_expert_model(folder: Path, name: str) -> Path:
    """A random checkpoint of one of MODELS."""
    return save_checkpoint(folder, GEOMETRIES[name]["architectures"][0], **shrunk(name))
