"""Where a checkpoint lies and what its small files say: a folder here, or one fetched from the hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError, reason_of
from paged_backend.models.architecture import Architecture, read_architecture
from paged_backend.models.generation_config import GenerationConfig, find_stop_ids
from paged_backend.models.proposer_checkpoint import ProposerCheckpoint, open_proposer
from paged_backend.models.quantization.online import read_online
from paged_backend.models.quantization.quantization import Quantization
from paged_backend.models.rope import check_rope
from paged_backend.models.weights import settle_weights

_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "tokenizer*")
_WEIGHT_FILES = ("*.safetensors",)
_SECOND_COPIES = ["consolidated*", "original/*"]  # the same weights in Mistral's and in Meta's own format


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, and what of it does not lie in tensors."""

    folder: Path
    architecture: Architecture
    generation: GenerationConfig
    eos_ids: tuple[int, ...]  # an answer ends at each; without the tokenizer's own
    bos_id: int | None
    warnings: tuple[str, ...] = ()  # sentences for the operator
    proposer: ProposerCheckpoint | None = None  # of the model that makes drafts, if one does


def open_checkpoint(config: EngineConfig) -> Checkpoint:
    """Finds or fetches the checkpoint that `config.model` names and checks all that can be told without reading its
    weights.

    Raises:
        EngineError: there is none, or the decoder cannot run it.
    """
    folder = config.model_folder()
    if folder is None:
        folder = _fetch(config)
    architecture = read_architecture(folder)
    for rope in architecture.ropes.values():
        check_rope(rope)
    if config.quantization != "none":
        architecture = replace(architecture, quantization=_online(config.quantization, architecture.quantization))
    warning = ""
    if config.load_format == "auto":
        architecture, warning = settle_weights(architecture, folder)
    generation = GenerationConfig.read(folder)
    stops = find_stop_ids(architecture, generation, None)
    bos_id = architecture.bos_id if generation.bos_token_id is None else generation.bos_token_id
    proposer = open_proposer(config, architecture, folder)
    return Checkpoint(folder, architecture, generation, tuple(stops), bos_id, (warning,) if warning else (), proposer)


def _online(name: Literal["fp8", "int4"], found: Quantization | None) -> Quantization:
    if found is not None:
        raise EngineError(
            f"quantization: {name} is for checkpoints of floats, this one is quantised already ({found.name})"
        )
    return read_online(name)


def _fetch(config: EngineConfig) -> Path:
    """The hub's copy of `config.model`, from the local cache if it is there. With load_format=dummy no weights are
    fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_SMALL_FILES, *(_WEIGHT_FILES if config.load_format == "auto" else ())]
    if Path(config.model).is_file():
        raise EngineError(f"model: {config.model} is a file; a checkpoint is a folder")
    if config.model.startswith((".", "/", "~")):
        raise EngineError(f"model: no folder {config.model}")
    try:
        return Path(snapshot_download(config.model, allow_patterns=patterns, ignore_patterns=_SECOND_COPIES))
    except HFValidationError:
        raise EngineError(f"model: {config.model} is neither a folder nor a hub id") from None
    except LocalEntryNotFoundError as error:
        reason = reason_of(error.__cause__ or error)
        raise EngineError(f"model: {config.model} is no folder, and the hub cannot be reached ({reason})") from None
    except (HfHubHTTPError, OSError) as error:
        raise EngineError(
            f"model: {config.model} is no folder, and the hub did not give it: {reason_of(error)}"
        ) from None
