"""The quantised modules of a model: what they need of a checkpoint, and their way into the linears that they are packed
in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paged_backend.errors import EngineError
from paged_backend.models.layer_spec import AdapterSite
from paged_backend.models.quantization.float4 import in_order
from paged_backend.models.quantization.float8 import has_nan
from paged_backend.models.quantization.quantization import Quantization
from paged_backend.models.quantization.scheme import FLOATS, Scheme, StoredKind
from paged_backend.models.shard import OUT, Cut, in_groups
from paged_backend.models.weight_files import StoredTensor
from paged_kernels.codes import dequantise, quantise, store_nibbles, stored_nibbles
from paged_kernels.experts import ExpertLinear
from paged_kernels.linear import Linear
from paged_kernels.words import fill_words

_DUMMY_SCALE = 2.0**-6  # of random numbers in mxfp4
_NOT_A_NUMBER = 255  # as an exponent
_ROWS = 1  # dimension of the matrices of all experts, [experts, out, in]


@dataclass(frozen=True)
class QuantisedModule:
    """Rows of a linear that come from the tensors of one module."""

    name: str  # in the checkpoint
    scheme: Scheme
    linear: Linear
    begin: int  # its first row there
    num_rows: int
    cut: Cut | None = None  # what this rank has of it, if not all

    @property
    def words(self) -> str:
        """How it is stored."""
        return self.scheme.words

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the whole module."""
        if self.cut is None:
            return self.num_rows, self.linear.num_columns
        return (self.cut.whole, self.linear.num_columns) if self.cut.dim == OUT else (self.num_rows, self.cut.whole)

    @property
    def stored(self) -> dict[str, StoredKind]:
        """Name in the checkpoint -> what must be there."""
        return {f"{self.name}.{ending}": kind for ending, kind in self.scheme.stored(*self.shape).items()}

    @property
    def cuts(self) -> Mapping[str, Cut]:
        """None: it is read whole, and its part is taken of what it means."""
        return {}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """tensors: by their names in the checkpoint, on the linear's device.

        Raises:
            EngineError: numbers that cannot be used; the sentence names the tensor.
        """
        for name, kind in self.stored.items():
            if name in tensors:
                _check_numbers(name, kind, tensors[name])
        stored = {name[len(self.name) + 1 :]: tensor for name, tensor in tensors.items()}
        try:
            if self._rounds_its_part:
                parts = [self._rounded(stored)]
            else:
                parts = self._own(self.scheme.read(stored, *self.shape))
        except ValueError as error:
            raise EngineError(f"checkpoint: tensor {self.name}.{error}") from None
        begin = self.begin
        for part in parts:
            self._place(part, begin)
            begin += part.num_rows

    def fill_at_random(self, deviation: float, generator: torch.Generator) -> None:
        """With normally distributed numbers, rounded as the format has it."""
        weight = torch.empty(self.num_rows, self.linear.num_columns, device=self.linear.weight.device).normal_(
            0, deviation, generator=generator
        )
        part = quantise(weight, self.scheme.format(self.linear.num_columns))
        if part.input_scale is not None:
            part.input_scale.fill_(0.05)
        self._place(part, self.begin)

    @property
    def _rounds_its_part(self) -> bool:
        """Whether this rank's part is floats in other groups than the whole would be in: then it is rounded alone."""
        formats = (self.scheme.format(columns) for columns in (self.shape[1], self.linear.num_columns))
        return self.scheme.rounds and len({format.block for format in formats}) > 1

    def _rounded(self, stored: Mapping[str, Tensor]) -> Linear:
        assert self.cut is not None
        own = {name: self.cut.of(tensor) for name, tensor in stored.items()}
        return self.scheme.read(own, self.num_rows, self.linear.num_columns)

    def _own(self, whole: Linear) -> list[Linear]:
        """This rank's part of a module, stretch by stretch.

        Raises:
            EngineError: it would begin or end inside of a group that shares a scale.
        """
        if self.cut is None:
            return [whole]
        group = self.scheme.format(self.linear.num_columns).block[1]
        if whole.format.block[1] != group:
            raise EngineError(
                f"tensor_parallel_size: {self.name} ({self.scheme.words}) has groups of {whole.format.block[1]} "
                f"columns, its parts of {group}"
            )
        block, cut = whole.format.block[0], self.cut
        try:
            for begin, end in cut.stretches if cut.dim == OUT else ():
                if begin % block:
                    raise ValueError(f"rows {begin} to {end} are not whole blocks of {block}")
            return [whole.rows(*part) if cut.dim == OUT else whole.columns(*part) for part in cut.stretches]
        except ValueError as error:
            raise EngineError(
                f"tensor_parallel_size: {self.name} ({self.scheme.words}) cannot be divided so: {error}"
            ) from None

    def _place(self, part: Linear, begin: int) -> None:
        """From row `begin` of the linear on."""
        target = self.linear.rows(begin, begin + part.num_rows)
        if target.format.codes == "plain":
            target.weight.copy_(dequantise(part))
        elif target.format.order != part.format.order:
            target.weight.copy_(store_nibbles(stored_nibbles(part), target.format))
        else:
            target.weight.copy_(part.weight)
        for into, numbers in ((target.scale, part.scale), (target.zero, part.zero)):
            if into is not None and numbers is not None:
                into.copy_(numbers.repeat_interleave(part.format.block[0] // target.format.block[0], 0)[: len(into)])
        if target.row_scale is not None and part.row_scale is not None:
            target.row_scale.copy_(part.row_scale)
        # of modules that share their input: the widest, as it was measured
        if target.input_scale is not None and part.input_scale is not None:
            target.input_scale.copy_(torch.maximum(target.input_scale, part.input_scale) if begin else part.input_scale)


@dataclass(frozen=True)
class StackedExperts:
    """A matrix of all experts of a layer, which the checkpoint has in one tensor of floats that is rounded while it is
    read, or in mxfp4 as gpt-oss is published: blocks of 16 bytes and a scale for each.
    """

    name: str  # in the checkpoint
    scheme: Scheme | None  # of each expert's matrix; None: mxfp4
    linear: ExpertLinear
    transposed: bool  # floats lie as [experts, in, out]
    cut: Cut | None = None  # what this rank has of the matrices [experts, out, in], if not all

    @property
    def words(self) -> str:
        """How it is stored."""
        return "mxfp4" if self.scheme is None else self.scheme.words

    @property
    def stored(self) -> dict[str, StoredKind]:
        """Name in the checkpoint -> what must be there."""
        count, rows, columns = self._whole_shape
        if self.scheme is not None:
            return {self.name: StoredKind(((count, columns, rows) if self.transposed else (count, rows, columns),))}
        groups = columns // self.linear.format.block[1]
        return {
            f"{self.name}_blocks": StoredKind(((count, rows, groups, 16),), ("U8",)),
            f"{self.name}_scales": StoredKind(((count, rows, groups),), ("U8",)),
        }

    @property
    def cuts(self) -> Mapping[str, Cut]:
        """The parts of the tensors that are read, by their names in the checkpoint."""
        if self.cut is None:
            return {}
        if self.scheme is not None:
            return {self.name: replace(self.cut, dim=3 - self.cut.dim) if self.transposed else self.cut}
        cut = self.cut if self.cut.dim == _ROWS else in_groups(self.cut, self.linear.format.block[1])
        return {f"{self.name}_blocks": cut, f"{self.name}_scales": cut}

    @property
    def _whole_shape(self) -> tuple[int, int, int]:
        count, rows, columns = len(self.linear.weight), self.linear.num_rows, self.linear.num_columns
        if self.cut is None:
            return count, rows, columns
        return (count, self.cut.whole, columns) if self.cut.dim == _ROWS else (count, rows, self.cut.whole)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """As `QuantisedModule.fill`, one expert after another. tensors: their parts, where there are `cuts`.

        Raises:
            EngineError: numbers that are not finite.
        """
        if self.scheme is None:
            self._fill_from_blocks(tensors[f"{self.name}_blocks"], tensors[f"{self.name}_scales"])
            return
        for expert, weight in enumerate(tensors[self.name]):
            matrix = weight.T if self.transposed else weight
            try:
                part = self.scheme.read({"weight": matrix}, *matrix.shape)
            except ValueError as error:
                raise EngineError(f"checkpoint: tensor {self.name}: expert {expert}: {error}") from None
            _copy(self.linear.of(expert), part)

    def fill_at_random(self, deviation: float, generator: torch.Generator) -> None:
        """As `QuantisedModule.fill_at_random`."""
        if self.scheme is None:
            assert self.linear.scale is not None and self.linear.row_scale is not None
            self.linear.weight.random_(generator=generator)
            self.linear.scale.zero_()
            self.linear.row_scale.fill_(_DUMMY_SCALE)
            return
        for expert in range(len(self.linear.weight)):
            target = self.linear.of(expert)
            weight = torch.empty(target.num_rows, target.num_columns, device=target.weight.device)
            _copy(target, quantise(weight.normal_(0, deviation, generator=generator), target.format))

    def _fill_from_blocks(self, blocks: Tensor, scales: Tensor) -> None:
        """A block's byte has two neighbours there; here numbers lie as words.py has them."""
        if bool((scales == _NOT_A_NUMBER).any()):
            raise EngineError(f"checkpoint: tensor {self.name}_scales holds numbers that are not finite (NaN)")
        for expert, (block, exponents) in enumerate(zip(blocks, scales, strict=True)):
            fill_words(self.linear.of(expert), in_order(block.flatten(1)), exponents)


Module = QuantisedModule | StackedExperts


def _copy(target: Linear, part: Linear) -> None:
    """Of one shape and one format, without the bias."""
    pairs = ((target.scale, part.scale), (target.zero, part.zero), (target.row_scale, part.row_scale))
    for into, numbers in ((target.weight, part.weight), *pairs):
        if into is not None and numbers is not None:
            into.copy_(numbers)


def modules_of(quantization: Quantization, linear: Linear, site: AdapterSite, prefix: str) -> Iterator[QuantisedModule]:
    """The modules of a linear that are quantised, in their order: all or none. prefix: of the site's names."""
    begin = 0
    for module, num_rows in zip(site.modules, site.out_sizes, strict=True):
        scheme = quantization.scheme_of(prefix + module)
        if scheme is not None:
            yield QuantisedModule(prefix + module, scheme, linear, begin, num_rows)
        begin += num_rows


def split_quantised(
    targets: Mapping[str, Tensor],
    modules: Sequence[Module],
    quantization: Quantization | None,
    cuts: Mapping[str, Cut],
) -> tuple[dict[str, Tensor], list[Module]]:
    """Targets that are filled as they are, and all quantised modules: `modules`, those of linears and packed experts,
    and matrices that a product cannot read in another format than the activations'. They are dequantised. Of floats
    that are rounded while they are read those stay as they are.
    """
    if quantization is None:
        return dict(targets), []
    plain: dict[str, Tensor] = {}
    found, of_linears = list(modules), {module.name for module in modules}
    for name, target in targets.items():
        module = name.removesuffix(".weight")
        scheme = None if quantization.online or module == name or target.dim() != 2 else quantization.scheme_of(module)
        if module in of_linears:
            continue
        if scheme is None or module.endswith("embed_tokens"):
            plain[name] = target
        else:
            found.append(QuantisedModule(module, scheme, Linear(target), 0, len(target), cuts.get(name)))
    return plain, found


def settle_quantization(quantization: Quantization, stored: Mapping[str, StoredTensor]) -> Quantization:
    """Takes from the files' headers what configs leave open: the type of integers' scales, and which modules are plain
    although no list says so.
    """
    kinds = (tensor.kind for name, tensor in stored.items() if name.endswith((".weight_scale", ".scales")))
    scale_dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(next(kinds, ""))
    floats = (
        ()
        if quantization.online
        else (name.removesuffix(".weight") for name, tensor in stored.items() if tensor.kind in FLOATS)
    )
    return replace(quantization, scale_dtype=scale_dtype, plain_modules=frozenset(floats))


def check_modules(stored: Mapping[str, StoredTensor], modules: Sequence[Module]) -> None:
    """
    Raises:
        EngineError: the checkpoint lacks a module's tensor, or has it in another shape or of another type.
    """
    for module in modules:
        for name, kind in module.stored.items():
            found = stored.get(name)
            if found is None:
                if kind.optional:
                    continue
                raise EngineError(
                    f"checkpoint: tensor {name} is missing; {module.name} is {module.words} by quantization_config"
                )
            if found.shape not in kind.shapes:
                wanted = " or ".join(str(list(shape)) for shape in kind.shapes)
                raise EngineError(
                    f"checkpoint: tensor {name} has shape {list(found.shape)}, config.json implies {wanted} "
                    f"({module.words})"
                )
            if found.kind not in kind.kinds:
                raise EngineError(
                    f"checkpoint: tensor {name} is of type {found.kind}; {module.words} is stored as "
                    f"{', '.join(kind.kinds)}"
                )


def _check_numbers(name: str, kind: StoredKind, tensor: Tensor) -> None:
    if not kind.is_scale:
        if tensor.dtype == torch.float8_e4m3fn and has_nan(tensor):
            raise EngineError(f"checkpoint: tensor {name} holds numbers that are not finite (NaN)")
        return
    least, greatest = torch.aminmax(tensor.float())
    if not bool(least.isfinite() & greatest.isfinite()):
        raise EngineError(f"checkpoint: tensor {name} holds scales that are not finite (NaN or infinity)")
    if float(least) < 0 or (float(least) == 0 and not kind.may_be_zero):
        raise EngineError(f"checkpoint: tensor {name} holds a scale of {float(least):g}, expected more than 0")
