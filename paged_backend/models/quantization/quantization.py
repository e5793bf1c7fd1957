"""What a model's quantisation is: for each module of its layers the scheme that it is stored by, or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from paged_backend.errors import EngineError
from paged_backend.models.quantization.scheme import Scheme
from paged_kernels.experts import MXFP4 as MXFP4_FORMAT
from paged_kernels.experts import reaches_experts
from paged_kernels.linear import PLAIN, Format, in_quads

MXFP4 = "mxfp4"  # the method of experts alone, which models/blocks/moe.py reads


@dataclass(frozen=True)
class Rule:
    """Modules whose names `matches` accepts are stored by `scheme`; None: as plain floats."""

    matches: Callable[[str], bool]
    scheme: Scheme | None


@dataclass(frozen=True)
class Quantization:
    """The first rule that accepts a module's name decides; a module that none accepts is plain.

    A module is a product of a layer, or lm_head. Embeddings and norms are never quantised.
    """

    name: str  # quant_method and what else names it, for the log and for errors
    rules: tuple[Rule, ...]
    online: bool = False  # the checkpoint's are floats, which are rounded while they are read
    dequantised: bool = False  # weights become floats when they are read: for devices that have no kernels for them
    has_fp8: bool = True  # the device's kernels read numbers of fp8; else weights that have any become floats
    rounds: bool = True  # activations are rounded as the format has it, also before a product with dequantised weights
    scale_dtype: torch.dtype | None = None  # of the scales of groups of 4- and 8-bit integers, as the files have them
    plain_modules: frozenset[str] = frozenset()  # that the files have as floats, whatever the rules say
    # beginnings of names in the checkpoint -> here (Architecture.renames); rules know the former
    renames: Mapping[str, str] = field(default_factory=dict)

    def scheme_of(self, module: str) -> Scheme | None:
        """module: its full name, such as model.layers.0.self_attn.q_proj."""
        if module in self.plain_modules:
            return None
        names = [
            module,
            *(theirs + module.removeprefix(ours) for theirs, ours in self.renames.items() if module.startswith(ours)),
        ]
        return next((rule.scheme for rule in self.rules if any(rule.matches(name) for name in names)), None)

    def group_of(self, module: str) -> int:
        """So many rows, and so many columns, of a stored module share scales: no rank has a part of such a group. 1
        where a row has one scale, and where floats are rounded while they are read, each part in groups of its own.
        """
        if self.name == MXFP4:
            return MXFP4_FORMAT.block[1]
        scheme = self.scheme_of(module)
        if scheme is None or scheme.rounds:
            return 1
        rows, columns = scheme.format(0).block  # no stored format hangs on the number of columns
        return math.lcm(rows, columns or 1)

    def format_of(self, modules: Sequence[str], out_sizes: Sequence[int], in_size: int) -> Format:
        """Of a linear that is packed from `modules`, with so many rows each.

        Raises:
            EngineError: they are stored in different ways, or in one that their sizes do not allow.
        """
        schemes = [self.scheme_of(module) for module in modules]
        if any(scheme != schemes[0] for scheme in schemes):
            words = ", ".join(
                f"{module} as {spell_scheme(scheme)}" for module, scheme in zip(modules, schemes, strict=True)
            )
            raise EngineError(
                "quantization_config: modules that are multiplied together are stored in different ways, which "
                f"is not supported: {words}"
            )
        scheme = schemes[0]
        if scheme is None:
            return PLAIN
        for module, rows in zip(modules, out_sizes, strict=True):
            reason = scheme.refusal(rows, in_size)
            if reason:
                raise EngineError(
                    f"quantization_config: {module} [{rows}, {in_size}] cannot be {scheme.words}: {reason}"
                )
        format = scheme.format(in_size)
        if format.block[0] > 1:  # parts begin where blocks do
            format = replace(
                format, block=(math.gcd(format.block[0], *list(accumulate(out_sizes))[:-1]), format.block[1])
            )
        if in_quads(format, in_size):
            format = replace(format, order="quads")
        if self.scale_dtype is not None and format.codes in ("int4", "int8") and format.block[1]:
            format = replace(format, scale_dtype=self.scale_dtype)
        if self._becomes_floats(format):
            return Format(rounding=format.rounding if self.rounds else None)
        return format

    def format_of_experts(self, modules: Sequence[Sequence[str]], out_sizes: Sequence[int], in_size: int) -> Format:
        """Of one matrix of all experts of a layer. modules: of each expert, those that its matrix is packed from.
        Activations are not rounded before it. Plain where the experts are stored in different ways, or in one that no
        kernel reads: then they are dequantised while they are read.

        Raises:
            EngineError: their sizes do not allow the way that they are stored in.
        """
        if len({self.scheme_of(module) for of_expert in modules for module in of_expert}) > 1:
            return PLAIN
        format = replace(self.format_of(modules[0], out_sizes, in_size), rounding=None, order="halves")
        return format if reaches_experts(format) else PLAIN

    @property
    def keeps_nothing(self) -> bool:
        """Whether all that is quantised becomes floats when it is read."""
        return bool(self._schemes) and len(self.words_of_floats) == len(self._schemes)

    @property
    def words_of_floats(self) -> tuple[str, ...]:
        """For the log: the schemes whose weights become floats when they are read."""
        return tuple(scheme.words for scheme in self._schemes if self._becomes_floats(scheme.format(0)))

    @property
    def _schemes(self) -> tuple[Scheme, ...]:
        return tuple(dict.fromkeys(rule.scheme for rule in self.rules if rule.scheme is not None))

    def _becomes_floats(self, format: Format) -> bool:
        return self.dequantised or (format.has_fp8 and not self.has_fp8)

    @property
    def words(self) -> str:
        """For the log: which schemes there are."""
        schemes = dict.fromkeys(scheme.words for scheme in self._schemes)
        return f"{self.name}: {', '.join(schemes)}" if schemes else f"{self.name}, of experts alone"


def spell_scheme(scheme: Scheme | None) -> str:
    return "plain floats" if scheme is None else scheme.words
