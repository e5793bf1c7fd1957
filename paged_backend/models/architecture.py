"""What a checkpoint's config.json says, checked: a plain `Architecture`, or a refusal that names what is not
supported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from paged_backend.errors import EngineError, reason_of
from paged_backend.models.config_file import MAX_POSITIONS, ConfigFile, ConfigKind, checked, language_part, read_json
from paged_backend.models.families.family import Family, head_dim_of
from paged_backend.models.families.registry import FAMILIES
from paged_backend.models.layer_spec import (
    ALL_LAYERS,
    WHOLE,
    AttentionSpec,
    EndsSpec,
    LatentSpec,
    LayerSpec,
    MoeSpec,
    MtpForm,
)
from paged_backend.models.quantization.quantization import MXFP4, Quantization
from paged_backend.models.quantization.reading import read_quantization
from paged_backend.models.shard import Cut, Shard, padded_rows, vocabulary_cut

_CONFIG = "config.json"
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `parameters` as transformers' `rope_parameters`, with `rope_type` one of ROPE_TYPES and
    `rope_theta`.
    """

    parameters: Mapping[str, Any]
    max_position_embeddings: int
    rotary_dim: int  # numbers of a head that are rotated
    config: PreTrainedConfig  # what transformers' own frequency functions ask for
    layer_type: str = ""  # whose entry of the config's rope_parameters these are, where layers differ

    @property
    def rope_type(self) -> str:
        return str(self.parameters["rope_type"])

    @property
    def max_len(self) -> int:
        """Tokens the checkpoint allows. For linear and dynamic scaling max_position_embeddings is the unscaled length;
        for yarn it may be either.
        """
        length, factor = self.max_position_embeddings, self.parameters.get("factor") or 1.0
        if self.rope_type in ("linear", "dynamic"):
            length = int(length * factor)
        if self.rope_type == "yarn":
            length = max(length, int(self.parameters["original_max_position_embeddings"] * factor))
        return min(length, MAX_POSITIONS)


@dataclass(frozen=True)
class Architecture:
    """A decoder: token embedding, layers, final norm, head."""

    name: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    ends: EndsSpec
    tied_head: bool
    ropes: Mapping[str, Rope]  # by their names in AttentionSpec.rope
    dtype: str  # the checkpoint's own: float32, bfloat16 or float16
    initializer_range: float
    eos_ids: tuple[int, ...]
    bos_id: int | None
    has_head: bool = True  # False: the checkpoint is of the layers alone, which make embeddings and no text
    quantization: Quantization | None = None
    # beginnings of tensors' names -> what they are called here
    renames: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()  # beginnings of names of tensors that are for other inputs than text
    shard: Shard = WHOLE  # the layers are this rank's parts
    mtp: MtpForm | None = None  # None: the checkpoint brings no layer of multi-token prediction

    def of_rank(self, shard: Shard) -> Architecture:
        """What one of the ranks that share the model computes.

        Raises:
            EngineError: it cannot be divided among so many.
        """
        if shard.size == 1:
            return self
        vocabulary_cut(shard, self.vocab_size)
        layers = (layer.of_rank(shard, partial(self._group_of, index)) for index, layer in enumerate(self.layers))
        return replace(self, layers=tuple(layers), shard=shard)

    def _group_of(self, index: int, module: str) -> int:
        """layer_spec.GroupOf of a layer."""
        return 1 if self.quantization is None else self.quantization.group_of(f"model.layers.{index}.{module}")

    @property
    def vocabulary(self) -> Cut:
        """The rank's rows of the embedding and of the head; `vocab_size` is the whole vocabulary's."""
        return vocabulary_cut(self.shard, self.vocab_size)

    @property
    def num_logits(self) -> int:
        """Of a token, on one rank."""
        return padded_rows(self.shard, self.vocab_size)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def max_len(self) -> int:
        """Tokens the checkpoint allows."""
        return min(rope.max_len for rope in self.ropes.values())

    @property
    def attention(self) -> AttentionSpec | LatentSpec:
        """Of all layers, but for what differs between layers: their K and V lie in pages of one shape."""
        return self.layers[0].attention

    @property
    def sliding_windows(self) -> tuple[int | None, ...]:
        """[num_layers] tokens a layer attends to, itself included; None: all."""
        return tuple(layer.attention.sliding_window for layer in self.layers)


