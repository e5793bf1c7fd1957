"""Rotary positions as one table of cosines and sines, so that the decoder knows nothing of their scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from paged_backend.errors import EngineError, reason_of
from paged_backend.models.architecture import Rope
from paged_backend.models.blocks.forward_pass import RopeTensors

_CHUNK = 65_536  # positions computed at once: bounds the memory that the table's making needs


def rope_tensors(ropes: Mapping[str, Rope], max_len: int, device: torch.device) -> Mapping[str | None, RopeTensors]:
    """Of sequences of at most max_len tokens, by their names; None: of layers without positions."""
    found: dict[str | None, RopeTensors] = {
        name: RopeTensors(rope_table(rope, max_len, device), _query_factors(rope, max_len, device))
        for name, rope in ropes.items()
    }
    return found | {None: RopeTensors()}


def rope_table(rope: Rope, max_len: int, device: torch.device) -> Tensor:
    """[max_len, R] float32: a row has the cosines of position p's R / 2 angles, then the sines, times the attention
    factor of yarn and longrope.

    Dynamic scaling (NTK) gives position p the frequencies of a sequence of p + 1 tokens, so that K depends on the
    tokens up to p alone and pages can be shared. transformers does the same while it decodes; only for a prompt longer
    than the original length does it use the frequencies of the whole prompt for all of it.
    Longrope has one set of frequencies up to the original length and another beyond it, which do not go together;
    transformers begins a sequence anew that outgrows the first. Here max_len decides for all sequences, as in vLLM.
    """
    table = torch.empty(max_len, rope.rotary_dim, dtype=torch.float32, device=device)
    half = rope.rotary_dim // 2
    for begin in range(0, max_len, _CHUNK):
        positions = torch.arange(begin, min(begin + _CHUNK, max_len))
        frequencies, factor = _frequencies(rope, positions, max_len)
        angles = positions[:, None].float() * frequencies
        rows = table[begin : begin + _CHUNK]
        rows[:, :half] = angles.cos() * factor
        rows[:, half:] = angles.sin() * factor
    return table


def check_rope(rope: Rope) -> None:
    """
    Raises:
        EngineError: the parameters give frequencies that are no numbers at the first position or at the last.
    """
    try:
        for position in (0, rope.max_len - 1):
            frequencies, factor = _frequencies(rope, torch.tensor([position]), position + 1)
            if not (frequencies.isfinite().all() and math.isfinite(factor)):
                raise EngineError(f"rope_parameters: {dict(rope.parameters)} give positions that are not finite")
    except (ArithmeticError, ValueError, TypeError) as error:
        raise EngineError(f"rope_parameters: {dict(rope.parameters)} cannot be used: {reason_of(error)}") from None


def _query_factors(rope: Rope, max_len: int, device: torch.device) -> Tensor | None:
    """[max_len] float32: 1 + beta * log(1 + floor(p / original length)) at position p, as in Llama 4, where the
    parameters have such a beta.
    """
    beta = rope.parameters.get("llama_4_scaling_beta")
    if not beta:
        return None
    spans = torch.arange(max_len, device=device) // int(rope.parameters["original_max_position_embeddings"])
    return 1 + float(beta) * torch.log(1 + spans.float())


def _frequencies(rope: Rope, positions: Tensor, max_len: int) -> tuple[Tensor, float]:
    """Angles per position: [R / 2], or [positions, R / 2] where they depend on it; and the attention factor."""
    if rope.rope_type == "default":
        return _powers(torch.tensor(float(rope.parameters["rope_theta"])), rope.rotary_dim), 1.0
    if rope.rope_type == "dynamic":
        return _dynamic(rope, positions), 1.0
    layer_type = {"layer_type": rope.layer_type} if rope.layer_type else {}
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope.rope_type](
        rope.config, torch.device("cpu"), seq_len=max_len, **layer_type
    )
    return frequencies, float(factor)


def _dynamic(rope: Rope, positions: Tensor) -> Tensor:
    """transformers' `_compute_dynamic_ntk_parameters` for a sequence that ends at each position. In float64 up to the
    base, as Python's floats there.
    """
    theta, factor, original = (
        float(rope.parameters["rope_theta"]),
        float(rope.parameters["factor"]),
        rope.max_position_embeddings,
    )
    lengths = (positions + 1).clamp(min=original).double()
    bases = theta * (factor * lengths / original - (factor - 1)) ** (rope.rotary_dim / (rope.rotary_dim - 2))
    return _powers(bases[:, None].float(), rope.rotary_dim)


def _powers(base: Tensor, rotary_dim: int) -> Tensor:
    return 1.0 / base ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
