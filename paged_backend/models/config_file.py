"""The keys of a checkpoint's config.json that the decoder reads: their types and ranges, checked before anything is
made of them.

transformers' own config classes check some types and no ranges: a rope factor "4.0", a NaN or a thousand million layers
would fail later, somewhere else. Keys that nothing here reads may hold what they like.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from paged_backend.errors import EngineError, reason_of

MAX_VOCAB_SIZE = 2**24  # token ids beyond it are no vocabulary; the largest published ones have 262,144
_MAX_LAYERS = 4096
_MAX_SIZE = 2**20  # of hidden states and heads
MAX_POSITIONS = 2**31 - 1  # positions are int32 on the device
_MAX_EXPERTS = 1024  # of a layer; the largest published ones have 512
_MAX_EXPERTS_OF_TOKEN = 32  # the largest published ones have 10
_SPELLINGS = {"swish": "silu"}  # of one activation, as transformers' ACT2FN has them


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Size = Annotated[int, Field(ge=1, le=_MAX_SIZE)]
Length = Annotated[int, Field(ge=1, le=MAX_POSITIONS)]
TokenId = Annotated[int, Field(ge=-(2**31), le=MAX_POSITIONS)]  # some checkpoints say -1 for none
TokenIds = Annotated[list[TokenId], BeforeValidator(_as_list)]  # one id or several
MtpLayers = Annotated[int, Field(ge=0, le=64)] | None  # of multi-token prediction; the published ones have 1
Positive = Annotated[float, Field(gt=0)]
Experts = Annotated[int, Field(ge=1, le=_MAX_EXPERTS)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Activation = Annotated[str, AfterValidator(lambda name: _SPELLINGS.get(name, name))]


class RopeOptions(BaseModel):
    """`rope_parameters`, or `rope_scaling` of older checkpoints. A key that is not known here may change positions, so
    that it is refused, unlike others of config.json.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive = 10_000.0
    factor: Annotated[float, Field(gt=0, le=_MAX_SIZE)] | None = None
    original_max_position_embeddings: Annotated[Length, BeforeValidator(_whole)] | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    partial_rotary_factor: Positive | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None
    llama_4_scaling_beta: Annotated[float, Field(ge=0)] | None = None
    # without effect: a text's positions are the same on all axes of a picture's; and what was trained how
    mrope_section: list[int] | None = None
    mrope_interleaved: bool | None = None
    finetuned: bool | None = None
    full_attention: RopeOptions | None = None  # where types of layers have positions of their own
    sliding_attention: RopeOptions | None = None


class CheckedFile(BaseModel):
    """A JSON file of a checkpoint, of which only the declared keys count."""

    # an engine reads the file of one family: a validator of each would cost every start a tenth of a second
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, defer_build=True)


File = TypeVar("File", bound=CheckedFile)


