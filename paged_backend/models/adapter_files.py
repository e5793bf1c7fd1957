"""An adapter's folder, as PEFT saves it (adapter_config.json, adapter_model.safetensors) -> one tensor, laid out for an
adapter slot. No pickle is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paged_backend.batch import AdapterPart
from paged_backend.errors import RequestError
from paged_backend.models.adapter_layout import AdapterLayout, PlacedSite
from paged_backend.models.shard import OUT
from paged_backend.models.weight_files import renamed

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 2**20
_FLOATS = ("F32", "F16", "BF16")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# PEFT's fields that change nothing of what a finished adapter computes, or are looked at below. Any other that is set
# is refused by name.
_UNDERSTOOD = frozenset(
    [
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "runtime_config",
    ]
    + ["r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"]
    + ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"]
    + ["loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"]
)
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")  # the others change the base model's weights


@dataclass(frozen=True)
class Adapter:
    """An adapter, ready to be copied into an adapter slot."""

    rank: int  # the largest of its modules'
    # [layout.size * rank] for each rank of the model; on the host, pinned if the adapter slots are on a GPU
    parts: tuple[Tensor, ...]
    version: str  # other if the files are others

    @property
    def packed(self) -> Tensor:
        """This process's, rank 0's."""
        return self.parts[0]

    def part_of(self, model_rank: int) -> AdapterPart:
        return AdapterPart(self.rank, self.parts[model_rank].view(torch.uint8).numpy().tobytes())


@dataclass(frozen=True)
class _Config:
    """What adapter_config.json says of the modules."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    by_root: bool  # rank-stabilised: scaled by the rank's square root
    # names of modules that every layer must have; none if the config gives them by a pattern, or not for all layers
    targets: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        return int(_patterned(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        rank, alpha = self.rank_of(module), float(_patterned(self.alpha_pattern, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def open_folder(root: Path, name: str) -> Path:
    """The folder of the adapter `name`, a plain name, in `root`.

    Raises:
        RequestError: there is none, or it or its files lie somewhere else.
    """
    root = root.resolve()
    try:
        folder = (root / name).resolve()
        found = folder.parent == root and folder.is_dir()
    except (OSError, ValueError):  # too long, links in circles, characters that the file system cannot spell
        found = False
    if not found:
        raise RequestError("this server has no such adapter")
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).resolve().is_relative_to(root):
            raise RequestError(f"{file} is a link out of the adapters' folder")
    return folder


def check_adapter(folder: Path, layout: AdapterLayout, max_rank: int) -> None:
    """Looks at everything but the numbers.

    Raises:
        RequestError: why it cannot be used.
    """
    config = _read_config(folder / _CONFIG, layout.projections)
    with _opened(folder) as file:
        _check_tensors(file, layout, config, max_rank)


def read_adapter(
    folder: Path,
    layout: AdapterLayout,
    max_rank: int,
    dtype: torch.dtype,
    pinned: bool,
    parts: Sequence[AdapterLayout] = (),
) -> Adapter:
    """layout: the whole model's. parts: of each rank, if several share it.

    Raises:
        RequestError: why it cannot be used.
    """
    config = _read_config(folder / _CONFIG, layout.projections)
    with _opened(folder) as file:
        version = _version(folder)
        found = _check_tensors(file, layout, config, max_rank)
        rank = max(config.rank_of(module) for module in found)
        packed = {
            part: torch.zeros(part.size * rank, dtype=dtype, pin_memory=pinned)
            for part in map(_Part, parts or [layout])
        }
        for module, names in found.items():
            a, b = file.get_tensor(names["A"]), file.get_tensor(names["B"]).float() * config.scaling_of(module)
            for part, memory in packed.items():
                _pack(memory, rank, *part.modules[module], *part.cut(module, a, b))
    if not all(bool(torch.isfinite(memory).all()) for memory in packed.values()):
        raise RequestError(f"{_WEIGHTS} holds numbers that are not finite in {str(dtype).removeprefix('torch.')}")
    return Adapter(rank, tuple(packed.values()), version)


class _Part:
    """A rank's share of an adapter."""

    def __init__(self, layout: AdapterLayout) -> None:
        self.size, self.modules, self._cuts = layout.size, layout.modules(), layout.cuts

    def cut(self, module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] -> those of this rank: it has rows of the product, or columns of what is
        multiplied.
        """
        cut = self._cuts.get(module)
        if cut is None:
            return a, b
        return (a, cut.of(b)) if cut.dim == OUT else (cut.of(a), b)


def _pack(packed: Tensor, rank: int, site: PlacedSite, index: int, a: Tensor, b: Tensor) -> None:
    """Puts A [r, in] and B [out, r], scaled, at their places; r may be less than the adapter's rank."""
    a_place, b_place = (rank * place for place in site.places(index))
    packed[a_place : a_place + rank * site.in_size].view(rank, -1)[: len(a)] = a
    packed[b_place : b_place + rank * len(b)].view(-1, rank)[:, : b.shape[1]] = b


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """The file of tensors."""
    if not (folder / _WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise RequestError(
            f"{_WEIGHTS} is missing"
            + ("; adapter_model.bin is pickled, which can run code when loaded: convert it" if pickled else "")
        )
    try:
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{_WEIGHTS} is broken: {type(error).__name__}") from None


def _check_tensors(file: Any, layout: AdapterLayout, config: _Config, max_rank: int) -> dict[str, dict[str, str]]:
    """Module -> names of its tensors A and B, all shapes and types checked; none is read."""
    modules = layout.modules()
    found: dict[str, dict[str, str]] = {}
    for name in file.keys():  # noqa: SIM118 - the file is no mapping
        match = _TENSOR.fullmatch(name)
        if ".experts." in name:
            raise RequestError(
                f"tensor {name[:200]} is an expert's: adapters of experts are not supported, those of attention are"
            )
        module = "" if match is None else renamed(match["module"], layout.renames)
        if match is None or module not in modules:
            supported = f"lora_A and lora_B of {', '.join(layout.projections)} in {layout.num_layers} layers"
            raise RequestError(f"tensor {name[:200]} is not supported; supported: {supported}")
        found.setdefault(module, {})[match["side"]] = name
    if not found:
        raise RequestError(f"{_WEIGHTS} holds no tensors")
    for module in modules:
        if module.rsplit(".", 1)[1] in config.targets and module not in found:
            raise RequestError(f"{module} is a target of {_CONFIG}, but has no tensors")
    for module, names in found.items():
        rank = config.rank_of(module)
        if not 1 <= rank <= max_rank:
            raise RequestError(f"{module} has rank {rank}, this server takes 1 to {max_rank} (max_lora_rank)")
        site, index = modules[module]
        for side, shape in (("A", [rank, site.in_size]), ("B", [site.out_sizes[index], rank])):
            if side not in names:
                raise RequestError(f"{module} has no lora_{side}")
            view = file.get_slice(names[side])
            if list(view.get_shape()) != shape:
                raise RequestError(
                    f"lora_{side} of {module} has shape {list(view.get_shape())}, expected {shape} for this "
                    f"model and rank {rank}"
                )
            if view.get_dtype() not in _FLOATS:
                raise RequestError(
                    f"lora_{side} of {module} is of type {view.get_dtype()}; supported: {', '.join(_FLOATS)}"
                )
    return found


def _read_config(path: Path, projections: tuple[str, ...]) -> _Config:
    given = _read_json(path)
    if given.get("peft_type") != "LORA":
        raise RequestError(f"{_CONFIG}: peft_type is {_shown(given.get('peft_type'))}; supported: LORA")
    for name, value in given.items():
        if name not in _UNDERSTOOD and value:
            raise RequestError(f"{_CONFIG}: {name[:80]} is not supported")
    if given.get("bias", "none") != "none":
        raise RequestError(f"{_CONFIG}: bias is {_shown(given['bias'])}; supported: none")
    if not any(
        given.get("init_lora_weights") is plain or given.get("init_lora_weights") == plain
        for plain in _PLAIN_BEGINNINGS
    ):
        raise RequestError(
            f"{_CONFIG}: init_lora_weights {_shown(given['init_lora_weights'])} changes the model's own weights, "
            "which is not supported"
        )
    targets = given.get("target_modules")
    unknown = (
        [target for target in targets if str(target).rsplit(".", 1)[-1] not in projections]
        if isinstance(targets, list)
        else []
    )
    if unknown:
        raise RequestError(
            f"{_CONFIG}: target module {_shown(unknown[0])} is not supported; supported: {', '.join(projections)}"
        )
    everywhere = (
        isinstance(targets, list) and given.get("layers_to_transform") is None and not given.get("exclude_modules")
    )
    try:
        return _Config(
            rank=int(given["r"]),
            alpha=float(given["lora_alpha"]),
            rank_pattern={
                re.compile(key).pattern: int(value) for key, value in (given.get("rank_pattern") or {}).items()
            },
            alpha_pattern={
                re.compile(key).pattern: float(value) for key, value in (given.get("alpha_pattern") or {}).items()
            },
            by_root=bool(given.get("use_rslora")),
            targets=tuple(target for target in targets or () if target in projections) if everywhere else (),
        )
    except (KeyError, TypeError, ValueError, AttributeError, re.error, OverflowError):
        raise RequestError(f"{_CONFIG}: expected numbers r and lora_alpha, and patterns of them") from None


def _patterned(patterns: Mapping[str, float], module: str, default: float) -> float:
    """As PEFT looks its patterns up: the first that fits a module's name or the end of it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise RequestError(f"{_CONFIG} is longer than {_MAX_CONFIG_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{_CONFIG} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{_CONFIG} is broken: {type(error).__name__}") from None
    if not isinstance(content, dict):
        raise RequestError(f"{_CONFIG} is broken: expected a JSON object")
    return content


def _version(folder: Path) -> str:
    stats = [(folder / file).stat() for file in (_CONFIG, _WEIGHTS)]
    return ".".join(f"{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_size:x}" for stat in stats)


def _shown(value: Any) -> str:
    return repr(value)[:80]
