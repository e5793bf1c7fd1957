"""A model's parameters: plain tensors, allocated packed and filled straight from safetensors files (or at random, for
benchmarks).
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from paged_backend.errors import EngineError
from paged_backend.models.adapter_layout import AdapterLayout
from paged_backend.models.architecture import Architecture
from paged_backend.models.blocks.attention import Attention
from paged_backend.models.blocks.forward_pass import Allocate
from paged_backend.models.blocks.moe import MoeMlp
from paged_backend.models.blocks.residual import allocate_norm, norm_parameters
from paged_backend.models.decoder import Layer, Parameters
from paged_backend.models.layer_spec import AdapterSite
from paged_backend.models.quantization.modules import (
    Module,
    QuantisedModule,
    check_modules,
    modules_of,
    settle_quantization,
    split_quantised,
)
from paged_backend.models.quantization.quantization import Quantization
from paged_backend.models.shard import Cut
from paged_backend.models.upload import Uploads
from paged_backend.models.weight_files import (
    EMBEDDING,
    HEAD,
    INNER,
    OpenTensors,
    StoredTensor,
    check_tensors,
    find_tensors,
    is_headless,
    read_tensors,
    whole_names,
)
from paged_backend.units import spell_bytes
from paged_kernels.linear import Linear

Progress = Callable[[str], None]

_LAYERS = "model.layers."
_COMPARED_AT_ONCE = 2**24  # numbers
_PROGRESS_SECONDS = 1.0


@dataclass(frozen=True)
class Weights(Parameters):
    """A decoder's parameters, and how a checkpoint fills them."""

    # what of the vocabulary the embedding's and the head's first rows are; the others, if any, belong to no token
    vocabulary: Cut
    cuts: Mapping[str, Cut]  # of the tensors of the checkpoint that this rank has a part of, by name
    renames: Mapping[str, str]  # Architecture.renames
    unread: tuple[str, ...]  # Architecture.unread
    quantization: Quantization | None = None
    modules: tuple[QuantisedModule, ...] = ()  # of the linears, those that do not come as plain floats

    @property
    def num_bytes(self) -> int:
        tensors = [
            self.embedding,
            *norm_parameters("", self.final_norm).values(),
            *(tensor for layer in self.layers for tensor in layer.parameters().values()),
        ]
        if self.head.weight is not self.embedding:
            tensors.append(self.head.weight)
        for linear in (*self.linears, self.head):
            tensors += [
                scales
                for scales in (linear.scale, linear.zero, linear.row_scale, linear.input_scale)
                if scales is not None
            ]
        for experts in (experts for layer in self.layers for experts in layer.packed_experts):
            tensors += [tensor for tensor in experts.tensors if tensor is not experts.bias]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def attentions(self) -> dict[str, Attention]:
        """The blocks that keep K and V, by the beginnings of their tensors' names."""
        return {
            _layer_prefix(number): layer.attention
            for number, layer in enumerate(self.layers)
            if isinstance(layer.attention, Attention)
        }

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Of all layers, in the order of AdapterLayout.sites."""
        return tuple(linear for layer in self.layers for linear in layer.linears)


def allocate_weights(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> Weights:
    """Uninitialised parameters.

    Raises:
        EngineError: the device has no room for them, or their sizes do not allow what the checkpoint says of its
            quantisation.
    """
    a = architecture
    empty = Allocate(dtype, device, a.quantization)

    try:
        embedding = empty(a.num_logits, a.hidden_size)
        layers = tuple(
            Layer(spec, a.hidden_size, replace(empty, prefix=_layer_prefix(number)))
            for number, spec in enumerate(a.layers)
        )
        head = Linear(embedding) if a.tied_head else empty.linear(_head_site(a))
        final_norm = allocate_norm(a.ends.norm, a.hidden_size, empty)
        weights = Weights(embedding, layers, final_norm, head, a.ends, a.vocabulary, _cuts(a), a.renames, a.unread)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise EngineError(f"the weights do not fit into the memory of {device}: {str(error).splitlines()[0]}") from None
    if a.quantization is None:
        return weights
    return replace(weights, quantization=a.quantization, modules=tuple(_modules(weights, a, a.quantization)))


def _modules(weights: Weights, architecture: Architecture, quantization: Quantization) -> Iterator[QuantisedModule]:
    sites = AdapterLayout.of(architecture.layers, architecture.hidden_size).sites
    placed: list[tuple[Linear, AdapterSite, str]] = [
        (linear, site, _layer_prefix(site.layer)) for linear, site in zip(weights.linears, sites, strict=True)
    ]
    if not architecture.tied_head:
        placed.append((weights.head, _head_site(architecture), ""))
    for linear, site, prefix in placed:
        for module in modules_of(quantization, linear, site, prefix):
            yield replace(module, cut=weights.cuts.get(f"{module.name}.weight"))


def _layer_prefix(number: int) -> str:
    return f"{_LAYERS}{number}."


def _head_site(architecture: Architecture) -> AdapterSite:
    return AdapterSite(("lm_head",), architecture.hidden_size, (architecture.num_logits,))


def load_weights(weights: Weights, folder: Path, progress: Progress) -> str:
    """Fills `weights` from `folder`'s safetensors; `progress` hears of it at most once a second. Returns a sentence on
    what was loaded.

    Quantised modules are read one after another: beside the weights there is no more in memory than the tensors of one
    module, and its numbers in float32.

    Raises:
        EngineError: a file or a tensor is missing, broken, of another shape, of a type that is not float, or holds NaN
        or infinity; or a quantised module's scales are not positive.
    """
    stored = whole_names(find_tensors(folder, weights.renames))
    targets, modules = _filled(weights, stored)
    cuts = _cuts_in(weights, stored)
    check_tensors(stored, targets, cuts)
    check_modules(stored, modules)
    needed = {*targets, *(name for module in modules for name in module.stored if name in stored)}
    started = time.monotonic()
    tell = LoadingProgress(progress, sum(math.prod(stored[name].shape) for name in needed), weights.num_bytes)
    with Uploads(weights.embedding.device) as uploads:
        for name, tensor in read_tensors(stored, targets, cuts):
            uploads.put(targets[name], tensor)
            tell.add(tensor.numel())
    with OpenTensors(stored) as tensors:
        for module in modules:
            tell.add(_fill(module, tensors, stored, weights.embedding.device))
    _check_finite(targets)
    note = _of_the_rest([tensor.name for name, tensor in stored.items() if name not in needed], weights.unread)
    return f"weights: {spell_bytes(weights.num_bytes)} loaded in {time.monotonic() - started:.1f} s{note}"


@torch.inference_mode()
def _fill(module: Module, tensors: OpenTensors, stored: Collection[str], device: torch.device) -> int:
    """Fills a module from its tensors, which are gone afterwards. Returns how many numbers they had."""
    own = {name: tensors.read(name, module.cuts.get(name)).to(device) for name in module.stored if name in stored}
    module.fill(own)
    return sum(tensor.numel() for tensor in own.values())


def _of_the_rest(names: Sequence[str], unread: tuple[str, ...]) -> str:
    """What is said of tensors that were not loaded. unread: beginnings of the names of those that are for other inputs
    than text.
    """
    others = [name for name in names if name.startswith(unread)]
    ignored = [name for name in names if not name.startswith(unread)]
    note = (
        f"; ignored {len(ignored)} tensors that the model has no use for "
        f"({', '.join(ignored[:3])}{', …' if len(ignored) > 3 else ''})"
        if ignored
        else ""
    )
    if others:
        parts = ", ".join(
            sorted({name.partition(".")[0] for name in (other.removeprefix("model.") for other in others)})
        )
        note += f"; served as a model of text: {len(others)} tensors of {parts} are left unread"
    return note


class LoadingProgress:
    """Tells how much of a checkpoint's numbers is read, at most once a second."""

    def __init__(self, tell: Progress, total: int, num_bytes: int) -> None:
        """total: numbers in the files; num_bytes: what they become."""
        self._tell, self._total, self._scale = tell, total, num_bytes / max(total, 1) / 1e9
        self._loaded, self._last = 0, time.monotonic()

    def add(self, num_numbers: int) -> None:
        self._loaded += num_numbers
        if time.monotonic() - self._last >= _PROGRESS_SECONDS:
            self._last = time.monotonic()
            gigabytes = f"{self._loaded * self._scale:.1f} of {self._total * self._scale:.1f} GB"
            self._tell(f"loading weights {100 * self._loaded // self._total} % ({gigabytes})")