def checked(kind: type[File], content: Mapping[str, Any], name: str) -> File:
    """
    Raises:
        EngineError: names the first wrong key of the file called `name`, what it may hold, and what it holds.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise EngineError(f"{name}: {place}: unknown, and may change what the model computes") from None
        wanted = first["msg"].replace("Input should be", "expected").replace(" or instance of RopeOptions", "")
        wanted = (
            wanted.replace("a valid dictionary", "an object")
            .replace("a valid integer", "a whole number")
            .replace("a valid ", "a ")
        )
        raise EngineError(f"{name}: {place}: {wanted}, got {_spelled(first['input'])}") from None


class ConfigKind(CheckedFile):
    """What kind of model a config.json describes: to be looked at first, for other kinds give the keys below other
    types.
    """

    architectures: list[str] | None = None
    model_type: str | None = None
    quantization_config: dict[str, Any] | None = None
    compression_config: dict[str, Any] | None = None  # the same in older files of compressed-tensors


class ConfigFile(ConfigKind):
    """A checkpoint's config.json. Which keys were given is `model_fields_set`; null is a value where transformers takes
    it.
    """

    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCAB_SIZE)] = 1
    hidden_size: Size = 1
    intermediate_size: Annotated[int, Field(ge=1, le=16 * _MAX_SIZE)] = 1
    num_hidden_layers: Annotated[int, Field(ge=1, le=_MAX_LAYERS)] = 1
    num_attention_heads: Size = 1
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    v_head_dim: Size | None = None  # of values, where it is another than that of keys and queries
    hidden_act: Activation = "silu"
    max_position_embeddings: Length = 1
    original_max_position_embeddings: Length | None = None
    rms_norm_eps: Fraction = 1e-6
    initializer_range: Fraction = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: Positive = 10_000.0
    rope_scaling: RopeOptions | None = None
    rope_parameters: RopeOptions | None = None
    partial_rotary_factor: Positive | None = None
    sliding_window: Annotated[int, Field(ge=0, le=MAX_POSITIONS)] | None = None
    use_sliding_window: bool = False
    max_window_layers: Annotated[int, Field(ge=0, le=MAX_POSITIONS)] = 1
    layer_types: Annotated[list[str], Field(max_length=_MAX_LAYERS)] | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenIds | None = None
    dtype: str | None = None
    torch_dtype: str | None = None

    def for_transformers(self) -> dict[str, Any]:
        """What was given, for the class of transformers that knows the defaults of the rest."""
        ours = {"architectures", "model_type", "quantization_config", "compression_config", "dtype", "torch_dtype"}
        return self.model_dump(exclude_unset=True, exclude=ours)


class ExpertsFile(ConfigFile):
    """Of a mixture of experts. Dense models' files have some of these keys, too, with 0 for none."""

    num_local_experts: Experts = 1
    num_experts: Experts = 1
    num_experts_per_tok: Annotated[int, Field(ge=1, le=_MAX_EXPERTS_OF_TOKEN)] = 1
    moe_intermediate_size: Size = 1
    norm_topk_prob: bool = False
    decoder_sparse_step: Annotated[int, Field(ge=1, le=_MAX_LAYERS)] = 1
    mlp_only_layers: Annotated[list[int], Field(max_length=_MAX_LAYERS)] | None = None


_BESIDE_PARTS = ("architectures", "bos_token_id", "eos_token_id", "dtype", "torch_dtype", "quantization_config")


def language_part(content: Mapping[str, Any], *, tied_head: bool, may_be_flat: bool = False) -> dict[str, Any]:
    """What a config.json of several parts (text, images, …) says of the language model: its text_config, and what is
    said of the whole.

    Whether the head is tied is said of the whole. tied_head: what holds where nothing is said; if False, text_config
    may tie it, too, all as transformers has it. may_be_flat: older files have no text_config, but its keys beside those
    of the other parts.

    Raises:
        EngineError: it has no text_config.
    """
    part = content.get("text_config")
    if part is None and may_be_flat:
        return {key: value for key, value in content.items() if key != "model_type"}
    if not isinstance(part, Mapping):
        raise EngineError(f"config.json: text_config: expected an object, got {_spelled(part)}")
    tied = content.get("tie_word_embeddings", tied_head)
    if tied is False and not tied_head:
        tied = part.get("tie_word_embeddings", False)
    return {key: content[key] for key in _BESIDE_PARTS if key in content} | dict(part) | {"tie_word_embeddings": tied}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        EngineError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{path.parent}: no {path.name}, so {_what_instead(path.parent)}") from None
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: {reason_of(error)}") from None
    except RecursionError:
        raise EngineError(f"{path}: the JSON is nested too deeply") from None
    if not isinstance(content, dict):
        raise EngineError(f"{path}: expected a JSON object")
    return content


def _what_instead(folder: Path) -> str:
    """What a folder without config.json is."""
    if (folder / "adapter_config.json").is_file():
        return "this is an adapter; its base model is served, with the adapter's folder in lora_directory"
    return "this is not a checkpoint"


def _spelled(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