def read_architecture(folder: Path) -> Architecture:
    """Reads and checks `folder`/config.json.

    Raises:
        EngineError: the file is missing or broken, or asks for something that is not supported; the sentence names it.
    """
    content = read_json(folder / _CONFIG)
    return architecture_of(folder, content, _family_of(checked(ConfigKind, content, _CONFIG)))


def architecture_of(folder: Path, content: dict[str, Any], family: Family) -> Architecture:
    """As `read_architecture`, of a config.json whose family is known."""
    kind = checked(ConfigKind, content, _CONFIG)
    if family.has_other_parts:
        part = language_part(content, tied_head=family.tied_head, may_be_flat=family.may_be_flat)
    else:
        part = content
    file = checked(family.config, part, _CONFIG)
    config = _transformers_config(family, file)
    _check_options(family, config)
    layers, quantization = family.layers(config), _quantization(folder, content, kind, family)
    _refuse_quantised_experts(layers, quantization)
    return Architecture(
        name=family.architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=layers,
        ends=family.ends(config),
        tied_head=bool(config.tie_word_embeddings),
        ropes=_ropes(family, config),
        dtype=_dtype_name(file, "bfloat16" if quantization is not None and quantization.name == MXFP4 else "float32"),
        initializer_range=config.initializer_range,
        eos_ids=token_ids(config.eos_token_id),
        bos_id=config.bos_token_id,
        quantization=quantization,
        renames=family.renames,
        unread=family.unread,
        mtp=family.mtp if getattr(file, "num_nextn_predict_layers", None) else None,
    )


def _quantization(folder: Path, content: Mapping[str, Any], kind: ConfigKind, family: Family) -> Quantization | None:
    """Of the whole, or of its language part."""
    part = content.get("text_config") if family.has_other_parts else None
    own = part.get("quantization_config") if isinstance(part, Mapping) else None
    if kind.compression_config and not kind.quantization_config:
        found = read_quantization(folder, kind.compression_config, "compression_config")
    else:
        found = read_quantization(folder, kind.quantization_config or (own if isinstance(own, Mapping) else None))
    return None if found is None else replace(found, renames=family.renames)


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """An eos_token_id entry, which may be one id, several or none."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _family_of(file: ConfigKind) -> Family:
    if not file.architectures:
        raise EngineError(f"config.json: architectures is missing; supported: {', '.join(FAMILIES)}")
    name = file.architectures[0]
    # Qwen3Model: the same without a head
    family = FAMILIES.get(name) or FAMILIES.get(f"{name.removesuffix('Model')}ForCausalLM")
    if family is None:
        raise EngineError(f"architecture {name[:80]} is not supported; supported: {', '.join(FAMILIES)}")
    if file.model_type not in (None, family.model_type, *family.also_called):
        raise EngineError(
            f"config.json: model_type is {str(file.model_type)[:80]}, but architectures says {name}, which is of "
            f"model_type {family.model_type}"
        )
    return family


def _transformers_config(family: Family, file: ConfigFile) -> PreTrainedConfig:
    """transformers' config of what the file says, with the defaults of the rest."""
    model_type = family.config_type or family.model_type
    if family.has_other_parts:
        model_type = file.model_type or family.text_model_types[0]
        if model_type not in family.text_model_types:
            supported = ", ".join(family.text_model_types)
            raise EngineError(
                f"text_config: model_type: {model_type[:80]} is not supported for {family.architecture}; "
                f"supported: {supported}"
            )
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type](**file.for_transformers())
    except Exception as error:  # transformers raises what it likes for a bad value, and its own checks wrap the reason
        raise EngineError(f"config.json: {reason_of(error.__cause__ or error)}") from None
    return config


