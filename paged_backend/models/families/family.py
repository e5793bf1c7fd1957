"""What a family is, and what the dense ones have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedConfig

from paged_backend.errors import EngineError
from paged_backend.models.config_file import ConfigFile
from paged_backend.models.layer_spec import ALL_LAYERS, AttentionSpec, EndsSpec, LayerSpec, MlpSpec, MtpForm, NormSpec

# as config.json calls them
_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}


# of checkpoints that also take images
OTHER_PARTS = ("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector.")
# as they are published, and as transformers 5 calls them
IN_OTHER_PARTS = MappingProxyType({"language_model.": "", "model.language_model.": "model."})


def plain_ends(config: PreTrainedConfig) -> EndsSpec:
    """The final norm and nothing else."""
    return EndsSpec(NormSpec(config.rms_norm_eps))


@dataclass(frozen=True)
class Family:
    """A published architecture."""

    architecture: str  # its name in config.json's `architectures`
    model_type: str  # its name in config.json's `model_type`
    # raises EngineError for what is not supported; the sentence names it
    layers: Callable[[PreTrainedConfig], tuple[LayerSpec, ...]]
    ends: Callable[[PreTrainedConfig], EndsSpec] = plain_ends
    config: type[ConfigFile] = ConfigFile  # the keys of config.json that it reads, and what they may hold
    # beginnings of tensors' names in its checkpoints -> what they are called in a model of text
    renames: Mapping[str, str] = field(default_factory=dict)
    models: str = ""  # that are published under it, in words
    partial_rotary: bool = False  # partial_rotary_factor may be other than 1
    ropes_by_layer_type: bool = False  # rope_parameters has an entry for each of layer_types
    # of language models within checkpoints of several parts: what text_config calls its `model_type`
    text_model_types: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()  # beginnings of the names of the other parts' tensors
    config_type: str = ""  # the model_type whose class of transformers reads its config.json, where it has none itself
    tied_head: bool = True  # where config.json of several parts does not say
    may_be_flat: bool = False  # config.json of several parts may have no text_config, but its keys beside the others

    also_called: tuple[str, ...] = ()  # what else config.json's `model_type` may say
    keeps_latents: bool = False  # values may have other sizes than keys: neither are kept
    mtp: MtpForm | None = None  # of checkpoints that bring a layer of multi-token prediction

    @property
    def has_other_parts(self) -> bool:
        """Whether config.json describes more than a language model, which is then its text_config."""
        return bool(self.text_model_types)


def dense_layers(
    config: PreTrainedConfig,
    windows: tuple[int | None, ...],
    *,
    mlp: MlpSpec | None = None,
    ropes: tuple[str | None, ...] | None = None,
    layer: dict[str, Any] | None = None,
    **attention: Any,
) -> tuple[LayerSpec, ...]:
    """Layers that differ in their sliding windows and rotary positions only. mlp: None: gated, without biases. layer:
    further fields of LayerSpec, by default an RMS norm of rms_norm_eps. attention: further fields of AttentionSpec.
    """
    mlp = mlp or MlpSpec(config.intermediate_size, activation=activation_of(config))
    fields = dict(layer) if layer else {}
    if "norm" not in fields:
        fields["norm"] = NormSpec(config.rms_norm_eps)
    heads = (config.num_attention_heads, config.num_key_value_heads, head_dim_of(config))
    specs = []
    for index, window in enumerate(windows):
        rope = ALL_LAYERS if ropes is None else ropes[index]
        specs.append(LayerSpec(AttentionSpec(*heads, sliding_window=window, rope=rope, **attention), mlp, **fields))
    return tuple(specs)


def activation_of(config: PreTrainedConfig, key: str = "hidden_act") -> str:
    """The activation that config.json names under `key`, by its name here.

    Raises:
        EngineError: there is none of that name.
    """
    name = getattr(config, key)
    if name not in _ACTIVATIONS:
        raise EngineError(f"{key}: {str(name)[:80]} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def head_dim_of(config: PreTrainedConfig) -> int:
    """head_dim where the config has it, else the hidden size shared out among the heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def windows_by_layer_type(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """The window of the layers that `layer_types` calls sliding (transformers derives it from use_sliding_window and
    max_window_layers).
    """
    return tuple(
        config.sliding_window if layer_type == "sliding_attention" else None for layer_type in config.layer_types
    )
