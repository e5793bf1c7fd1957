"""A checkpoint's safetensors files: what they hold is read from their headers, before a tensor is."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paged_backend.errors import EngineError, reason_of
from paged_backend.models.quantization.scheme import FLOATS
from paged_backend.models.shard import Cut

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INNER = "model."  # before the names of what is no head
_LFS_POINTER = b"version https://git-lfs.github.com"
_QUANTISED_ENDINGS = (".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    path: Path
    shape: tuple[int, ...]
    kind: str  # safetensors' name of its type
    name: str  # there


def find_tensors(folder: Path, renames: Mapping[str, str] = MappingProxyType({})) -> dict[str, StoredTensor]:
    """The tensors of model.safetensors, or of every file of model.safetensors.index.json, in the files' order.

    renames: beginnings of names there -> what they are called here; the first that fits counts.

    Raises:
        EngineError: a file is missing or broken, or weights come in another format.
    """
    stored: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - the file is no mapping
                    view = file.get_slice(name)
                    stored[renamed(name, renames)] = StoredTensor(path, tuple(view.get_shape()), view.get_dtype(), name)
        except (SafetensorError, OSError) as error:
            raise EngineError(f"checkpoint: {path.name} is broken: {_why_broken(path, error)}") from None
    return stored


def is_headless(stored: Collection[str]) -> bool:
    """Whether it is a checkpoint of the layers alone, as models of embeddings are published: its names are those of the
    inner model, which has no head.
    """
    return EMBEDDING.removeprefix(INNER) in stored and HEAD not in stored


def whole_names(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """By the names that a checkpoint with a head has, also of one without."""
    return {INNER + name: tensor for name, tensor in stored.items()} if is_headless(stored) else stored


def read_tensors(
    stored: Mapping[str, StoredTensor], wanted: Collection[str], cuts: Mapping[str, Cut] = MappingProxyType({})
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of those names, or their parts for which there are cuts, in the files' order. They are mapped: their
    bytes are read when they are used.

    Raises:
        EngineError: a file is broken.
    """
    for path in dict.fromkeys(tensor.path for tensor in stored.values()):
        try:
            with safe_open(path, framework="pt") as file:
                for name, tensor in stored.items():
                    if tensor.path == path and name in wanted:
                        yield (
                            name,
                            cuts[name].of(file.get_slice(tensor.name))
                            if name in cuts
                            else file.get_tensor(tensor.name),
                        )
        except (SafetensorError, OSError) as error:
            raise EngineError(f"checkpoint: {path.name} is broken: {reason_of(error)}") from None


class OpenTensors:
    """A context that reads tensors by name, in any order; files stay open in it."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored
        self._files: dict[Path, Any] = {}
        self._open = ExitStack()

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """It, or a part of it. It is mapped: its bytes are read when they are used.

        Raises:
            EngineError: its file is broken.
        """
        stored = self._stored[name]
        path = stored.path
        try:
            if path not in self._files:
                self._files[path] = self._open.enter_context(safe_open(path, framework="pt"))
            file = self._files[path]
            tensor: Tensor = file.get_tensor(stored.name) if cut is None else cut.of(file.get_slice(stored.name))
        except (SafetensorError, OSError) as error:
            raise EngineError(f"checkpoint: {path.name} is broken: {reason_of(error)}") from None
        return tensor

    def __enter__(self) -> OpenTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


def renamed(name: str, renames: Mapping[str, str]) -> str:
    """With the first beginning that fits replaced."""
    beginning = next((beginning for beginning in renames if name.startswith(beginning)), None)
    return name if beginning is None else renames[beginning] + name.removeprefix(beginning)


def check_tensors(
    stored: Mapping[str, StoredTensor], targets: Mapping[str, Tensor], cuts: Mapping[str, Cut] = MappingProxyType({})
) -> None:
    """
    cuts: of the targets that are filled from a part of their tensor.

    Raises:
        EngineError: the checkpoint lacks what a target, by its name, is filled from, or has it in another shape or of a
            type that is not float.
    """
    missing = [name for name in targets if name not in stored]
    if missing:
        quantised = next((name for name in stored if name.endswith(_QUANTISED_ENDINGS)), None)
        if quantised is not None:
            raise EngineError(
                f"checkpoint: tensor {missing[0]} is missing; there are quantised ones such as {quantised}, "
                "which config.json does not tell of"
            )
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        if len(missing) == len(targets):
            more += f"; there are others, such as {next(iter(stored))}" if stored else "; there are none"
        raise EngineError(f"checkpoint: tensor {missing[0]} is missing{more}")
    for name, target in targets.items():
        shape, kind = list(stored[name].shape), stored[name].kind
        implied = cuts[name].whole_shape(target) if name in cuts else list(target.shape)
        if shape != implied:
            raise EngineError(f"checkpoint: tensor {name} has shape {shape}, config.json implies {implied}")
        supported = ("U8",) if target.dtype == torch.uint8 else tuple(FLOATS)
        if kind not in supported:
            raise EngineError(f"checkpoint: tensor {name} is of type {kind}; supported: {', '.join(supported)}")


def _why_broken(path: Path, error: Exception) -> str:
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return "it is a pointer of Git LFS, not what it points to (git lfs pull)"
    return reason_of(error)


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or every file of model.safetensors.index.json."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({Path(name).name for name in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise EngineError(f"{index.name} is broken: expected a JSON object with a weight_map") from None
        for name in names:
            if not (folder / name).is_file():
                raise EngineError(f"checkpoint: {name} is named in {index.name} but missing")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise EngineError(
            "checkpoint: weights are pickled (.bin), which can run code when loaded; convert them to safetensors"
        )
    if any(folder.glob("consolidated*.safetensors")):
        raise EngineError(
            "checkpoint: its weights are in Mistral's own format (consolidated.safetensors); Hugging Face's is "
            "supported (model.safetensors)"
        )
    if any(folder.glob("*.gguf")):
        raise EngineError("checkpoint: its weights are in GGUF, which is not supported; supported: safetensors")
    raise EngineError(f"checkpoint: {folder} has no model.safetensors and no model.safetensors.index.json")
