"""Where a checkpoint lies and what its small files say: a folder here, or one fetched from the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.architecture import Architecture, read_architecture, token_ids

_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "tokenizer*")
_WEIGHT_FILES = ("*.safetensors",)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, and what of it does not lie in tensors."""

    folder: Path
    architecture: Architecture
    eos_ids: tuple[int, ...]  # of generation_config.json, then those that only config.json names
    bos_id: int | None


def open_checkpoint(config: EngineConfig) -> Checkpoint:
    """Finds or fetches the checkpoint that `config.model` names and reads its configs.

    Raises:
        EngineError: there is none, or the decoder cannot run it.
    """
    folder = config.model_folder()
    if folder is None:
        folder = _fetch(config)
    architecture = read_architecture(folder)
    generation = _read_generation_config(folder)
    eos_ids = dict.fromkeys(token_ids(generation.get("eos_token_id")) + architecture.eos_ids)
    bos_id = generation.get("bos_token_id", architecture.bos_id)
    return Checkpoint(folder, architecture, tuple(eos_ids), bos_id)


def _fetch(config: EngineConfig) -> Path:
    """The hub's copy of `config.model`, from the local cache if it is there. With load_format=dummy no weights are fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_SMALL_FILES, *(_WEIGHT_FILES if config.load_format == "auto" else ())]
    if config.model.startswith((".", "/", "~")):
        raise EngineError(f"model: no folder {config.model}")
    try:
        return Path(snapshot_download(config.model, allow_patterns=patterns))
    except HFValidationError:
        raise EngineError(f"model: {config.model} is neither a folder nor a hub id") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise EngineError(f"model: {config.model} is no folder, and the hub did not give it: {reason[0] if reason else type(error).__name__}") from None


def _read_generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EngineError(f"generation_config.json: {error}") from None
    return content if isinstance(content, dict) else {}