def _ropes(family: Family, config: PreTrainedConfig) -> dict[str, Rope]:
    """The rotary positions of a checkpoint: one kind for all layers, or one for each type of them."""
    parameters = config.rope_parameters or {}
    kinds = {name: entry for name, entry in parameters.items() if isinstance(entry, Mapping)} or {
        ALL_LAYERS: parameters
    }
    if ALL_LAYERS not in kinds and not family.ropes_by_layer_type:
        raise EngineError(
            f"rope_parameters: different positions for different layers are not supported for {family.architecture}"
        )
    ropes = {}
    for name, entry in kinds.items():
        if entry.get("rope_type") not in ROPE_TYPES:
            raise EngineError(
                f"rope_type: {entry.get('rope_type')} is not supported; supported: {', '.join(ROPE_TYPES)}"
            )
        head_dim, partial = head_dim_of(config), entry.get("partial_rotary_factor") or 1.0
        if partial != 1 and not family.partial_rotary:
            raise EngineError(
                f"partial_rotary_factor: {partial} is not supported for {family.architecture}; supported: 1.0"
            )
        rotary_dim = int(head_dim * partial)
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise EngineError(
                f"partial_rotary_factor: {partial} of a head of {head_dim} numbers is {rotary_dim}; an even "
                f"number of 2 to {head_dim} is needed"
            )
        ropes[name] = Rope(
            dict(entry), config.max_position_embeddings, rotary_dim, config, "" if name == ALL_LAYERS else name
        )
    return ropes


def _check_options(family: Family, config: PreTrainedConfig) -> None:
    """Refuses, by name, what the decoder does not compute."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise EngineError(
            f"num_attention_heads: {config.num_attention_heads} is not a multiple of num_key_value_heads "
            f"({config.num_key_value_heads})"
        )
    head_dim = head_dim_of(config)
    if head_dim % 2 or not head_dim:
        raise EngineError(f"head_dim: {head_dim} is not supported, rotary positions need an even one")
    value_dim = getattr(config, "v_head_dim", None)
    if value_dim not in (None, head_dim) and not family.keeps_latents:
        raise EngineError(f"v_head_dim: {value_dim} is not supported; supported: {head_dim}, as keys and queries have")
    _check_layer_types(config)


def _check_layer_types(config: PreTrainedConfig) -> None:
    layer_types = getattr(config, "layer_types", None)
    # qwen2_moe's says 0 for none
    if getattr(config, "sliding_window", None) == 0 and (layer_types is None or "sliding_attention" in layer_types):
        raise EngineError("sliding_window: 0 tokens are nothing to attend to; null means all")
    if layer_types is None:
        return
    for layer_type in layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise EngineError(
                f"layer_types: {layer_type} is not supported; supported: full_attention, sliding_attention"
            )
    if len(layer_types) != config.num_hidden_layers:
        raise EngineError(f"layer_types: {len(layer_types)} entries for {config.num_hidden_layers} layers")


def _refuse_quantised_experts(layers: Sequence[LayerSpec], quantization: Quantization | None) -> None:
    """
    Raises:
        EngineError: experts are stored in a format that is not read.
    """
    for moe in (layer.mlp for layer in layers if isinstance(layer.mlp, MoeSpec)):
        if quantization is not None and (quantization.name == MXFP4) != moe.together:
            supported = MXFP4 if moe.together else f"every other method; {MXFP4} is read as gpt-oss has it"
            raise EngineError(
                f"quantization_config: {quantization.name} is not supported for experts that are stored like "
                f"these; supported: {supported}"
            )


def _dtype_name(file: ConfigFile, default: str) -> str:
    name = (file.dtype or file.torch_dtype or default).removeprefix("torch.")
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise EngineError(f"config.json: dtype: {name[:80]} is no type of torch's")
    return name if name in ("float32", "bfloat16", "float16") else "float32"