def settle_weights(architecture: Architecture, folder: Path) -> tuple[Architecture, str]:
    """Checks, by the headers of `folder`'s files, that they hold what the architecture needs, and whether its head is
    tied; reads no tensor but these two.

    Returns the architecture as the files have it, and a sentence on what differs from config.json, or "".
    A head that differs from the embedding is used although config.json ties them, as transformers does since 5.0: a
    fine-tuned head beside a flag that was never changed.

    Raises:
        EngineError: as `load_weights`, but for what only the numbers say.
    """
    stored = find_tensors(folder, architecture.renames)
    note = ""
    if is_headless(stored):
        architecture = replace(architecture, tied_head=True, has_head=False)
        if architecture.quantization is not None:  # its lists know the checkpoint's names
            renames = {**architecture.quantization.renames, "": INNER}
            architecture = replace(architecture, quantization=replace(architecture.quantization, renames=renames))
    stored = whole_names(stored)
    if architecture.tied_head and EMBEDDING in stored and HEAD in stored and not _equal(stored, EMBEDDING, HEAD):
        architecture = replace(architecture, tied_head=False)
        note = (
            f"warning: config.json ties {HEAD} to {EMBEDDING}, but the checkpoint has two that differ: each is "
            "used as it is"
        )
    if architecture.quantization is not None:
        architecture = replace(architecture, quantization=settle_quantization(architecture.quantization, stored))
    weights = allocate_weights(architecture, torch.float32, torch.device("meta"))
    targets, modules = _filled(weights, stored)
    check_modules(stored, modules)
    check_tensors(stored, targets)
    return architecture, note


