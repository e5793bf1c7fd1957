"""The checkpoint of a model that makes drafts: what it must have in common with the target's, checked before any
weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError, reason_of
from paged_backend.models.architecture import Architecture, read_architecture
from paged_backend.models.eagle3 import Eagle3, allocate_eagle3, is_eagle3, read_eagle3
from paged_backend.models.mtp import MTP_LAYER, allocate_mtp, mtp_architecture
from paged_backend.models.rope import check_rope
from paged_backend.models.weight_files import find_tensors
from paged_backend.models.weights import allocate_weights, settle_weights

_TOKENIZER = "tokenizer.json"
HEAD_FOLDER = "draft_head"
"""Where a checkpoint's folder may have an EAGLE-3 head for it, which then needs no name."""

Kind = Literal["draft", "mtp", "eagle3"]


@dataclass(frozen=True)
class ProposerCheckpoint:
    """Where a proposer's weights lie, and what its layers are."""

    kind: Kind
    folder: Path
    architecture: Architecture
    warning: str = ""  # a sentence for the operator
    eagle: Eagle3 | None = None  # of an EAGLE-3 head


def open_proposer(config: EngineConfig, target: Architecture, target_folder: Path) -> ProposerCheckpoint | None:
    """What `config.speculation` guesses with; None: no model.

    Raises:
        EngineError: there is no such checkpoint, or it is none that can be computed, or has another vocabulary than the
            target.
    """
    if config.speculation == "draft":
        return _open_other_model(config, target, target_folder)
    if config.speculation == "mtp":
        return _open_mtp(config, target, target_folder)
    if config.speculation == "eagle3":
        return _open_eagle3(config, target, _head_folder(config, target_folder))
    if config.speculation == "auto":
        return _open_best(config, target, target_folder)
    return None


def _open_best(config: EngineConfig, target: Architecture, target_folder: Path) -> ProposerCheckpoint | None:
    """What is asked for, or comes with the target and can be computed."""
    if config.draft_model:
        if is_eagle3(_folder(config)):
            return _open_eagle3(config, target, _folder(config))
        return _open_other_model(config, target, target_folder)
    if config.tensor_parallel_size > 1:
        return None
    if is_eagle3(target_folder / HEAD_FOLDER):
        return _open_eagle3(config, target, target_folder / HEAD_FOLDER)
    try:
        return _open_mtp(config, target, target_folder)
    except EngineError:  # there is none, or none that can be served
        return None


def _open_eagle3(config: EngineConfig, target: Architecture, folder: Path) -> ProposerCheckpoint:
    try:
        architecture, eagle = read_eagle3(folder, target)
        _check_ropes(architecture)
        if config.load_format == "auto":
            stored = find_tensors(folder)
            allocate_eagle3(architecture, eagle, stored, torch.float32, torch.device("meta")).check(folder)
    except EngineError as error:
        raise EngineError(f"{'draft_model' if config.draft_model else HEAD_FOLDER}: {error}") from None
    return ProposerCheckpoint("eagle3", folder, architecture, eagle=eagle)


def _head_folder(config: EngineConfig, target_folder: Path) -> Path:
    if config.draft_model:
        return _folder(config)
    folder = target_folder / HEAD_FOLDER
    if not folder.is_dir():
        raise EngineError(
            f"draft_model: is empty, and the model's folder has no {HEAD_FOLDER}; speculation=eagle3 needs a head"
        )
    return folder


def _folder(config: EngineConfig) -> Path:
    folder = Path(config.draft_model).expanduser()
    if not folder.is_dir():
        raise EngineError(f"draft_model: no folder {config.draft_model}")
    return folder


def _open_mtp(config: EngineConfig, target: Architecture, folder: Path) -> ProposerCheckpoint:
    architecture = mtp_architecture(target, folder, by_name=config.load_format == "auto")
    if config.load_format == "auto":
        try:
            architecture, _ = settle_weights(architecture, folder)
            decoder = allocate_weights(architecture, torch.float32, torch.device("meta"))
            allocate_mtp(decoder, architecture).check(folder)
        except EngineError as error:  # by the layer's name in the files
            assert target.mtp is not None
            sentence = str(error).replace(MTP_LAYER, target.mtp.place.format(num_layers=target.num_layers))
            raise EngineError(f"speculation: mtp: {sentence}") from None
    return ProposerCheckpoint("mtp", folder, architecture)


def _open_other_model(config: EngineConfig, target: Architecture, target_folder: Path) -> ProposerCheckpoint:
    folder = _folder(config)
    try:
        architecture = read_architecture(folder)
        _check_ropes(architecture)
        warning = ""
        if config.load_format == "auto":
            architecture, warning = settle_weights(architecture, folder)
    except EngineError as error:
        raise EngineError(f"draft_model: {error}") from None
    if not architecture.has_head:
        raise EngineError("draft_model: the checkpoint has no head, it makes embeddings and no text")
    _check_vocabulary(architecture, target, folder, target_folder)
    return ProposerCheckpoint("draft", folder, architecture, warning)


def _check_ropes(architecture: Architecture) -> None:
    for rope in architecture.ropes.values():
        check_rope(rope)


def _check_vocabulary(architecture: Architecture, target: Architecture, folder: Path, target_folder: Path) -> None:
    """The same ids for the same tokens. Models of one vocabulary may be padded to several sizes; their tokenizers tell.

    Raises:
        EngineError: ids differ, or sizes do and there are no tokenizers to tell.
    """
    sizes = architecture.vocab_size, target.vocab_size
    paths = folder / _TOKENIZER, target_folder / _TOKENIZER
    if not all(path.is_file() for path in paths):
        if sizes[0] != sizes[1]:
            raise EngineError(
                f"draft_model: vocab_size {sizes[0]} is not the model's ({sizes[1]}), and without a {_TOKENIZER} of "
                "both nothing says that their ids mean the same"
            )
        return
    own, others = (_tokens(path) for path in paths)
    if own != others:
        token = min(own.items() ^ others.items(), key=lambda entry: (entry[1], entry[0]))[0]
        raise EngineError(
            f"draft_model: its tokenizer is not the model's: token {token[:80]!r} has id {own.get(token, 'none')} "
            f"there and {others.get(token, 'none')} here"
        )


def _tokens(path: Path) -> dict[str, int]:
    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing narrower
        raise EngineError(f"draft_model: {path} is broken: {reason_of(error)}") from None
