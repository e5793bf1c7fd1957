"""What a checkpoint's config.json says, checked: a plain `Architecture`, or a refusal that names what is not supported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from paged_backend.errors import EngineError, reason_of
from paged_backend.models.config_file import MAX_POSITIONS, ConfigFile, ConfigKind, checked, read_json

MODEL_TYPES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_QUANTISERS_FILES = ("quantize_config.json", "quant_config.json")  # AutoGPTQ's and AutoAWQ's, before they wrote into config.json
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `parameters` as transformers' `rope_parameters`, with `rope_type` one of ROPE_TYPES and `rope_theta`."""

    parameters: Mapping[str, Any]
    max_position_embeddings: int
    head_dim: int
    config: PreTrainedConfig  # what transformers' own frequency functions ask for

    @property
    def rope_type(self) -> str:
        return str(self.parameters["rope_type"])

    @property
    def max_len(self) -> int:
        """Tokens the checkpoint allows. For linear and dynamic scaling max_position_embeddings is the unscaled length; for yarn it may be either."""
        length, factor = self.max_position_embeddings, self.parameters.get("factor") or 1.0
        if self.rope_type in ("linear", "dynamic"):
            length = int(length * factor)
        if self.rope_type == "yarn":
            length = max(length, int(self.parameters["original_max_position_embeddings"] * factor))
        return min(length, MAX_POSITIONS)


@dataclass(frozen=True)
class Architecture:
    """A decoder: token embedding, layers of attention and SwiGLU with RMSNorm before each, final norm, head."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool
    sliding_windows: tuple[int | None, ...]  # [num_layers] tokens a layer attends to, itself included; None: all
    rope: Rope
    dtype: str  # the checkpoint's own: float32, bfloat16 or float16
    initializer_range: float
    eos_ids: tuple[int, ...]
    bos_id: int | None


def read_architecture(folder: Path) -> Architecture:
    """Reads and checks `folder`/config.json.

    Raises:
        EngineError: the file is missing or broken, or asks for something that is not supported; the sentence names it.
    """
    path = folder / "config.json"
    content = read_json(path)
    kind = checked(ConfigKind, content, path.name)
    name = _supported_name(kind)
    _refuse_quantised(folder, kind)
    file = checked(ConfigFile, content, path.name)
    config = _transformers_config(MODEL_TYPES[name], file)
    _check_options(config)
    attention_bias = bool(getattr(config, "attention_bias", False))
    return Architecture(
        name=name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        rms_norm_eps=config.rms_norm_eps,
        qkv_bias=True if name == "Qwen2ForCausalLM" else attention_bias and name != "MistralForCausalLM",
        out_bias=attention_bias and name in ("LlamaForCausalLM", "Qwen3ForCausalLM"),
        mlp_bias=name == "LlamaForCausalLM" and config.mlp_bias,
        qk_norm=name == "Qwen3ForCausalLM",
        tied_head=bool(config.tie_word_embeddings),
        sliding_windows=_sliding_windows(name, config),
        rope=Rope(dict(config.rope_parameters), config.max_position_embeddings, _head_dim(config), config),
        dtype=_dtype_name(file),
        initializer_range=config.initializer_range,
        eos_ids=token_ids(config.eos_token_id),
        bos_id=config.bos_token_id,
    )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """An eos_token_id entry, which may be one id, several or none."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _supported_name(file: ConfigKind) -> str:
    """The architecture, one of MODEL_TYPES."""
    name = (file.architectures or ["none"])[0]
    if name not in MODEL_TYPES:
        raise EngineError(f"architecture {name[:80]} is not supported; supported: {', '.join(MODEL_TYPES)}")
    if file.model_type not in (None, MODEL_TYPES[name]):
        raise EngineError(f"config.json: model_type is {str(file.model_type)[:80]}, but architectures says {name}, which is of model_type {MODEL_TYPES[name]}")
    return name


def _refuse_quantised(folder: Path, file: ConfigKind) -> None:
    if file.quantization_config:
        method = str(file.quantization_config.get("quant_method", "unnamed"))[:80]
        raise EngineError(f"quantization_config: quantised checkpoints are not supported ({method})")
    for name in _QUANTISERS_FILES:
        if (folder / name).is_file():
            raise EngineError(f"{name}: quantised checkpoints are not supported (config.json has no quantization_config, but GPTQ and AWQ write this file)")


def _transformers_config(model_type: str, file: ConfigFile) -> PreTrainedConfig:
    """transformers' config of what the file says, with the defaults of the rest."""
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type](**file.for_transformers())
    except Exception as error:  # transformers raises what it likes for a bad value, and its own checks wrap the reason
        raise EngineError(f"config.json: {reason_of(error.__cause__ or error)}") from None
    return config


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_options(config: PreTrainedConfig) -> None:
    """Refuses, by name, what the decoder does not compute."""
    rope = config.rope_parameters or {}
    if config.hidden_act != "silu":
        raise EngineError(f"hidden_act: {config.hidden_act} is not supported; supported: silu")
    if "rope_type" not in rope or any(isinstance(entry, Mapping) for entry in rope.values()):
        raise EngineError("rope_parameters: different positions for different layers are not supported")
    if rope["rope_type"] not in ROPE_TYPES:
        raise EngineError(f"rope_type: {rope['rope_type']} is not supported; supported: {', '.join(ROPE_TYPES)}")
    partial = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    if partial != 1.0:
        raise EngineError(f"partial_rotary_factor: {partial} is not supported; supported: 1.0")
    if config.num_attention_heads % config.num_key_value_heads:
        raise EngineError(f"num_attention_heads: {config.num_attention_heads} is not a multiple of num_key_value_heads ({config.num_key_value_heads})")
    head_dim = _head_dim(config)
    if head_dim % 2 or not head_dim:
        raise EngineError(f"head_dim: {head_dim} is not supported, rotary positions need an even one")


def _sliding_windows(name: str, config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Mistral: every layer; Qwen: the layers that layer_types calls sliding, if use_sliding_window; Llama: none."""
    layer_types = getattr(config, "layer_types", None)
    num_layers = int(config.num_hidden_layers)
    window: int | None = getattr(config, "sliding_window", None)
    if window == 0:
        raise EngineError("sliding_window: 0 tokens are nothing to attend to; null means all")
    if layer_types is not None:
        for layer_type in layer_types:
            if layer_type not in ("full_attention", "sliding_attention"):
                raise EngineError(f"layer_types: {layer_type} is not supported; supported: full_attention, sliding_attention")
        if len(layer_types) != num_layers:
            raise EngineError(f"layer_types: {len(layer_types)} entries for {num_layers} layers")
    if name == "LlamaForCausalLM":
        return (None,) * num_layers
    if name == "MistralForCausalLM":
        if layer_types is not None and len(set(layer_types)) > 1:
            raise EngineError("layer_types: layers that differ in attention are not supported for MistralForCausalLM")
        return (window,) * num_layers
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types or ())


def _dtype_name(file: ConfigFile) -> str:
    name = (file.dtype or file.torch_dtype or "float32").removeprefix("torch.")
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise EngineError(f"config.json: dtype: {name[:80]} is no type of torch's")
    return name if name in ("float32", "bfloat16", "float16") else "float32"