def weight_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """What `allocate_weights` takes."""
    return allocate_weights(architecture, dtype, torch.device("meta")).num_bytes


def packs_experts(architecture: Architecture) -> bool:
    """Whether the experts, if the model has any, stay in the format that the checkpoint has, or that they are rounded
    to.
    """
    layers = allocate_weights(architecture, torch.float32, torch.device("meta")).layers
    return all(layer.packed_experts for layer in layers if isinstance(layer.mlp, MoeMlp))


def _equal(stored: Mapping[str, StoredTensor], *names: str) -> bool:
    first, second = (stored[name] for name in names)
    if (first.shape, first.kind) != (second.shape, second.kind):
        return False
    one, other = (tensor for _, tensor in sorted(read_tensors(stored, names), key=lambda pair: pair[0]))
    rows = max(1, _COMPARED_AT_ONCE // max(1, one[:1].numel()))  # the first rows of heads that differ differ
    return all(torch.equal(a, b) for a, b in zip(torch.split(one, rows), torch.split(other, rows), strict=True))


@torch.inference_mode()
def _check_finite(targets: Mapping[str, Tensor]) -> None:
    """One reduction a tensor without a copy of it, at the speed of the device's memory, and one wait for all of them
    together.

    The least and the greatest number of a tensor are NaN if any is; they are infinite if any is.
    """
    extremes = torch.stack([extreme.float() for target in targets.values() for extreme in torch.aminmax(target)]).view(
        -1, 2
    )
    finite = extremes.isfinite().all(1).tolist()
    wrong = [name for name, is_finite in zip(targets, finite, strict=True) if not is_finite]
    if wrong:
        more = f", and {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
        dtype = str(targets[wrong[0]].dtype).removeprefix("torch.")
        raise EngineError(
            f"checkpoint: tensor {wrong[0]}{more} holds numbers that are not finite (NaN or infinity) in {dtype}"
        )


def randomise_weights(weights: Weights, architecture: Architecture, seed: int) -> str:
    """Fills `weights` with seeded noise of the checkpoint's initializer_range, norms with 1. Returns a sentence that
    says so.
    """
    generator = torch.Generator(weights.embedding.device)
    targets, modules = _filled(weights, {})
    for name, target in targets.items():
        # what several ranks have whole is the same on all of them
        generator.manual_seed(seed ^ zlib.crc32(name.encode()))
        if name.endswith("norm.weight"):
            target.fill_(1)
        else:
            target.normal_(0, architecture.initializer_range, generator=generator)
    for module in modules:
        generator.manual_seed(seed ^ zlib.crc32(module.name.encode()))
        module.fill_at_random(architecture.initializer_range, generator)
    return f"weights: {spell_bytes(weights.num_bytes)} of random numbers (load_format=dummy)"


def _filled(weights: Weights, stored: Mapping[str, StoredTensor]) -> tuple[dict[str, Tensor], list[Module]]:
    """Targets that are filled as they are, and modules that fill the rest. stored: what the checkpoint has."""
    shapes, modules = _shapes_by_layer(stored), list[Module](weights.modules)
    for index, layer in enumerate(weights.layers):
        if layer.packed_experts and isinstance(layer.mlp, MoeMlp):
            for module in layer.mlp.modules(shapes.get(str(index), {})):
                cut = weights.cuts.get(f"{module.name}.weight")
                modules.append(replace(module, cut=cut) if isinstance(module, QuantisedModule) else module)
    return split_quantised(_targets(weights, stored), modules, weights.quantization, weights.cuts)


def _targets(weights: Weights, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Checkpoint name -> the tensor, or the rows of a packed one, that it fills. stored: what the checkpoint has."""
    num_tokens = weights.vocabulary.count
    targets = {EMBEDDING: weights.embedding[:num_tokens], **norm_parameters("model.norm", weights.final_norm)}
    if weights.head.weight is not weights.embedding:
        targets[HEAD] = weights.head.weight[:num_tokens]
    elif EMBEDDING not in stored and HEAD in stored:  # tied from the other end
        targets[HEAD] = targets.pop(EMBEDDING)
    shapes = _shapes_by_layer(stored)
    for index, layer in enumerate(weights.layers):
        targets |= {
            f"{_LAYERS}{index}.{name}": target for name, target in layer.parameters(shapes.get(str(index), {})).items()
        }
    return targets


def _cuts(architecture: Architecture) -> Mapping[str, Cut]:
    """Of the tensors of the checkpoint that a rank has a part of, by name; none for a model that one rank has whole.
    Those of experts that are stored together MoeMlp knows, once it is known how they lie.
    """
    if architecture.shard.size == 1:
        return {}
    cuts = dict.fromkeys((EMBEDDING, HEAD), architecture.vocabulary)
    for index, layer in enumerate(architecture.layers):
        cuts |= {f"{_layer_prefix(index)}{name}": cut for name, cut in layer.tensor_cuts().items()}
    return cuts


def _cuts_in(weights: Weights, stored: Mapping[str, StoredTensor]) -> Mapping[str, Cut]:
    """Weights.cuts, and those of experts that the checkpoint has together."""
    cuts, shapes = dict(weights.cuts), _shapes_by_layer(stored)
    for index, layer in enumerate(weights.layers):
        if isinstance(layer.mlp, MoeMlp):
            found = layer.mlp.cuts(shapes.get(str(index), {}))
            cuts |= {f"{_layer_prefix(index)}{name}": cut for name, cut in found.items()}
    return cuts


def _shapes_by_layer(stored: Mapping[str, StoredTensor]) -> dict[str, dict[str, Sequence[int]]]:
    """A layer's number -> names within it -> shapes."""
    found: dict[str, dict[str, Sequence[int]]] = {}
    for name, tensor in stored.items():
        if name.startswith(_LAYERS):
            index, _, rest = name.removeprefix(_LAYERS).partition(".")
            found.setdefault(index, {})[rest] = tensor.shape
    return found
