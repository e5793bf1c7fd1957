"""A model's parameters: plain tensors, allocated packed and filled straight from safetensors files (or at random, for benchmarks)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paged_backend.errors import EngineError
from paged_backend.models.architecture import Architecture
from paged_backend.models.upload import Uploads
from paged_backend.units import spell_bytes

Progress = Callable[[str], None]

_FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # safetensors' names of the types that can be loaded, and their bytes
_PROGRESS_SECONDS = 1.0


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Weights are [out, in], as torch's linear wants them; None where the architecture has none."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [(num_heads + 2 num_kv_heads) head_dim, hidden]: q, k, v
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    out: Tensor  # [hidden, num_heads head_dim]
    out_bias: Tensor | None
    post_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 intermediate, hidden]: gate, up
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden, intermediate]
    down_bias: Tensor | None


@dataclass(frozen=True)
class Weights:
    embedding: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]; the embedding itself if tied

    @property
    def num_bytes(self) -> int:
        tensors = [self.embedding, self.final_norm, *(tensor for layer in self.layers for tensor in _tensors(layer))]
        if self.head is not self.embedding:
            tensors.append(self.head)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def allocate_weights(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> Weights:
    """Uninitialised parameters.

    Raises:
        EngineError: the device has no room for them.
    """
    a = architecture

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def optional(wanted: bool, *shape: int) -> Tensor | None:
        return empty(*shape) if wanted else None

    q_size, qkv_size = a.num_heads * a.head_dim, (a.num_heads + 2 * a.num_kv_heads) * a.head_dim

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=empty(a.hidden_size),
            qkv=empty(qkv_size, a.hidden_size),
            qkv_bias=optional(a.qkv_bias, qkv_size),
            q_norm=optional(a.qk_norm, a.head_dim),
            k_norm=optional(a.qk_norm, a.head_dim),
            out=empty(a.hidden_size, q_size),
            out_bias=optional(a.out_bias, a.hidden_size),
            post_norm=empty(a.hidden_size),
            gate_up=empty(2 * a.intermediate_size, a.hidden_size),
            gate_up_bias=optional(a.mlp_bias, 2 * a.intermediate_size),
            down=empty(a.hidden_size, a.intermediate_size),
            down_bias=optional(a.mlp_bias, a.hidden_size),
        )

    try:
        embedding = empty(a.vocab_size, a.hidden_size)
        layers = tuple(layer() for _ in range(a.num_layers))
        return Weights(embedding, layers, empty(a.hidden_size), embedding if a.tied_head else empty(a.vocab_size, a.hidden_size))
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise EngineError(f"the weights do not fit into the memory of {device}: {str(error).splitlines()[0]}") from None


def load_weights(weights: Weights, architecture: Architecture, folder: Path, progress: Progress) -> str:
    """Fills `weights` from `folder`'s safetensors; `progress` hears of it at most once a second. Returns a sentence on what was loaded.

    Raises:
        EngineError: a file or a tensor is missing, broken, of another shape or of a type that is not float.
    """
    targets = _targets(weights, architecture)
    started, reported = time.monotonic(), time.monotonic()
    total = sum(target.numel() for target in targets.values())
    missing, ignored, loaded = dict.fromkeys(targets), [], 0
    with Uploads(weights.embedding.device) as uploads:
        for name, tensor in _read_files(folder, targets):
            if tensor is None:
                ignored.append(name)
                continue
            uploads.put(targets[name], tensor)
            missing.pop(name, None)
            loaded += tensor.numel()
            if time.monotonic() - reported >= _PROGRESS_SECONDS:
                reported = time.monotonic()
                scale = weights.num_bytes / total / 1e9
                progress(f"loading weights {100 * loaded // total} % ({loaded * scale:.1f} of {total * scale:.1f} GB)")
    if missing:
        raise EngineError(f"checkpoint: tensor {next(iter(missing))} is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""))
    note = f"; ignored {len(ignored)} tensors that the model has no use for ({', '.join(ignored[:3])}{', …' if len(ignored) > 3 else ''})" if ignored else ""
    return f"weights: {spell_bytes(weights.num_bytes)} loaded in {time.monotonic() - started:.1f} s{note}"


def randomise_weights(weights: Weights, architecture: Architecture, seed: int) -> str:
    """Fills `weights` with seeded noise of the checkpoint's initializer_range, norms with 1. Returns a sentence that says so."""
    generator = torch.Generator(weights.embedding.device).manual_seed(seed)
    for name, target in _targets(weights, architecture).items():
        if name.endswith("norm.weight"):
            target.fill_(1)
        else:
            target.normal_(0, architecture.initializer_range, generator=generator)
    return f"weights: {spell_bytes(weights.num_bytes)} of random numbers (load_format=dummy)"


def _targets(weights: Weights, architecture: Architecture) -> dict[str, Tensor]:
    """Checkpoint name -> the tensor, or the rows of a packed one, that it fills."""
    targets = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.final_norm}
    if weights.head is not weights.embedding:
        targets["lm_head.weight"] = weights.head
    q_size, kv_size = architecture.num_heads * architecture.head_dim, architecture.num_kv_heads * architecture.head_dim
    for index, layer in enumerate(weights.layers):
        whole: dict[str, Tensor | None] = {
            "input_layernorm.weight": layer.input_norm,
            "post_attention_layernorm.weight": layer.post_norm,
            "self_attn.q_norm.weight": layer.q_norm,
            "self_attn.k_norm.weight": layer.k_norm,
            "self_attn.o_proj.weight": layer.out,
            "self_attn.o_proj.bias": layer.out_bias,
            "mlp.down_proj.weight": layer.down,
            "mlp.down_proj.bias": layer.down_bias,
        }
        for kind, qkv, gate_up in (("weight", layer.qkv, layer.gate_up), ("bias", layer.qkv_bias, layer.gate_up_bias)):
            if qkv is not None:
                parts = torch.split(qkv, [q_size, kv_size, kv_size])
                whole |= {f"self_attn.{letter}_proj.{kind}": part for letter, part in zip("qkv", parts, strict=True)}
            if gate_up is not None:
                whole |= {f"mlp.{side}_proj.{kind}": part for side, part in zip(("gate", "up"), gate_up.chunk(2), strict=True)}
        targets |= {f"model.layers.{index}.{name}": target for name, target in whole.items() if target is not None}
    return targets


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
        raise EngineError("checkpoint: weights are pickled (.bin), which can run code when loaded; convert them to safetensors")
    raise EngineError(f"checkpoint: {folder} has no model.safetensors and no model.safetensors.index.json")


def _read_files(folder: Path, targets: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor | None]]:
    for path in _weight_files(folder):
        yield from _read_file(path, targets)


def _read_file(path: Path, targets: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor | None]]:
    """(name, tensor) of each tensor in a file, in the file's order; None for those without a target, which are not read."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                target = targets.get(name)
                if target is None:
                    yield name, None
                    continue
                view = file.get_slice(name)
                shape, kind = list(view.get_shape()), view.get_dtype()
                if shape != list(target.shape):
                    raise EngineError(f"checkpoint: tensor {name} has shape {shape}, config.json implies {list(target.shape)}")
                if kind not in _FLOATS:
                    raise EngineError(f"checkpoint: tensor {name} is of type {kind}; supported: {', '.join(_FLOATS)}")
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise EngineError(f"checkpoint: {path.name} is broken: {str(error).splitlines()[0]}") from None


def _tensors(layer: LayerWeights) -> list[Tensor]:
    values = [getattr(layer, field.name) for field in fields(layer)]
    return [value for value in values if value is not None]
