"""Which ops compute a model on a device: kernels on CUDA, plain torch elsewhere and where the kernels do not reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from paged_backend.models.architecture import Architecture
from paged_backend.models.layer_spec import LatentSpec
from paged_backend.models.step import StepShape
from paged_backend.runner.placement import Placement
from paged_kernels.device_traits import LEAST_CAPABILITY, traits_of
from paged_kernels.rank_ops import RankOps, Ranks, VocabularyPart
from paged_kernels.reference import Ops, reference


def kernels_reach(page_size: int, place: Placement) -> bool:
    """Whether kernels compute."""
    traits = traits_of(place.device)
    return (
        traits.compiles
        and traits.capability >= LEAST_CAPABILITY
        and page_size & (page_size - 1) == 0
        and place.kv_dtype.itemsize <= place.dtype.itemsize
    )


def with_formats_of(architecture: Architecture, place: Placement, uses_kernels: bool) -> Architecture:
    """The architecture, its quantised weights in formats that the device computes with."""
    if architecture.quantization is None:
        return architecture
    has_fp8 = traits_of(place.device).has_fp8
    rounds = (uses_kernels and has_fp8) or place.device.type == "cpu"
    quantization = replace(architecture.quantization, dequantised=not uses_kernels, has_fp8=has_fp8, rounds=rounds)
    return replace(architecture, quantization=quantization)


def queries_at_once(architecture: Architecture, uses_kernels: bool, num_drafts: int) -> int:
    """How many decodes of a sequence that has so many drafts attention computes together; of latents always one."""
    attention = architecture.attention
    if not uses_kernels or not num_drafts or isinstance(attention, LatentSpec):
        return 1
    from paged_kernels.decode_attention import packed_queries

    return packed_queries(attention.num_heads // attention.num_kv_heads, attention.head_dim, num_drafts)


def make_ops(
    architecture: Architecture,
    place: Placement,
    uses_kernels: bool,
    shapes: Sequence[StepShape],
    ranks: Ranks,
    num_drafts: int = 0,
) -> Ops:
    """For steps of these shapes. ranks: those that share the model. num_drafts: of a sequence in a step, at most."""
    a = architecture
    part = VocabularyPart(a.vocabulary.start, a.vocabulary.count, a.num_logits, a.vocab_size)
    if not uses_kernels:
        return reference if ranks.size == 1 else RankOps(ranks, part)
    from paged_kernels.cuda_ops import CudaOps
    from paged_kernels.cuda_rank_ops import CudaRankOps

    make = CudaOps if ranks.size == 1 else partial(CudaRankOps, ranks, part)
    return make(
        num_heads=a.attention.num_heads,
        num_kv_heads=a.attention.num_kv_heads,
        head_dim=a.attention.head_dim,
        sliding_windows=a.sliding_windows,
        vocab_size=a.vocab_size,
        max_sequences=max(shape.num_decodes for shape in shapes),
        max_outputs=max(shape.num_outputs for shape in shapes),
        kv_dtype=place.kv_dtype,
        device=place.device,
        latents=(a.attention.rank, place.dtype) if isinstance(a.attention, LatentSpec) else None,
        queries=queries_at_once(a, uses_kernels, num_drafts),
    )
